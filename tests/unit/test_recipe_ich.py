"""The shipped bundles, as the node loads them, and on the heads they were made from."""

import csv
import json
import os
from dataclasses import asdict
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
from weights.recipe.card_words import interval
from weights.recipe.data import LABELS, PICTURE_RANGE_HU, read_boxes, read_cohort
from weights.recipe.judge import of_cohort
from weights.recipe.series import series_logits
from weights.recipe.template import KINDS

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "weights"
DATA = Path(os.environ.get("VIGIL_TEST_DATA", ROOT.parent / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not (DATA / "ct-ich" / "manifest.csv").is_file(), reason=f"no ct-ich under {DATA}"
)


@pytest.fixture(scope="module", params=list(KINDS))
def bundle(request):
    return load_bundle(WEIGHTS / request.param)


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
    draft, word = template.draft(KINDS[bundle.name]), bundle.manifest.output.map_word

    for part in ("applies", "selection", "pixels", "input"):
        assert getattr(bundle.manifest, part) == getattr(draft, part)
    said = {name: value for name, value in asdict(draft.output).items() if name != "procedure"}
    for name, value in said.items():
        measured = value.replace("Grad-CAM", word) if isinstance(value, str) else value
        assert getattr(bundle.manifest.output, name) == measured


def test_a_bundle_is_called_after_the_network_it_is(bundle):
    """Never a Lite network under B4's name."""
    wanted = {"ich": "tf_efficientnet_lite2", "ich-b4": "efficientnet_b4"}[bundle.name]

    assert bundle.manifest.architecture == wanted
    assert wanted in (bundle.weights.parent / "MODEL_CARD.md").read_text()


def test_all_bundles_together_are_small_enough_to_ship():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file() and "cache" not in p.parts]
    size = sum(p.stat().st_size for p in files)

    assert size < 60e6


def test_the_card_shows_the_measured_figures(bundle):
    folder = bundle.weights.parent
    figures = json.loads((folder / "report" / "figures.json").read_text())
    card = (folder / "MODEL_CARD.md").read_text()

    assert f"{figures['headline']['patient_auc']['value']:.2f}" in card
    game = figures["pointing_game"]["all"]
    assert bundle.manifest.explain.pointing_game == game["model_hit"]["value"]
    assert bundle.manifest.explain.pointing_game_brightest == game["brightest_hit"]["value"]
    assert bundle.manifest.version == figures["version"]
    for entry in figures["compared"]:
        assert entry["family"] in card
    assert bundle.manifest.label("any").threshold == figures["final"]["thresholds"]["balanced"]


def test_the_card_is_what_the_recipe_writes_of_those_figures(bundle, tmp_path):
    folder = bundle.weights.parent
    figures = json.loads((folder / "report" / "figures.json").read_text())

    write_card(tmp_path / "card.md", figures)

    assert (tmp_path / "card.md").read_text() == (folder / "MODEL_CARD.md").read_text()


def test_a_card_copes_with_figures_from_before_sex_and_age_were_measured(bundle, tmp_path):
    folder = bundle.weights.parent
    figures = json.loads((folder / "report" / "figures.json").read_text())
    for name in ("sex", "age"):
        del figures["shortcuts"][f"patient_auc_of_{name}_alone"]
    figures["subgroups"]["male"]["positive"] = 3

    write_card(tmp_path / "card.md", figures)

    old, new = (tmp_path / "card.md").read_text(), (folder / "MODEL_CARD.md").read_text()
    assert "Sex alone" not in old
    assert "Age alone" not in old
    assert "Sex alone" in new
    assert "Age alone" in new
    assert "among men alone" not in old
    assert f"among men alone {interval(figures['subgroups']['male']['patient_auc'])}" in new


@needs_data
def test_what_the_card_says_of_sex_and_age_is_measured_on_the_patients(bundle):
    folder = bundle.weights.parent
    figures = json.loads((folder / "report" / "figures.json").read_text())

    made = of_cohort(read_cohort(DATA / "ct-ich"), seed=figures["seed"])

    assert made == {name: figures["shortcuts"][name] for name in made}


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
