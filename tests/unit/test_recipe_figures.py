"""Figures of merit against numbers worked by hand, and against calibrations known to be perfect."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from weights.recipe.figures import (
    calibration_figures,
    calibration_in_the_large,
    ece,
    ece_if_perfect,
    known,
    predictive_values,
    recalibration,
    reliability,
    with_interval,
    with_intervals,
)
from weights.recipe.operating import is_worth_stat, operating_point, stat_ppv

shares = st.floats(0.01, 0.99)


def perfect(n, seed=0):
    rng = np.random.default_rng(seed)
    probability = expit(rng.normal(-0.5, 1.5, n))
    return probability, rng.random(n) < probability


def alone(n):
    return [np.array([i]) for i in range(n)]


def test_ece_by_hand():
    """Two bins: 0.1, 0.3 with one positive of two; 0.6, 0.8 with two of two."""
    probability = np.array([0.8, 0.1, 0.6, 0.3])
    truth = np.array([True, False, True, True])

    assert ece(probability, truth, bins=2) == pytest.approx((abs(0.2 - 0.5) + abs(0.7 - 1)) / 2)


def test_bins_hold_equally_many_and_their_n_is_told():
    probability, truth = perfect(82)

    bins = reliability(probability, truth)

    assert [one["n"] for one in bins] == [17, 17, 16, 16, 16]
    weighted = sum(one["n"] * abs(one["predicted"] - one["observed"]) for one in bins) / 82
    assert ece(probability, truth) == pytest.approx(weighted, abs=1e-4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=1))
def test_equal_probabilities_are_never_parted_by_their_place_in_the_table(some):
    probability, truth = (np.array(part) for part in zip(*some, strict=True))
    order = np.random.default_rng(0).permutation(len(some))

    assert ece(probability, truth) == pytest.approx(ece(probability[order], truth[order]))
    assert sum(one["n"] for one in reliability(probability, truth)) == len(some)


def test_a_perfect_model_lies_in_the_range_of_perfect_models_as_often_as_it_should():
    inside = 0
    for seed in range(60):
        probability, truth = perfect(82, seed)
        found = ece_if_perfect(probability, seed=0, draws=400)
        inside += found["low"] <= ece(probability, truth) <= found["high"]

    assert 52 <= inside <= 60  # 95 % of 60 is 57


def test_an_overconfident_model_lies_outside_it():
    probability, truth = perfect(400)
    too_sure = expit(3 * logit(probability))

    found = ece_if_perfect(too_sure, seed=0)

    assert ece(too_sure, truth) > found["high"]
    assert found["low"] < found["mean"] < found["high"]


def test_what_perfection_shows_shrinks_with_n_as_its_root():
    small, large = (ece_if_perfect(perfect(n)[0], seed=0)["mean"] for n in (100, 10_000))

    assert small / large == pytest.approx(10, rel=0.15)


def test_what_perfection_shows_is_the_same_for_the_same_seed():
    probability, _ = perfect(82)

    assert ece_if_perfect(probability, seed=3) == ece_if_perfect(probability, seed=3)
    assert ece_if_perfect(probability, seed=3) != ece_if_perfect(probability, seed=4)


def test_cox_finds_the_distortion_that_was_made():
    probability, truth = perfect(40_000)
    distorted = expit((logit(probability) - 0.4) / 0.7)  # so that 0.7 z + 0.4 puts it right

    slope, intercept = recalibration(distorted, truth)

    assert slope == pytest.approx(0.7, abs=0.03)
    assert intercept == pytest.approx(0.4, abs=0.04)


def test_the_two_intercepts_are_two_questions():
    """Twice too sure round a half: right on average, and right in the large, but not at slope 1."""
    rng = np.random.default_rng(0)
    z = rng.normal(1, 1, 40_000)
    truth = rng.random(len(z)) < expit(0.5 * z)

    slope, intercept = recalibration(expit(z), truth)

    assert slope == pytest.approx(0.5, abs=0.04)
    assert intercept == pytest.approx(0, abs=0.05)
    assert calibration_in_the_large(expit(z), truth) < -0.3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_cox_agrees_with_scikit_learn(seed, spread):
    rng = np.random.default_rng(seed)
    z = rng.normal(1, spread, 60)
    probability, truth = expit(z), rng.random(60) < expit(1.5 * (z - 1) / spread)
    model = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky")
    model.fit((z - 1)[:, None] / spread, truth)
    wanted = model.coef_[0, 0] / spread

    slope, intercept = recalibration(probability, truth)

    if abs(wanted) < 50:
        assert slope == pytest.approx(wanted, rel=1e-5)
        assert intercept == pytest.approx(model.intercept_[0] - wanted, rel=1e-5, abs=1e-5)
    else:
        assert slope == 50


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1 - 1e-6), st.booleans()), min_size=2, max_size=30))
def test_cox_ends_for_any_studies(some):
    probability, truth = (np.array(part) for part in zip(*some, strict=True))

    slope, _ = recalibration(probability, truth)

    assert math.isnan(slope) or abs(slope) <= 50


def test_parted_classes_end_at_the_bound_and_one_class_says_nothing():
    probability = np.array([0.1, 0.2, 0.7, 0.8])

    assert recalibration(probability, probability > 0.5)[0] == 50
    assert recalibration(probability, probability < 0.5)[0] == -50
    assert all(map(math.isnan, recalibration(probability, np.ones(4, np.bool_))))
    assert all(map(math.isnan, recalibration(np.full(4, 0.5), probability > 0.5)))
    assert math.isnan(calibration_in_the_large(probability, np.zeros(4, np.bool_)))


def test_one_function_gives_every_figure_of_calibration():
    probability, truth = perfect(120)

    made = calibration_figures(probability, truth, alone(120), seed=0)

    for name in ("brier", "log_loss", "calibration_slope", "calibration_intercept",
                 "calibration_in_the_large"):  # fmt: skip
        assert made[name]["low"] <= made[name]["value"] <= made[name]["high"]
    assert made["calibration_slope"]["low"] < 1 < made["calibration_slope"]["high"]
    assert made["ece"]["value"] == pytest.approx(ece(probability, truth), abs=1e-4)
    assert set(made["ece_if_perfect"]) == {"mean", "low", "high"}
    assert len(made["reliability"]) == 5
    json.dumps(made, allow_nan=False)


def test_of_one_class_alone_it_gives_nulls_once_made_known():
    probability, _ = perfect(10)

    made = known(calibration_figures(probability, np.ones(10, np.bool_), alone(10), seed=0))

    assert made["calibration_slope"] == {"value": None, "low": None, "high": None}
    assert made["brier"]["value"] is not None
    json.dumps(made, allow_nan=False)


def test_intervals_are_drawn_over_patients():
    """Ten patients of fifty alike studies: the interval is that of ten, not of five hundred."""
    truth = np.repeat(np.arange(10) < 5, 50)
    probability = np.full(500, 0.5) + 0.1 * truth
    by_patient = list(np.arange(500).reshape(10, 50))

    patients = calibration_figures(probability, truth, by_patient, seed=0)[
        "calibration_in_the_large"
    ]
    studies = calibration_figures(probability, truth, alone(500), seed=0)[
        "calibration_in_the_large"
    ]

    assert patients["high"] - patients["low"] > 3 * (studies["high"] - studies["low"])


def test_several_figures_have_the_intervals_each_would_have_alone():
    values = np.random.default_rng(0).normal(size=50)
    figures = {"mean": lambda r: values[r].mean(), "top": lambda r: values[r].max()}

    both = with_intervals(
        lambda r: {name: one(r) for name, one in figures.items()}, alone(50), seed=1
    )

    assert both == {name: with_interval(one, alone(50), seed=1) for name, one in figures.items()}


def test_predictive_values_by_hand():
    """Of 1000 studies 80 positive, 72 found; of 920 negatives 184 called."""
    ppv, npv = predictive_values(0.9, 0.8, 0.08)

    assert ppv == pytest.approx(72 / (72 + 184))
    assert npv == pytest.approx(736 / (736 + 8))


@given(shares, shares, shares, shares)
def test_ppv_rises_and_npv_falls_with_prevalence(sensitivity, specificity, one, other):
    low, high = sorted((one, other))

    rare, common = (predictive_values(sensitivity, specificity, at) for at in (low, high))

    assert rare[0] <= common[0] + 1e-12
    assert rare[1] >= common[1] - 1e-12


def test_a_test_that_never_calls_has_no_ppv():
    ppv, npv = predictive_values(0.0, 1.0, 0.1)

    assert math.isnan(ppv)
    assert npv == pytest.approx(0.9)


def test_an_operating_point_counts_and_tells_worth_at_each_prevalence():
    truth = np.arange(200) < 80
    present = (np.arange(200) % 10 != 0) == truth  # one in ten is called wrongly

    made = operating_point(present, truth, alone(200), prevalences=(0.2, 0.02, 0.2), seed=0)

    assert made["confusion"] == [[72, 8], [12, 108]]
    assert (made["sensitivity"]["value"], made["specificity"]["value"]) == (0.9, 0.9)
    assert [line["prevalence"] for line in made["predictive_values"]] == [0.02, 0.2]
    for line in made["predictive_values"]:
        wanted = predictive_values(0.9, 0.9, line["prevalence"])
        assert (line["ppv"]["value"], line["npv"]["value"]) == pytest.approx(wanted, abs=1e-4)
        for which in ("ppv", "npv"):
            assert line[which]["low"] < line[which]["value"] < line[which]["high"]


def test_at_the_samples_own_prevalence_worth_is_what_was_counted():
    probability, truth = perfect(300)
    present = probability >= 0.4

    made = operating_point(present, truth, alone(300), prevalences=(truth.mean(),), seed=0)

    (line,) = made["predictive_values"]
    assert line["ppv"]["value"] == pytest.approx(truth[present].mean(), abs=1e-4)
    assert line["npv"]["value"] == pytest.approx((~truth[~present]).mean(), abs=1e-4)


def test_where_no_study_is_missed_the_interval_still_has_a_width():
    truth = np.arange(60) < 20
    present = np.arange(60) < 21

    made = operating_point(present, truth, alone(60), prevalences=(0.1,), seed=0)

    # 20 of 20: 0.025 ** (1 / 20), as tables of Clopper and Pearson have it.
    assert made["sensitivity"] == {"value": 1.0, "low": pytest.approx(0.8316, abs=1e-4), "high": 1}
    assert made["specificity"]["low"] < 0.975 < made["specificity"]["high"] < 1


@pytest.mark.parametrize(("n_false", "is_worth"), [(1, True), (20, False)])
def test_stat_is_said_only_where_most_of_it_would_be_true(n_false, is_worth):
    """80 of 100 bleeds called; where 5 % bleed, 1 or 20 of 100 false calls make 0.81 or 0.17."""
    truth = np.arange(200) < 100
    present = np.concatenate([np.arange(100) < 80, np.arange(100) < n_false])

    point = operating_point(present, truth, alone(200), prevalences=(0.05,), seed=0)

    by_hand = 0.05 * 0.8 / (0.05 * 0.8 + 0.95 * n_false / 100)
    assert stat_ppv(point) == pytest.approx(by_hand, abs=1e-3)
    assert is_worth_stat(point) is is_worth
