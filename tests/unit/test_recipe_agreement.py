"""`evaluate` and `predict` say the same of the same slices, as pictures or as DICOM of them.

Without rounding in between: 8-bit values are stored, and RescaleSlope is the window's width / 255.
"""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import structlog
from PIL import Image
from typer.testing import CliRunner

from inference.bundle import load_bundle
from inference.model import load_model, logits
from inference.volume import volume_from_pictures
from inference.window import model_input
from node import predict
from node.cli import app
from node.terminal import hush
from tests.builders import ctich_study
from tests.bundles.sources import ct_slice
from weights.recipe import cases
from weights.recipe.built import adult, head, noisy
from weights.recipe.data import LABELS, PICTURE_RANGE_HU, read_cohort
from weights.recipe.evaluate import score
from weights.recipe.pictures import TRAINING_WINDOW

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "weights" / "ich"
DATA = Path(os.environ.get("VIGIL_TEST_DATA", ROOT.parent / "shared" / "data")) / "ct-ich"
LOW, HIGH = PICTURE_RANGE_HU
CLOSE = 1e-4

#: A newborn, a child, and adults with and without bleeds.
REAL = (85, 59, 51, 120)


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(BUNDLE)


@pytest.fixture(scope="module")
def model(bundle):
    return load_model(bundle)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two drawn patients: pictures laid out as ct-ich, and a DICOM series of each beside them."""
    folder, lines = tmp_path_factory.mktemp("drawn"), []
    for patient in (1, 2):
        rng = np.random.default_rng(patient)
        made = noisy(rng, head(rng, adult(rng)), 4.0)
        grey = np.clip((made.pixels - LOW) / (HIGH - LOW) * 255, 0, 255).astype(np.uint8)
        (folder / "dicom" / str(patient)).mkdir(parents=True)
        for number, image in enumerate(grey):
            name = f"{patient}-{number}.png"
            Image.fromarray(image).save(folder / name)
            lines.append(
                {"patient": patient, "slice": number, "brain": name, "fracture": 0}
                | {"age_years": 40, "sex": "Male"}
                | {label: int(patient == 1 and label == "any") for label in LABELS}
            )
            stored = as_dicom(image, number, made.spacing_mm)
            stored.save_as(folder / "dicom" / str(patient) / name, enforce_file_format=True)
    write_csv(folder / "manifest.csv", lines)
    write_csv(folder / "labels.csv", [{"path": "1", "label": 1}, {"path": "2", "label": 0}])
    return folder


def as_dicom(grey, number, spacing):
    return ct_slice(
        grey.astype(np.uint16),
        z=5.0 * number,
        RescaleSlope=f"{(HIGH - LOW) / 255:.14f}",
        RescaleIntercept=f"{LOW:g}",
        PixelSpacing=[f"{value:.6f}" for value in spacing],
        InstanceNumber=number + 1,
    )


def write_csv(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


@pytest.fixture
def no_log_lines():
    """As `vigil` itself sees to."""
    hush()
    yield
    structlog.reset_defaults()


def predicted(folder, capsys):
    """(image logits, study logit, probability) as `vigil predict --json` prints them."""
    capsys.readouterr()
    assert predict.run(folder, out=None, model=str(BUNDLE), as_json=True, config=None) == 0
    finding = json.loads(capsys.readouterr().out)["finding"]
    first = finding["labels"][0]
    assert finding["model"]["numerics"] == "fp32"
    return finding["image_logits"]["any"], first["raw"]["logit"], first["probability"]["reference"]


def evaluated(source, bundle, model):
    scores = score(source, bundle, model)
    return list(zip(scores.image_logits, scores.study_logit, scores.probability, strict=True))


def assert_agree(one, other):
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)


@pytest.mark.usefixtures("no_log_lines")
def test_drawn_patients_are_judged_alike_on_every_way(drawn, bundle, model, capsys):
    of_pictures = evaluated(cases.from_cohort(read_cohort(drawn), bundle.manifest), bundle, model)
    of_dicom = evaluated(
        cases.from_studies(drawn / "dicom", drawn / "labels.csv", bundle), bundle, model
    )

    for place, patient in enumerate(("1", "2")):
        assert_agree(of_pictures[place], of_dicom[place])
        assert_agree(of_pictures[place], predicted(drawn / "dicom" / patient, capsys))
    assert abs(of_pictures[0][1] - of_pictures[1][1]) > CLOSE


def test_the_command_gives_the_same_figures_for_pictures_and_dicom(drawn):
    by_data, by_dicom = (
        CliRunner().invoke(app, ["evaluate", "--json", "--model", str(BUNDLE), *map(str, given)])
        for given in (
            ("--data", drawn),
            ("--dicom", drawn / "dicom", "--labels", drawn / "labels.csv"),
        )
    )

    one, other = json.loads(by_data.stdout), json.loads(by_dicom.stdout)
    assert (one["n"], one["positives"], one["n_images"]) == (2, 1, 32)
    for name in ("n", "positives", "auc", "sensitivity", "specificity", "n_images"):
        assert one[name] == other[name]
    for name in ("brier", "log_loss"):
        assert one[name] == pytest.approx(other[name], abs=CLOSE)


@pytest.mark.usefixtures("no_log_lines")
@pytest.mark.parametrize("patient", REAL)
def test_real_patients_are_judged_alike_on_every_way(patient, bundle, model, tmp_path, capsys):
    folder = tmp_path / "dicom" / "one"
    folder.mkdir(parents=True)
    for number, dataset in enumerate(ctich_study(patient)):  # skips without the data
        dataset.save_as(folder / f"IM{number:03}", enforce_file_format=True)
    write_csv(tmp_path / "labels.csv", [{"path": "one", "label": 1}])

    with (DATA / "manifest.csv").open(newline="") as file:
        lines = [x for x in csv.DictReader(file) if int(x["patient"]) == patient]
    write_csv(tmp_path / "manifest.csv", [x | {"brain": DATA / x["brain"]} for x in lines])
    of_pictures = cases.from_cohort(read_cohort(tmp_path), bundle.manifest)
    of_dicom = cases.from_studies(tmp_path / "dicom", tmp_path / "labels.csv", bundle)

    (one,), (other,) = (evaluated(way, bundle, model) for way in (of_pictures, of_dicom))
    assert_agree(one, other)
    assert_agree(one, predicted(folder, capsys))


def alone(grey, bundle):
    """One picture as an input of one image, as it is."""
    volume = volume_from_pictures(grey[None], PICTURE_RANGE_HU, step_mm=None)
    return model_input(volume, bundle.manifest.pixels, bundle.manifest.input).inputs


def test_a_drawn_picture_alone_is_an_input_of_one_image(drawn, bundle, model):
    cohort = read_cohort(drawn)

    for row in (3, 8, 12):
        grey = cohort.grey(np.array([row]))[0]
        as_picture = cases.picture_inputs(grey, bundle.manifest, TRAINING_WINDOW)

        np.testing.assert_allclose(
            logits(model, as_picture), logits(model, alone(grey, bundle)), rtol=0, atol=CLOSE
        )


def test_a_real_picture_without_writing_is_the_same_input_to_the_last_bit(bundle):
    if not (DATA / "manifest.csv").is_file():
        pytest.skip(f"no {DATA}")
    cohort, same = read_cohort(DATA), 0
    rows = np.arange(5, len(cohort.pictures), 125)

    for row in rows:
        grey = cohort.grey(np.array([row]))[0]
        as_picture = cases.picture_inputs(grey, bundle.manifest, TRAINING_WINDOW)
        same += np.array_equal(as_picture, alone(grey, bundle))

    # The rest show fingers, or corners of the holder that a black rim cuts off: as letters look.
    assert same >= 0.7 * len(rows)
