"""Bundles judged on pictures and DICOM from elsewhere: what is read, assumed, left out, refused."""

import csv
import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydicom import dcmread
from scipy.special import expit
from typer.testing import CliRunner

from db.result import RawScore
from inference.bundle import load_bundle
from inference.calibration import calibrate
from inference.manifest import OperatingPoint
from inference.model import load_model, logits
from node.cli import app
from tests.builders import ctich_study, real_size_study
from tests.bundles.make import make_bundle
from weights.recipe import cases
from weights.recipe.cases import LeftOut
from weights.recipe.data import read_cohort
from weights.recipe.evaluate import NothingToJudge, Scores, evaluate, figures_of, score
from weights.recipe.page import write_page
from weights.recipe.phantoms import drawn_head
from weights.recipe.pictures import (
    BadPicture,
    GreyWindow,
    doubt_about,
    guess_window,
    parse_window,
    read_picture,
    without_writing,
)
from weights.recipe.scores import LEAST, read_scores
from weights.recipe.series import NotJudged, read_series

DATA = Path(os.environ.get("VIGIL_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
HALF = GreyWindow(40.0, 80.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(make_bundle(tmp_path_factory.mktemp("head")))


@pytest.fixture(scope="module")
def model(bundle):
    return load_model(bundle)


def picture(hu, window=HALF):
    low, high = window.range_hu
    return np.clip((hu - low) / (high - low) * 255, 0, 255).astype(np.uint8)


def table(path, head, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve drawn heads of three sizes, every second one with a bright place."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for number in range(12):
        hu = drawn_head([(0.5, 0.4, 0.1, 0.1)] if number % 2 == 0 else None)
        image = Image.fromarray(picture(hu + rng.normal(0, 3, hu.shape)))
        side = (128, 200, 333)[number % 3]
        image.convert(("L", "RGB")[number % 2]).resize((side, side)).save(folder / f"{number}.png")
        rows.append((f"{number}.png", int(number % 2 == 0), f"p{number // 3}"))
    return folder, table(folder / "labels.csv", ("file", "label", "patient"), rows)


def test_pictures_of_any_size_and_mode_are_judged_one_by_one(pictures, bundle, model):
    folder, labels = pictures

    source = cases.from_pictures(folder, labels, bundle.manifest, HALF)
    figures, scores = evaluate(source, bundle, model)

    assert (figures["n"], figures["positives"], figures["n_patients"]) == (12, 6, 4)
    assert figures["unit"] == "picture"
    assert 0 <= figures["auc"] <= 1
    assert figures["intervals"]["auc"][0] <= figures["auc"] <= figures["intervals"]["auc"][1]
    assert scores.names == tuple(f"{number}.png" for number in range(12))


def test_the_figures_are_those_of_the_scores(bundle):
    """Worked by hand: of 4 pairs of positive and negative, 3 are in order."""
    scores = Scores(
        names=("a", "b", "c", "d"),
        groups=("", "", "", ""),
        truth=np.array([True, True, False, False]),
        study_logit=np.array([2.0, 0.0, 1.0, -1.0]),
        probability=np.array([0.9, 0.4, 0.6, 0.1]),
        image_logits=tuple(np.array([z]) for z in (2.0, 0.0, 1.0, -1.0)),
        image_truth=(None,) * 4,
        left_out=(),
    )

    figures = figures_of(scores, bundle, seed=0)

    assert figures["auc"] == 0.75
    assert figures["average_precision"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-4)
    assert figures["brier"] == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    threshold = figures["threshold"]
    assert figures["sensitivity"] == np.mean(np.array([0.9, 0.4]) >= threshold)
    assert figures["specificity"] == np.mean(np.array([0.6, 0.1]) < threshold)


def some_scores(n=60, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.arange(n) < n // 3
    logits = rng.normal(0, 1.5, n) + truth
    return Scores(
        names=tuple(map(str, range(n))),
        groups=("",) * n,
        truth=truth,
        study_logit=logits,
        probability=np.clip(expit(logits), 0.02, 0.98),
        image_logits=tuple(np.array([z]) for z in logits),
        image_truth=(None,) * n,
        left_out=(),
    )


def test_positives_that_were_left_out_count_as_missed(bundle):
    """Worked by hand: 7 of 8 positives refused, the eighth called; a patient of two counts once."""
    missed = tuple(LeftOut(f"m{i}", True, "orientation: sagittal") for i in range(7))
    scores = replace(some_scores(1), probability=np.array([0.98]), truth=np.array([True]))
    scores = replace(scores, left_out=(*missed, LeftOut("n", False, "no DICOM file in it")))

    figures = figures_of(scores, bundle, seed=0)

    assert (figures["n_left_out"], figures["left_out_positives"]) == (8, 7)
    assert figures["left_out_reasons"] == {"orientation: sagittal": 7, "no DICOM file in it": 1}
    assert (figures["sensitivity"], figures["sensitivity_of_all"]) == (1.0, 0.125)
    # Clopper and Pearson for 1 of 8
    assert figures["intervals"]["sensitivity_of_all"] == pytest.approx([0.0032, 0.5265], abs=1e-4)


def test_patients_are_drawn_with_what_was_left_out_of_them():
    scores = replace(
        some_scores(3),
        groups=("a", "a", "b"),
        left_out=(LeftOut("x", True, "", "b"), LeftOut("y", True, ""), LeftOut("z", False, "")),
    )

    present, truth, patients = scores.with_missed(np.array([True, False, True]))

    assert present.tolist() == [True, False, True, False, False]
    assert truth.tolist() == [*scores.truth.tolist(), True, True]
    assert [rows.tolist() for rows in patients] == [[0, 1], [2, 3], [4]]


def test_each_operating_point_tells_the_sensitivity_of_all(bundle):
    point = OperatingPoint(name="high", threshold=0.9, sensitivity=0.5, specificity=0.9)
    labels = bundle.manifest.labels
    manifest = replace(
        bundle.manifest, labels=(replace(labels[0], operating_points=(point,)), *labels[1:])
    )
    scores = replace(some_scores(), left_out=(LeftOut("m", True, "late"),) * 20)

    figures = figures_of(scores, replace(bundle, manifest=manifest), seed=0)

    at = figures["operating_points"]["high"]
    found = at["confusion"][0][0]
    assert at["sensitivity_of_all"]["value"] == round(found / 40, 4)
    assert at["sensitivity_of_all"]["low"] < at["sensitivity_of_all"]["value"]


def test_calibration_and_predictive_values_are_among_the_figures(bundle):
    scores = some_scores()

    figures = figures_of(scores, bundle, seed=0)

    for name in ("calibration_intercept", "calibration_in_the_large", "ece"):
        assert figures["intervals"][name][0] < figures["intervals"][name][1]
        assert isinstance(figures[name], float)
    perfect = figures["ece_if_perfect"]
    assert 0 < perfect["low"] < perfect["mean"] < perfect["high"] < 1
    shares = [line["prevalence"] for line in figures["predictive_values"]]
    assert shares == [0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.2, figures["reference_prevalence"]]
    assert sum(map(sum, figures["confusion"])) == len(scores.truth)
    json.dumps(figures, allow_nan=False)


def test_probabilities_are_judged_where_thresholds_live(pictures, bundle, model, tmp_path):
    """A calibration fitted at another prevalence than the reference, as a site's own is."""
    own = tmp_path / "calibration.toml"
    text = (bundle.folder / "calibration.toml").read_text()
    own.write_text(text.replace("prevalence = 0.4", "prevalence = 0.05", 1))
    served = load_bundle(bundle.folder, calibration=own)
    alone = replace(served, manifest=implying_nothing(served.manifest))
    folder, labels = pictures

    scores = score(cases.from_pictures(folder, labels, bundle.manifest, HALF), alone, model)

    np.testing.assert_allclose(scores.probability, on_its_own(scores, served))


def test_what_implies_the_primary_label_raises_it_as_in_a_served_study(pictures, bundle, model):
    folder, labels = pictures

    scores = score(cases.from_pictures(folder, labels, bundle.manifest, HALF), bundle, model)

    own = np.array(on_its_own(scores, bundle))
    assert (scores.probability >= own - 1e-12).all()
    assert (scores.probability > own).any()


def on_its_own(scores, bundle):
    """The primary label's probabilities by its calibration alone, on the reference scale."""
    label = bundle.manifest.labels[0]
    return [
        calibrate(
            RawScore(float(z)),
            bundle.calibrations[label.id],
            reference_prevalence=label.reference_prevalence,
        ).reference
        for z in scores.study_logit
    ]


def implying_nothing(manifest):
    return replace(manifest, labels=tuple(replace(x, implies=()) for x in manifest.labels))


def test_one_class_alone_gives_nulls_not_nan(pictures, bundle, model, tmp_path):
    folder, _ = pictures
    labels = table(tmp_path / "l.csv", ("file", "label"), [("0.png", 1), ("2.png", 1)])

    figures, scores = evaluate(
        cases.from_pictures(folder, labels, bundle.manifest, HALF), bundle, model
    )

    assert figures["auc"] is None
    assert figures["specificity"] is None
    json.dumps(figures, allow_nan=False)
    assert write_page(tmp_path, figures, scores, bundle, model).is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,label\n0.png,1\n", "no column 'file'"),
        ("file,truth\n0.png,1\n", "no column 'label'"),
        ("file,label\n0.png,maybe\n", "line 2: label 'maybe'"),
        ("file,label\n0.png,\n", "line 2: label ''"),
        ("file,label\n0.png\n", "line 2: label ''"),
        ("file,label\n0.png,1\n0.png,0\n", "line 3: 0.png is there twice"),
        ("file,label\n../0.png,1\n", "no name inside the folder"),
        ("file,label\nnone.png,1\n", "line 2: 1 of 1 names are not in"),
        (f"file,label\n{'n' * 300}.png,1\n", "line 2: 1 of 1 names are not in"),
        ("file,label,label\n0.png,1,0\n", "two columns 'label'"),
        ("file,label\n", "no lines"),
        ("", "no lines"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(pictures, bundle, tmp_path, text, words):
    labels = tmp_path / "labels.csv"
    labels.write_text(text)

    with pytest.raises(cases.BadLabels, match=words):
        cases.from_pictures(pictures[0], labels, bundle.manifest)


def test_spreadsheets_habits_are_understood(pictures, bundle, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("﻿File, Label ,note\r\n0.png, TRUE,x\r\n1.png,0.0,y,z\r\n", encoding="utf-8")

    source = cases.from_pictures(pictures[0], labels, bundle.manifest, HALF)

    assert [case.truth for case in source.cases] == [True, False]


@pytest.mark.parametrize(
    "text",
    [
        "file;label\n0.png;1\n1.png;0\n",
        "file\tlabel\r\n0.png\t1\r\n1.png\t0\r\n",
        "label,site,file\n\n1,x,0.png\n\nnegative,y,1.png\n,,\n",
    ],
)
def test_tables_of_other_countries_and_orders_are_read(pictures, bundle, tmp_path, text):
    (tmp_path / "l.csv").write_text(text)

    source = cases.from_pictures(pictures[0], tmp_path / "l.csv", bundle.manifest, HALF)

    assert [(case.name, case.truth) for case in source.cases] == [("0.png", True), ("1.png", False)]


def test_what_is_no_picture_is_left_out_by_name(pictures, bundle, model, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((pictures[0] / name).read_bytes())
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((pictures[0] / "2.png").read_bytes()[:200])
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((99, 99), np.uint16)).save(tmp_path / "deep.png")
    names = ("0.png", "1.png", "text.png", "cut.png", "small.png", "deep.png")
    labels = table(tmp_path / "l.csv", ("file", "label"), [(n, i % 2) for i, n in enumerate(names)])

    scores = score(cases.from_pictures(tmp_path, labels, bundle.manifest), bundle, model)

    assert scores.names == ("0.png", "1.png")
    assert {one.name for one in scores.left_out} == {"text.png", "cut.png", "small.png", "deep.png"}
    assert "more than 8 bits" in next(x.reason for x in scores.left_out if x.name == "deep.png")


def looks(kind):
    grey = picture(drawn_head())
    return {
        "head": grey,
        "on paper": np.pad(grey, 40, constant_values=255),
        "inverted": 255 - grey,
        "inverted, black rim": np.pad(255 - grey, 4),
        "on grey": np.where(grey < 8, 128, grey).astype(np.uint8),
        "blank": np.full((128, 128), 90, np.uint8),
        "bone alone": np.where(grey > 250, grey, 0).astype(np.uint8),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("head", ""),
        ("on paper", ""),
        ("inverted", "a bright border: inverted"),
        ("inverted, black rim", "mostly white: inverted"),
        ("on grey", "a bright border"),
        ("blank", "blank"),
        ("bone alone", "hardly any grey such as brain has"),
    ],
)
def test_what_is_no_head_on_black_is_doubted(kind, words):
    found = doubt_about(looks(kind))

    assert found.startswith(words)
    assert bool(found) == bool(words)


def test_doubtful_pictures_are_judged_as_before_and_counted(pictures, bundle, model, tmp_path):
    names = ("head", "inverted", "blank")
    for name in names:
        Image.fromarray(looks(name)).save(tmp_path / f"{name}.png")
    labels = table(
        tmp_path / "l.csv", ("file", "label"), [(f"{n}.png", i % 2) for i, n in enumerate(names)]
    )

    source = cases.from_pictures(tmp_path, labels, bundle.manifest, HALF)
    figures, scores = evaluate(source, bundle, model)

    expected = [cases.picture_inputs(looks(name), bundle.manifest, HALF) for name in names]
    np.testing.assert_allclose(
        [z[0] for z in scores.image_logits],
        [logits(model, one)[0, 0] for one in expected],
        atol=1e-5,
    )
    notes = " | ".join(figures["notes"])
    assert "judged all the same, 1 with blank: blank.png" in notes
    assert "1 with a bright border: inverted, or not on black: inverted.png" in notes
    assert "thresholds are those of whole studies" in notes


def test_letters_beside_the_head_change_nothing(bundle):
    grey = picture(drawn_head())
    marked = Image.fromarray(grey)
    ImageDraw.Draw(marked).text((3, 3), "R 5 mm", fill=255)
    ImageDraw.Draw(marked).rectangle((0, 0, grey.shape[1] - 1, grey.shape[0] - 1), outline=255)

    plain = cases.picture_inputs(grey, bundle.manifest, HALF)
    cleaned = cases.picture_inputs(np.asarray(marked), bundle.manifest, HALF)

    assert not np.array_equal(grey, np.asarray(marked))
    np.testing.assert_array_equal(plain, cleaned)


def fringed(grey):
    """With skin that fat parts from the skull, and a holder that the edge cuts."""
    rows, columns = np.indices(grey.shape)
    at = np.array(grey.shape) / 2
    radius = np.hypot(
        (rows - at[0]) / (0.465 * grey.shape[0]), (columns - at[1]) / (0.385 * at[1] * 2)
    )
    made = np.where(np.abs(radius - 1) < 0.01, 120, grey)
    made[-20:, :60] = 200
    return made.astype(np.uint8)


def test_skin_and_holder_are_no_writing():
    grey = fringed(picture(drawn_head()))

    assert np.array_equal(without_writing(grey), grey)


@pytest.mark.parametrize("border", [3, 40])
def test_white_paper_round_a_picture_becomes_air(border):
    grey = picture(drawn_head())
    framed = np.pad(grey, border, constant_values=255)

    assert np.array_equal(without_writing(framed), np.pad(grey, border))


def test_what_is_transparent_is_black_whatever_its_colour(tmp_path):
    grey = picture(drawn_head())
    alpha = np.where(grey > 0, 255, 0).astype(np.uint8)
    white = np.where(grey > 0, grey, 255).astype(np.uint8)
    Image.fromarray(np.dstack([white, white, white, alpha]), "RGBA").save(tmp_path / "a.png")

    assert np.array_equal(read_picture(tmp_path / "a.png"), grey)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK"])
def test_a_picture_is_read_alike_in_every_mode(tmp_path, mode):
    grey = picture(drawn_head())
    path = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    Image.fromarray(grey).convert(mode).save(path)

    assert np.abs(read_picture(path).astype(int) - grey).max() <= 1


def test_a_picture_without_a_head_is_left_as_it_is():
    empty = np.zeros((100, 100), np.uint8)

    assert np.array_equal(without_writing(empty), empty)


@pytest.mark.parametrize("width", [80.0, 120.0])
def test_the_window_of_real_pictures_is_guessed(width):
    if not (DATA / "ct-ich" / "manifest.csv").is_file():
        pytest.skip(f"no ct-ich under {DATA}")
    window, cohort = GreyWindow(40.0, width), read_cohort(DATA / "ct-ich")
    some = cohort.grey(np.arange(0, len(cohort.pictures), 40)).astype(np.float32)
    hu = some / 255 * 120 - 20

    assert guess_window([picture(one, window) for one in hu]) == window


@pytest.mark.parametrize("text", ["40", "40/0", "40/-3", "a/b", ""])
def test_a_window_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"auto|float"):
        parse_window(text)


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(BadPicture, match=r"nothing\.png: no such file"):
        read_picture(tmp_path / "nothing.png")


def write_study(datasets, folder):
    folder.mkdir()
    for number, dataset in enumerate(datasets):
        dataset.save_as(folder / f"IM{number}", enforce_file_format=True)


def test_dicom_studies_are_judged_and_refusals_named(bundle, model, tmp_path):
    write_study(real_size_study("plain", seed=1), tmp_path / "head")
    write_study(real_size_study("chest", seed=2), tmp_path / "chest")
    (tmp_path / "empty").mkdir()
    rows = [("head", 0), ("chest", 0), ("empty", 1)]
    labels = table(tmp_path / "l.csv", ("path", "label"), rows)

    figures, scores = evaluate(cases.from_studies(tmp_path, labels, bundle), bundle, model)

    assert scores.names == ("head",)
    reasons = {one["name"]: one["reason"] for one in figures["left_out"]}
    assert reasons["empty"] == "no DICOM file in it"
    assert "allowed" in reasons["chest"]


@pytest.mark.parametrize("kept", ["meta group", "nothing"])
def test_a_data_set_without_a_file_header_is_read_as_the_node_reads_it_from_the_network(
    bundle, tmp_path, kept
):
    write_study(real_size_study("plain", seed=1), tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    for path in (tmp_path / "whole").iterdir():
        meta = dcmread(path, stop_before_pixels=True).file_meta.FileMetaInformationGroupLength
        start = 132 if kept == "meta group" else 132 + 12 + meta
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes()[start:])
    (tmp_path / "bare" / "notes.txt").write_text("no DICOM")

    bare, whole = (read_series(tmp_path / name, bundle).inputs for name in ("bare", "whole"))

    np.testing.assert_array_equal(bare, whole)


@pytest.mark.parametrize(
    "start", [b"", b"\x08\x00", b"\x02\x00\x10\x00UI", b"\x08\x00\x05\x00CS\xff"]
)
def test_what_only_begins_like_a_data_set_is_no_dicom(bundle, tmp_path, start):
    (tmp_path / "one").write_bytes(start + bytes(range(200)))

    with pytest.raises(NotJudged, match="no DICOM file in it"):
        read_series(tmp_path / "one", bundle)


@pytest.mark.parametrize("rest", [b"", b"\xff" * 300, b"\x02\x00\x00\x00UL\x04\x00" + bytes(4)])
def test_a_damaged_dicom_file_leaves_its_study_out(bundle, tmp_path, rest):
    (tmp_path / "one").write_bytes(bytes(128) + b"DICM" + rest)
    labels = table(tmp_path / "l.csv", ("path", "label"), [("one", 1)])

    (left_out,) = cases.from_studies(tmp_path, labels, bundle).cases

    assert left_out.reason == "not_dicom: a file's meta group is damaged"


def test_pictures_and_the_dicom_made_of_them_get_the_same_logits(tmp_path):
    """Without rounding in between: RescaleSlope is the window's width over 255."""
    served = load_bundle(Path(__file__).parents[2] / "weights" / "ich")
    network, patient = load_model(served), 51
    write_study(ctich_study(patient), tmp_path / "one")
    labels = table(tmp_path / "l.csv", ("path", "label"), [("one", 1)])
    cohort = read_cohort(DATA / "ct-ich")

    of_dicom = score(cases.from_studies(tmp_path, labels, served), served, network)
    source = cases.from_cohort(cohort, served.manifest)
    case = next(one for one in source.cases if one.name == str(patient))
    of_pictures = score(cases.Source(1, iter([case]), "study", "patient"), served, network)

    np.testing.assert_allclose(of_dicom.image_logits[0], of_pictures.image_logits[0], atol=1e-4)
    assert of_dicom.study_logit == pytest.approx(of_pictures.study_logit, abs=1e-4)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.loads, self.pictures = [], 0

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith(("data:", "#")):
                self.loads.append((tag, value))
        self.pictures += tag == "img"


def test_the_page_stands_alone_and_escapes_names(pictures, bundle, model, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / f"<b>{name}").write_bytes((pictures[0] / name).read_bytes())
    rows = [("<b>0.png", 1), ("<b>1.png", 0)]
    labels = table(tmp_path / "l.csv", ("file", "label"), rows)
    source = cases.from_pictures(tmp_path, labels, bundle.manifest, HALF)
    figures, scores = evaluate(source, bundle, model)

    text = write_page(tmp_path / "new" / "folder", figures, scores, bundle, model).read_text()

    links = Links()
    links.feed(text)
    assert links.loads == []
    assert links.pictures == 2
    assert "<b>0" not in text
    assert text.count("<svg") == 5


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command_prints_one_json_document(pictures, bundle, tmp_path):
    folder, labels = pictures

    done = run("--images", folder, "--labels", labels, "--model", bundle.folder, "--json",
               "--report", tmp_path)  # fmt: skip

    assert done.exit_code == 0
    assert json.loads(done.stdout)["n"] == 12
    assert (tmp_path / "evaluation.html").is_file()


def test_text_and_page_say_how_many_positives_were_left_out(pictures, bundle, tmp_path):
    (tmp_path / "0.png").write_bytes((pictures[0] / "0.png").read_bytes())
    (tmp_path / "1.png").write_bytes((pictures[0] / "1.png").read_bytes())
    rows = [("0.png", 1), ("1.png", 0)]
    for number in range(7):
        (tmp_path / f"bad{number}.png").write_text("no picture")
        rows.append((f"bad{number}.png", 1))
    labels = table(tmp_path / "l.csv", ("file", "label"), rows)

    done = run("--images", tmp_path, "--labels", labels, "--model", bundle.folder,
               "--report", tmp_path / "page")  # fmt: skip

    words = " ".join(done.stdout.split())
    assert "2 pictures of 2 patients, 1 positive; 7 left out, 7 of them positive" in words
    assert "sensitivity_of_all" in words
    assert "7 left out: no picture of a known kind" in words
    page = (tmp_path / "page" / "evaluation.html").read_text()
    assert "7 of 8 positives were left out" in page
    assert "counted as missed" in page


def test_nothing_judged_says_how_many_positives_there_were(bundle, model, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    labels = table(tmp_path / "l.csv", ("file", "label"), [("bad.png", 1)])

    source = cases.from_pictures(tmp_path, labels, bundle.manifest, HALF)

    with pytest.raises(NothingToJudge, match=r"none of 1 \(1 positive\) could be judged"):
        evaluate(source, bundle, model)


def lines_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_scores_of_an_evaluation_are_what_calibrate_takes(pictures, bundle, tmp_path):
    rows = []
    for number in range(2 * LEAST):  # the darker half is called negative
        source = pictures[0] / f"{number % 12}.png"
        name = f"{number}.png"
        grey = np.asarray(Image.open(source).convert("L")).astype(float)
        Image.fromarray((grey * (0.7 + 0.003 * number)).astype(np.uint8)).save(tmp_path / name)
        rows.append([name, 0, f"p{number}"])
    labels = table(tmp_path / "l.csv", ("file", "label", "patient"), rows)
    model, first = bundle.folder, tmp_path / "first.csv"
    options = ("--images", tmp_path, "--labels", labels, "--model", model, "--window", "40/80")
    assert run(*options, "--scores", first).exit_code == 0
    read = {line["file"]: float(line["score"]) for line in lines_of(first)}
    ranked = sorted(read, key=read.get)
    positives = {name for i, name in enumerate(ranked) if (i >= LEAST) != (i % 10 == 3)}
    table(labels, ("file", "label", "patient"), [(n, int(n in positives), p) for n, _, p in rows])

    done = run(*options, "--scores", tmp_path / "scores.csv", "--json")
    made = CliRunner().invoke(app, ["calibrate", "--scores", str(tmp_path / "scores.csv"),
                                    "--out", str(tmp_path / "own.toml"), "--model", str(model),
                                    "--scale", "logit", "--json"])  # fmt: skip

    assert (done.exit_code, made.exit_code) == (0, 0), made.stderr
    figures, calibrated = json.loads(done.stdout), json.loads(made.stdout)
    assert (calibrated["n"], calibrated["positives"]) == (figures["n"], figures["positives"])
    lines = lines_of(tmp_path / "scores.csv")
    assert list(lines[0]) == ["file", "patient", "label", "score", "probability"]
    assert all(0 < float(line["probability"]) < 1 for line in lines)
    assert read_scores(tmp_path / "scores.csv", "logit").logits.tolist() == list(read.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "one of --data, --images and --dicom"),
        (["--images", ".", "--dicom", "."], "one of --data, --images and --dicom"),
        (["--images", "."], "--labels names the CSV"),
        (["--data", ".", "--labels", "x.csv"], "brings its own labels"),
        (["--images", ".", "--labels", "x.csv", "--window", "wide"], "neither auto nor"),
    ],
)
def test_a_wrong_combination_is_wrong_usage(given, words):
    done = run(*given)

    assert done.exit_code == 2
    assert words in done.stderr
