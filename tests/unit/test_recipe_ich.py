"""The shipped bundle, as the node loads it, and on the heads it was made from."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from db.result import LabelStatus
from inference.bundle import load_bundle
from inference.model import check_reference, load_model
from inference.predict import predict
from inference.volume import volume_from_pictures
from weights.recipe import template
from weights.recipe.card import write_card
from weights.recipe.data import LABELS, PICTURE_RANGE_HU, read_boxes, read_cohort
from weights.recipe.series import series_logits

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "weights" / "ich"
DATA = Path(os.environ.get("VIGIL_TEST_DATA", ROOT.parent / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not (DATA / "ct-ich" / "manifest.csv").is_file(), reason=f"no ct-ich under {DATA}"
)


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(BUNDLE)


@pytest.fixture(scope="module")
def model(bundle):
    return load_model(bundle)


def test_the_bundle_gives_its_own_reference_logits(bundle, model):
    assert check_reference(bundle, model) < 0.001


def test_the_reference_inputs_tell_a_wrong_weight(bundle):
    other = load_model(bundle)
    other.mix.bias.data[0] += 0.05

    with pytest.raises(Exception, match="off the bundle's own reference"):
        check_reference(bundle, other)


def test_the_outputs_are_the_six_labels_in_their_order(bundle):
    assert tuple(label.id for label in bundle.manifest.labels) == LABELS
    assert load_file(bundle.weights)["mix.weight"].shape == (bundle.manifest.outputs, 6)


def test_only_any_is_validated_and_no_subtype_has_a_threshold(bundle):
    first, *subtypes = bundle.manifest.labels

    assert first.status is LabelStatus.VALIDATED
    assert {label.status for label in subtypes} == {LabelStatus.EXPLORATORY}


def test_the_bundle_was_made_from_the_committed_manifest(bundle):
    draft = template.draft()

    for part in ("applies", "selection", "pixels", "input", "output"):
        assert getattr(bundle.manifest, part) == getattr(draft, part)


def test_all_bundles_together_are_small_enough_to_ship():
    size = sum(
        p.stat().st_size for p in BUNDLE.parent.rglob("*") if p.is_file() and "cache" not in p.parts
    )

    assert size < 60e6


def test_the_card_shows_the_measured_figures(bundle):
    import json

    figures = json.loads((BUNDLE / "report" / "figures.json").read_text())
    card = (BUNDLE / "MODEL_CARD.md").read_text()

    assert f"{figures['headline']['patient_auc']['value']:.2f}" in card
    game = figures["pointing_game"]["all"]
    assert bundle.manifest.explain.pointing_game == game["model_hit"]["value"]
    assert bundle.manifest.explain.pointing_game_brightest == game["brightest_hit"]["value"]
    assert bundle.manifest.version == figures["version"]
    for entry in figures["compared"]:
        assert entry["family"] in card
    assert bundle.manifest.label("any").threshold == figures["final"]["thresholds"]["balanced"]


def test_the_card_is_what_the_recipe_writes_of_those_figures(tmp_path):
    import json

    figures = json.loads((BUNDLE / "report" / "figures.json").read_text())

    write_card(tmp_path / "card.md", figures)

    assert (tmp_path / "card.md").read_text() == (BUNDLE / "MODEL_CARD.md").read_text()


@needs_data
def test_boxes_lie_on_slices_that_bleed_but_for_the_known_one():
    cohort, boxes = read_cohort(DATA / "ct-ich"), read_boxes(DATA / "ct-ich")
    bleeding = {
        (int(p), int(s))
        for p, s, label in zip(
            cohort.patients, cohort.slice_numbers, cohort.labels[:, 0], strict=True
        )
        if label
    }

    assert len(boxes) == 257
    assert boxes.keys() - bleeding == {(86, 17)}


@needs_data
def test_a_head_full_of_blood_is_suspected_and_a_clear_one_is_not(bundle, model):
    bleeding, clear = most_bleeding_patient(), "120"

    assert finding(bundle, model, bleeding).is_positive
    assert not finding(bundle, model, clear).is_positive


@needs_data
def test_the_real_series_of_another_scanner_passes_the_bundles_rules(bundle, model):
    logits = series_logits(DATA / "head-ct-ge", bundle, model)

    assert logits.shape == (28, 6)
    assert np.isfinite(logits).all()


def most_bleeding_patient():
    counts = {}
    for line in lines():
        counts[line["patient"]] = counts.get(line["patient"], 0) + int(line["any"])
    return max(counts, key=counts.get)


def lines():
    with (DATA / "ct-ich" / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def finding(bundle, model, patient):
    mine = sorted((x for x in lines() if x["patient"] == patient), key=lambda x: int(x["slice"]))
    grey = np.stack([np.asarray(Image.open(DATA / "ct-ich" / x["brain"])) for x in mine])
    volume = volume_from_pictures(grey, PICTURE_RANGE_HU)
    made, _ = predict(volume, bundle, model, started_at="2026-01-01T00:00:00Z", result_uuid="x")
    return made
