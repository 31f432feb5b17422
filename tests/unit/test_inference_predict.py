"""From logits to a finding: aggregation, presence, urgency, key images, heat maps."""

import hashlib
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from safetensors.torch import load_file, save_file

from db.result import Finding, RawScore, Region, Urgency
from inference import heatmap
from inference.bundle import BundleError, load_bundle
from inference.manifest import Aggregation
from inference.model import check_reference, load_model, logits
from inference.predict import (
    BadOutput,
    aggregate,
    in_context,
    make_finding,
    make_heatmaps,
    predict,
    prepare,
)
from tests.bundles.make import make_bundle
from tests.bundles.sources import ct_slice, head, head_series, volume_of

WHEN = {"started_at": "2026-01-01T00:00:00Z", "result_uuid": "00000000-0000-4000-8000-000000000000"}
scores = st.lists(st.floats(-20, 20), min_size=1, max_size=60)
ways = st.builds(Aggregation, kind=st.sampled_from(["max", "topk_mean", "noisy_or"])) | st.builds(
    Aggregation,
    kind=st.sampled_from(["topk_mean", "smoothed_max"]),
    k=st.sampled_from([1, 3, 5, 99]),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(make_bundle(tmp_path_factory.mktemp("b") / "head"))


@pytest.fixture(scope="module")
def model(bundle):
    return load_model(bundle)


@pytest.fixture(scope="module")
def prepared(bundle, tmp_path_factory):
    return prepare(
        volume_of(head_series(16), bundle.manifest, tmp_path_factory.mktemp("d")), bundle
    )


def given_logits(prepared, any_=-5.0, left=-5.0, rare=-5.0, peaks=()):
    made = np.tile(np.float32([any_, left, rare]), (len(prepared.inputs), 1))
    made += np.float32(0.001) * np.arange(len(made), dtype=np.float32)[:, None]
    for image, column, value in peaks:
        made[image, column] = value
    return made


@given(scores, ways)
def test_a_study_score_lies_within_its_images(values, how):
    made = aggregate(values, how)

    if how.kind == "noisy_or":
        assert made >= max(values) - 1e-6
    else:
        assert min(values) - 1e-6 <= made <= max(values) + 1e-6


@given(scores, ways, st.data())
def test_a_higher_image_never_lowers_the_study(values, how, data):
    raised = list(values)
    raised[data.draw(st.integers(0, len(values) - 1))] += data.draw(st.floats(0, 5))

    assert aggregate(raised, how) >= aggregate(values, how) - 1e-9


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=20))
def test_noisy_or_is_the_chance_of_at_least_one(values):
    none = math.prod(1 - RawScore(value).output for value in values)

    assert RawScore(aggregate(values, Aggregation(kind="noisy_or"))).output == pytest.approx(
        1 - none
    )


def test_neighbours_have_their_say_and_only_as_many_as_there_are():
    own, beside = np.array([1.0, 2.0, 4.0]), np.array([0.0, 3.0, 9.0])
    outputs = np.stack([own, beside], axis=1)

    assert in_context(outputs, 1)[:, 0].tolist() == [1 + 1.5, 2 + 4, 4 + 6]
    assert in_context(outputs[:1], 2).tolist() == [[1.0]]
    np.testing.assert_array_equal(in_context(outputs, 0), outputs.astype(np.float32))


def test_a_model_with_context_serves_the_whole_way(tmp_path):
    folder = with_context(make_bundle(tmp_path / "head"), context=2)
    bundle = load_bundle(folder)
    model = load_model(bundle)
    prepared = prepare(volume_of(head_series(16), bundle.manifest, tmp_path), bundle)
    outputs = logits(model, prepared.inputs)

    finding = make_finding(prepared, outputs, bundle, **WHEN)
    finding, maps = make_heatmaps(prepared, finding, bundle, model)

    n = len(bundle.manifest.labels)
    assert outputs.shape == (16, 2 * n)
    expected = outputs[5, 0] + outputs[3:8, n].mean()
    assert finding.image_logits["any"][5] == pytest.approx(float(expected), abs=1e-5)
    assert len(maps) == len(finding.key_images)
    check_reference(bundle, model)


def with_context(folder, *, context):
    """The bundle with a last layer of two numbers a label."""
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = torch.cat([weights[name], weights[name].flip(0)])
    save_file(weights, folder / "model.safetensors")
    reference = load_file(folder / "reference.safetensors")
    both = torch.cat([reference["logits"], reference["logits"].flip(1)], dim=1)
    save_file(reference | {"logits": both}, folder / "reference.safetensors")
    text = (folder / "manifest.toml").read_text()
    old = re.search(r'weights_sha256 = "(\w+)"', text)[1]
    new = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    text = text.replace(old, new).replace("[study]\n", f"[study]\ncontext = {context}\n")
    (folder / "manifest.toml").write_text(text)
    return folder


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "ranked", "k": 2, "weights": (1.0,)},
        {"kind": "ranked", "k": 2, "weights": (1.5, -0.5)},
        {"kind": "ranked", "k": 2, "weights": (0.0, 1.0)},
        {"kind": "max", "weights": (1.0,)},
    ],
)
def test_weights_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="weight"):
        Aggregation(**wrong)


def test_aggregations_by_hand():
    values = [0.0, 4.0, 1.0, 2.0, 2.0, 3.0]

    assert aggregate(values, Aggregation(kind="max")) == 4.0
    assert aggregate(values, Aggregation(kind="topk_mean", k=2)) == 3.5
    assert aggregate(values, Aggregation(kind="smoothed_max", k=3)) == 2.5
    ranked = Aggregation(kind="ranked", k=2, weights=(0.75, 0.25))
    assert aggregate(values, ranked) == 0.75 * 4.0 + 0.25 * 3.0
    assert aggregate([2.0], ranked) == 2.0  # the lowest stands for those that are not there


def test_a_negative_study_has_no_key_images_and_no_urgency(prepared, bundle):
    finding = make_finding(prepared, given_logits(prepared), bundle, **WHEN)

    assert not finding.is_positive
    assert finding.key_images == ()
    assert finding.urgency is Urgency.ROUTINE
    assert finding.model.calibration_id == bundle.calibration_id


def test_key_images_are_the_highest_raw_scores_in_order(prepared, bundle):
    peaks = [(2, 0, 3.0), (9, 0, 5.0), (5, 0, 4.0), (12, 0, 2.0)]

    finding = make_finding(prepared, given_logits(prepared, peaks=peaks), bundle, **WHEN)

    assert [key.image for key in finding.key_images] == [2, 5, 9]
    assert finding.labels[0].top_image == 9
    assert finding.labels[0].raw.logit == pytest.approx(4.5)
    assert finding.urgency is Urgency.STAT
    assert finding.image_logits["any"][5] == 4.0


def test_what_a_present_part_implies_is_present(prepared, bundle):
    finding = make_finding(
        prepared, given_logits(prepared, left=2.0, peaks=[(3, 1, 6.0)]), bundle, **WHEN
    )

    whole, part, _ = finding.labels
    assert whole.probability.reference == part.probability.reference
    assert whole.is_present
    assert whole.raw.logit < 0


def test_an_exploratory_label_has_no_probability_and_no_urgency(prepared, bundle):
    finding = make_finding(prepared, given_logits(prepared, rare=9.0), bundle, **WHEN)

    assert finding.labels[2].probability is None
    assert finding.labels[2].is_present is None
    assert not finding.is_positive
    assert finding.urgency is Urgency.ROUTINE


def test_a_tenants_threshold_and_prevalence_are_its_own(prepared, bundle):
    made = given_logits(prepared, any_=-0.3)

    plain = make_finding(prepared, made, bundle, **WHEN)
    lower = make_finding(prepared, made, bundle, thresholds={"head.any": 0.3}, **WHEN)
    rare = make_finding(prepared, made, bundle, prevalence={"head.any": 0.02}, **WHEN)
    other = make_finding(prepared, made, bundle, thresholds={"chest.any": 0.3}, **WHEN)

    assert not plain.is_positive
    assert lower.is_positive
    assert lower.urgency is Urgency.URGENT
    assert rare.labels[0].probability.value < 0.05
    assert rare.labels[0].probability.reference == plain.labels[0].probability.reference
    assert other == plain


def test_logits_that_are_none_are_refused(prepared, bundle):
    made = given_logits(prepared)
    made[3, 1] = np.nan

    with pytest.raises(BadOutput):
        make_finding(prepared, made, bundle, **WHEN)
    with pytest.raises(BadOutput):
        make_finding(prepared, given_logits(prepared)[:-1], bundle, **WHEN)


def test_a_hole_makes_the_result_partial(bundle, tmp_path):
    series = head_series(16)
    del series[8]

    holed = prepare(volume_of(series, bundle.manifest, tmp_path), bundle)

    finding = make_finding(holed, given_logits(holed), bundle, **WHEN)
    assert finding.is_partial
    assert "missing" in finding.notes[0]


def test_a_thin_series_gives_every_image_its_slabs_score(bundle, tmp_path):
    thin = [ct_slice(pixels, z=1.25 * i, SliceThickness=1.25) for i, pixels in enumerate(head(56))]
    slabs = prepare(volume_of(thin, bundle.manifest, tmp_path), bundle)

    finding = make_finding(slabs, given_logits(slabs, peaks=[(5, 0, 9.0)]), bundle, **WHEN)

    assert len(slabs.inputs) == 14
    assert len(finding.images) == 56
    assert finding.image_logits["any"][20:24] == (9.0,) * 4
    assert finding.key_images[0].image == 22
    assert "averaged to 14" in finding.notes[0]


def test_the_whole_way_ends_in_a_finding_that_survives_json(bundle, model, tmp_path):
    volume = volume_of(head_series(16), bundle.manifest, tmp_path)

    finding, maps = predict(volume, bundle, model, thresholds={"head.any": 0.05}, **WHEN)

    assert finding.is_positive
    assert len(maps) == len(finding.key_images) == 3
    assert all(cam.shape == (128, 128) and cam.dtype == np.float32 for cam in maps)
    assert finding.map_scale == max(float(cam.max()) for cam in maps)
    assert finding.shows_regions
    assert any(key.region for key in finding.key_images)
    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding


def test_regions_are_drawn_only_if_the_pointing_game_beats_both_controls(bundle, model, prepared):
    explain = replace(bundle.manifest.explain, pointing_game_brightest=0.5)
    weaker = replace(bundle, manifest=replace(bundle.manifest, explain=explain))
    positive = given_logits(prepared, peaks=[(7, 0, 5.0), (8, 0, 4.0), (9, 0, 6.0)])

    finding, _ = make_heatmaps(
        prepared, make_finding(prepared, positive, weaker, **WHEN), weaker, model
    )

    assert not finding.shows_regions
    assert all(key.region is None for key in finding.key_images)
    assert finding.map_scale > 0


def test_raw_maps_are_the_librarys_before_it_stretches_them(model, prepared):
    inputs = prepared.inputs[6:9]

    raw = heatmap.grad_cam(model, "conv_head", inputs, [{0: 1.0}] * 3)

    tensor = torch.from_numpy(inputs).requires_grad_(True)
    with torch.enable_grad(), GradCAM(model=model, target_layers=[model.conv_head]) as cam:
        stretched = cam(tensor, [ClassifierOutputTarget(0)] * 3)
    assert raw.shape == (3, 2, 2)
    assert raw.max() != pytest.approx(1.0, abs=1e-3)
    for ours, theirs in zip(raw, stretched, strict=True):
        assert np.unravel_index(ours.argmax(), ours.shape) == tuple(
            int(i >= 32) for i in np.unravel_index(theirs.argmax(), theirs.shape)
        )


def test_raw_maps_follow_the_definition(model, prepared):
    """ReLU of the activations, weighted by the mean gradient of the label's logit."""
    kept = {}
    hook = model.conv_head.register_forward_hook(lambda m, i, out: kept.update(out=out))
    with torch.enable_grad():
        tensor = torch.from_numpy(prepared.inputs[7:8]).requires_grad_(True)
        score = model(tensor)[0, 1]
        (gradient,) = torch.autograd.grad(score, kept["out"])
    hook.remove()
    expected = torch.relu((gradient.mean((2, 3), keepdim=True) * kept["out"]).sum(1))[0]

    raw = heatmap.grad_cam(model, "conv_head", prepared.inputs[7:8], [{1: 1.0}])

    np.testing.assert_allclose(raw[0], expected.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert np.isfinite(logits(model, prepared.inputs)).all()  # and the model serves on


def test_a_layer_that_is_not_there_is_named(model, prepared):
    with pytest.raises(BundleError, match="no module 'no_layer'"):
        heatmap.grad_cam(model, "no_layer", prepared.inputs[:1], [{0: 1.0}])


@pytest.mark.parametrize("cosines", [[1, 0, 0, 0, 1, 0], [0, 1, 0, -1, 0, 0], [-1, 0, 0, 0, -1, 0]])
def test_a_map_goes_back_to_where_the_model_looked(bundle, tmp_path, cosines):
    """The inverse of turning, cutting and resizing, tried with a bright spot at a known place."""
    pixels = np.full((6, 128, 128), -1000, np.int16)
    pixels[:, 20:110, 10:90] = 30
    pixels[:, 80:88, 60:68] = 95
    series = [
        ct_slice(image, z=5.0 * i, ImageOrientationPatient=[float(x) for x in cosines])
        for i, image in enumerate(pixels)
    ]
    seen = prepare(volume_of(series, bundle.manifest, tmp_path), bundle).seen
    spot = np.clip(seen.inputs[3, 2], 1.0, None) - 1.0

    back = heatmap.to_source(spot, seen, 3)

    rows, columns = np.nonzero(back > back.max() / 2)
    assert back.shape == (128, 128)
    assert abs(rows.mean() - 83.5) < 1.0
    assert abs(columns.mean() - 63.5) < 1.0


def test_a_region_is_the_blob_round_the_peak():
    cam = np.zeros((10, 12), np.float32)
    cam[2:4, 5:9] = 0.6
    cam[3, 6] = 1.0
    cam[8, 1] = 0.9

    assert heatmap.region(cam) == Region(5.0, 2.0, 9.0, 4.0)
    assert heatmap.region(np.zeros((4, 4), np.float32)) is None
