"""Stored calibration numbers, applied; the four scales never get mixed up."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from db.result import CalibratedProbability, RawScore
from inference.calibration import LabelCalibration, calibrate, implied, log_odds, shift

FITTED = {"prevalence": 0.4, "n_positive": 40, "n_negative": 60}
logits = st.floats(-30, 30)
shares = st.floats(0.01, 0.99)


def calibrations() -> tuple[LabelCalibration, ...]:
    identity = LabelCalibration(method="identity", **FITTED)
    temperature = LabelCalibration(method="temperature", temperature=1.7, **FITTED)
    platt = LabelCalibration(method="platt", slope=0.8, intercept=-0.4, **FITTED)
    isotonic = LabelCalibration(
        method="temperature+isotonic",
        temperature=1.2,
        isotonic_x=(-2.0, 0.0, 0.5, 3.0),
        isotonic_y=(0.0, 0.3, 0.3, 1.0),
        **FITTED,
    )
    return identity, temperature, platt, isotonic


@given(st.sampled_from(calibrations()), logits, logits)
def test_every_map_keeps_the_order_of_raw_scores(calibration, one, other):
    low, high = sorted((one, other))

    assert calibration.probability(low) <= calibration.probability(high)


def test_the_maps_are_what_they_say():
    identity, temperature, platt, isotonic = calibrations()

    assert identity.probability(1.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert temperature.probability(1.7) == pytest.approx(1 / (1 + math.exp(-1)))
    assert platt.probability(2.0) == pytest.approx(1 / (1 + math.exp(-1.2)))
    assert isotonic.probability(-9 * 1.2) == 0.0
    assert isotonic.probability(0.25 * 1.2) == pytest.approx(0.3)
    assert isotonic.probability(1.75 * 1.2) == pytest.approx(0.65)


@given(logits)
def test_isotonic_agrees_with_scikit_learn(logit):
    x, y = np.array([-2, -1, 0, 1, 2.0]), np.array([0.1, 0.05, 0.4, 0.35, 0.9])
    fitted = IsotonicRegression(out_of_bounds="clip").fit(x, y)
    ours = LabelCalibration(
        method="temperature+isotonic",
        temperature=1.0,
        isotonic_x=tuple(fitted.X_thresholds_.tolist()),
        isotonic_y=tuple(fitted.y_thresholds_.tolist()),
        **FITTED,
    )

    assert ours.probability(logit) == pytest.approx(float(fitted.predict([logit])[0]), abs=1e-9)


@given(st.sampled_from(calibrations()), logits, shares, st.none() | shares)
def test_a_probability_stays_within_what_the_data_can_support(calibration, logit, reference, site):
    made = calibrate(
        RawScore(logit), calibration, reference_prevalence=reference, site_prevalence=site
    )

    assert made.lower_clip <= made.value <= made.upper_clip
    lower, upper = calibration.clips(reference)
    assert lower <= made.reference <= upper
    assert made.prevalence == (site if site is not None else reference)


@given(st.sampled_from(calibrations()), logits, shares, shares, shares)
def test_presence_never_changes_with_a_sites_prevalence(calibration, logit, reference, one, other):
    made = [
        calibrate(RawScore(logit), calibration, reference_prevalence=reference, site_prevalence=p)
        for p in (one, other)
    ]

    assert made[0].reference == made[1].reference


@given(shares, shares, shares)
def test_a_shift_can_be_undone(probability, one, other):
    assert shift(shift(probability, one, other), other, one) == pytest.approx(probability)


@given(shares, shares, shares, shares)
def test_shifts_compose(probability, one, other, third):
    by_way = shift(shift(probability, one, other), other, third)

    assert by_way == pytest.approx(shift(probability, one, third), rel=1e-9)


@given(shares, shares, shares)
def test_a_shift_moves_log_odds_by_the_difference_of_the_prevalences(probability, one, other):
    moved = log_odds(shift(probability, one, other)) - log_odds(probability)

    assert moved == pytest.approx(log_odds(other) - log_odds(one), abs=1e-9)


@given(shares, shares)
def test_the_prevalence_itself_becomes_the_other_prevalence(one, other):
    assert shift(one, one, other) == pytest.approx(other)


@given(shares, shares, shares, shares)
def test_a_shift_keeps_the_order(one, other, prevalence, to):
    low, high = sorted((one, other))

    assert shift(low, prevalence, to) <= shift(high, prevalence, to) + 1e-15


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_certainty_stays_finite_and_on_its_side(probability):
    assert abs(shift(probability, 0.4, 0.04) - probability) < 1e-9


@given(st.sampled_from(calibrations()), logits, shares, shares, shares)
def test_the_side_of_a_threshold_is_the_same_at_every_prevalence(
    calibration, logit, reference, one, other
):
    """Shown probabilities move; what is compared does not, nor does their order with a threshold
    that is moved along."""
    threshold = 0.3618
    shown = [
        calibrate(RawScore(logit), calibration, reference_prevalence=reference, site_prevalence=p)
        for p in (None, one, other)
    ]

    assert len({made.reference >= threshold for made in shown}) == 1
    for made in shown:
        moved = shift(threshold, reference, made.prevalence)
        if abs(made.value - moved) > 1e-9:
            assert (made.value >= moved) == (made.reference >= threshold)


@given(st.sampled_from(calibrations()), logits, logits, shares, st.none() | shares)
def test_what_is_shown_keeps_the_order_of_raw_scores(calibration, one, other, reference, site):
    """Through all four steps; within the last digit of a float."""
    low, high = (
        calibrate(RawScore(z), calibration, reference_prevalence=reference, site_prevalence=site)
        for z in sorted((one, other))
    )

    assert low.reference <= high.reference + 1e-15
    assert low.value <= high.value + 1e-15


@given(st.sampled_from(calibrations()), shares, st.none() | shares)
def test_far_scores_reach_the_clips(calibration, reference, site):
    far = [
        calibrate(RawScore(z), calibration, reference_prevalence=reference, site_prevalence=site)
        for z in (-1000.0, 1000.0)
    ]

    assert far[0].value == pytest.approx(far[0].lower_clip, rel=1e-12)
    assert far[1].value == pytest.approx(far[1].upper_clip, rel=1e-12)
    assert (far[0].reference, far[1].reference) == calibration.clips(reference)


def test_a_lower_prevalence_lowers_the_shown_probability_as_bayes_says():
    made = calibrate(
        RawScore(0.0), calibrations()[0], reference_prevalence=0.4, site_prevalence=0.04
    )

    odds = 1.0 * (0.04 / 0.96) / (0.4 / 0.6)
    assert made.value == pytest.approx(odds / (1 + odds))
    assert made.reference == pytest.approx(0.5)


def test_clips_at_the_fitted_prevalence_follow_the_counts():
    lower, upper = calibrations()[0].clips(0.4)

    assert (lower, upper) == (1 / 62, 1 - 1 / 42)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "temperature"},
        {"method": "identity", "temperature": 1.0},
        {"method": "temperature", "temperature": -1.0},
        {"method": "temperature", "temperature": math.nan},
        {"method": "platt", "slope": -1.0, "intercept": 0.0},
        {
            "method": "temperature+isotonic",
            "temperature": 1.0,
            "isotonic_x": (1.0, 0.0),
            "isotonic_y": (0.0, 1.0),
        },
        {
            "method": "temperature+isotonic",
            "temperature": 1.0,
            "isotonic_x": (0.0, 1.0),
            "isotonic_y": (1.0, 0.0),
        },
    ],
)
def test_numbers_that_are_no_calibration_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must|takes"):
        LabelCalibration(**wrong, **FITTED)


def chance(value: float) -> CalibratedProbability:
    return CalibratedProbability(value, 0.4, value, 0.01, 0.99)


@given(shares, shares, shares)
def test_what_is_implied_is_at_least_as_probable_through_chains(whole, part, piece):
    chances = {"whole": chance(whole), "part": chance(part), "piece": chance(piece)}

    implies = {"whole": (), "part": ("whole",), "piece": ("part",)}
    made = implied(chances, implies, dict.fromkeys(implies, 0.4))

    assert made["whole"].reference == max(whole, part, piece)
    assert made["part"].reference == max(part, piece)
    assert made["part"].value == pytest.approx(min(max(part, piece, 0.01), 0.99))
    assert made["piece"] == chances["piece"]


def test_what_is_implied_is_shown_at_its_own_prevalence():
    rare = CalibratedProbability(0.05, 0.05, 0.3, 0.001, 0.9)

    made = implied(
        {"whole": rare, "part": chance(0.5)}, {"whole": (), "part": ("whole",)},
        {"whole": 0.4, "part": 0.4},
    )  # fmt: skip

    assert made["whole"].reference == 0.5
    assert made["whole"].value == pytest.approx(shift(0.5, 0.4, 0.05))
    assert made["whole"].prevalence == 0.05
