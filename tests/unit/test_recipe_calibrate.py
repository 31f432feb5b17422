"""The four maps on data whose truth is known: which one wins, what it stores, where it must end."""

import json
import tomllib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit

from inference.calibration import CalibrationFile
from weights.recipe import calibrate
from weights.recipe.bundle_files import write_calibration
from weights.recipe.figures import brier

METHODS = ("identity", "temperature", "platt", "temperature+isotonic")


def drawn(n, chance, *, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, n)
    return logits, rng.random(n) < chance(logits), np.arange(n)


def bent(z):
    """Two steps, as a model that knows three kinds of study: rises, but no straight log-odds."""
    return 0.03 + 0.6 * expit(6 * (z + 1)) + 0.3 * expit(6 * (z - 2.5))


def test_isotonic_wins_on_a_bent_truth_and_beats_platt_on_fresh_studies():
    logits, truth, patients = drawn(950, bent, seed=0)
    assert truth.sum() >= 400

    chosen = calibrate.choose(logits, truth, patients, seed=0).calibration

    assert chosen.method == "temperature+isotonic"
    platt = calibrate.fit("platt", logits, truth, patients)
    fresh, fresh_truth, _ = drawn(20_000, bent, seed=1)
    ours, theirs = calibrate.apply(chosen, fresh), calibrate.apply(platt, fresh)
    assert brier(ours, fresh_truth) < brier(theirs, fresh_truth) - 0.005
    assert calibrate.log_loss(ours, fresh_truth) < calibrate.log_loss(theirs, fresh_truth) - 0.01


@pytest.mark.parametrize(
    ("chance", "expected"),
    [
        (lambda z: expit(0.6 * z - 1.2), {"platt"}),
        (lambda z: expit(z / 2.5), {"temperature", "platt"}),
    ],
)
def test_isotonic_never_wins_where_the_truth_is_logistic(chance, expected):
    for seed in range(3):
        logits, truth, patients = drawn(1200, chance, seed=seed)

        choice = calibrate.choose(logits, truth, patients, seed=0)

        assert "temperature+isotonic" in choice.log_losses
        assert choice.calibration.method in expected


def test_what_is_calibrated_already_is_mostly_left_alone():
    """Not always: a chance gain of another map over the noise of its fit is 1 in 6."""
    won = Counter()
    for seed in range(10):
        logits, truth, patients = drawn(600, expit, seed=seed)
        won[calibrate.choose(logits, truth, patients, seed=0).calibration.method] += 1

    assert won["identity"] >= 6
    assert won["temperature+isotonic"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_fits_agree_with_the_losses_minimised_directly(seed):
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=rng.choice([60, 82, 400]))
    logits = rng.normal(0, 2) + rng.choice([0.1, 1, 4]) * unit
    truth = rng.random(len(logits)) < expit(1.3 * unit + rng.normal(0, 0.7))
    sign, ends = np.where(truth, 1, -1), np.log([0.05, 50])
    n = np.array([(~truth).sum(), truth.sum()])
    target = np.where(truth, (n[1] + 1) / (n[1] + 2), 1 / (n[0] + 2))

    def platt_loss(x):
        z = x[0] * logits + x[1]
        error = expit(z) - target
        loss = -(target * log_expit(z) + (1 - target) * log_expit(-z)).sum()
        return loss, np.array([error @ logits, error.sum()])

    cold = minimize_scalar(
        lambda t: -log_expit(sign * logits / np.exp(t)).sum(), bounds=ends, method="bounded",
        options={"xatol": 1e-12},
    )  # fmt: skip
    line = minimize(
        platt_loss, [0.0, 0.0], jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-10}
    )

    temperature = calibrate.fit_temperature(logits, truth)
    slope, intercept = calibrate.fit_platt(logits, truth)

    np.testing.assert_allclose(
        expit(logits / temperature), expit(logits / np.exp(cold.x)), atol=1e-6
    )
    wanted = expit(line.x[0] * logits + line.x[1])
    np.testing.assert_allclose(expit(slope * logits + intercept), wanted, atol=1e-6)


studies = st.lists(
    st.tuples(st.floats(-30, 30, allow_subnormal=False), st.booleans()), min_size=2, max_size=40
).filter(lambda some: len({label for _, label in some}) == 2)


@settings(max_examples=200, deadline=None)
@given(studies, st.sampled_from(METHODS))
def test_every_fit_ends_and_keeps_the_order(some, method):
    """Without a warning, which would fail the test: separable, equal, falling or doubled alike."""
    logits, truth = (np.array(part) for part in zip(*some, strict=True))

    fitted = calibrate.fit(method, logits, truth, np.arange(len(logits)))

    probability = calibrate.apply(fitted, np.sort(logits))
    # What lies closer than this is one logit: a sigmoid of floats may err by its last digit.
    assert (np.diff(probability) >= -1e-15).all()
    lower, upper = fitted.clips(fitted.prevalence)
    assert (lower <= probability).all()
    assert (probability <= upper).all()


def test_separable_studies_reach_the_clips_and_no_further():
    logits, truth = np.array([-9.0, -5, -1, 1, 5, 9]), np.arange(6) >= 3

    temperature = calibrate.fit("temperature", logits, truth, np.arange(6))
    platt = calibrate.fit("platt", logits, truth, np.arange(6))

    assert temperature.temperature == 0.05
    assert 0 < platt.slope < 20
    assert calibrate.apply(temperature, logits)[[0, -1]] == pytest.approx([1 / 5, 1 - 1 / 5])


@pytest.mark.parametrize("logits", [np.zeros(8), np.full(8, 0.1), np.full(8, 0.1) + 1e-16])
def test_a_score_that_is_always_the_same_gives_the_prevalence(logits):
    truth = np.arange(8) < 2

    platt = calibrate.fit("platt", logits, truth, np.arange(8))

    # Platt's targets draw it towards a half: 3/4 of the 2 positives, 1/8 of the 6 negatives.
    assert calibrate.apply(platt, logits) == pytest.approx((2 * 3 / 4 + 6 / 8) / 8, abs=1e-6)
    isotonic = calibrate.fit("temperature+isotonic", logits, truth, np.arange(8))
    assert calibrate.apply(isotonic, logits) == pytest.approx(0.25, abs=0.01)


def test_scores_that_fall_where_the_truth_rises_are_flattened_not_turned():
    logits, truth = np.linspace(-3, 3, 100), np.arange(100) < 40

    platt = calibrate.fit("platt", logits, truth, np.arange(100))

    assert platt.slope == pytest.approx(1e-6)
    assert np.ptp(calibrate.apply(platt, logits)) < 1e-5
    assert calibrate.fit_temperature(logits, truth) == 50.0


def test_doubled_studies_change_no_map_but_platts_targets():
    logits, truth, _ = drawn(200, expit, seed=3)
    twice = np.concatenate([logits, logits]), np.concatenate([truth, truth])

    assert calibrate.fit_temperature(*twice) == pytest.approx(
        calibrate.fit_temperature(logits, truth), rel=1e-6
    )
    assert calibrate.fit_isotonic(*twice) == calibrate.fit_isotonic(logits, truth)


@pytest.mark.parametrize(
    ("logits", "truth", "patients", "words"),
    [
        ([0.0, np.nan, 1.0], [0, 1, 1], [0, 1, 2], "1 logits are not finite"),
        ([0.0, np.inf, 1.0], [0, 1, 1], [0, 1, 2], "1 logits are not finite"),
        ([0.0, 1.0], [1, 1], [0, 1], "one class alone"),
        ([], [], [], "one class alone"),
        ([0.0, 1.0], [1, 0], [0], "2 logits, 2 labels, 1 patients"),
        ([0.0, 1.0, 2.0], [1, 0, 0], [0, 1, 2], "1 positive and 2 negative patients"),
        ([0.0, 1.0, 2.0, 3.0], [1, 0, 0, 1], [0, 1, 2, 0], "1 positive and 2 negative patients"),
    ],
)
def test_what_cannot_be_fitted_is_said(logits, truth, patients, words):
    with pytest.raises(ValueError, match=words):
        calibrate.choose(
            np.array(logits), np.array(truth, np.bool_), np.array(patients, np.int64), seed=0
        )


def test_fewer_positives_than_folds_make_fewer_folds():
    rng = np.random.default_rng(0)
    truth = np.arange(40) < 3
    logits = rng.normal(size=40) + 3 * truth

    choice = calibrate.choose(logits, truth, np.arange(40), seed=0)

    assert all(np.isfinite(loss) for loss in choice.log_losses.values())
    assert choice.calibration.n_positive == 3


def test_prevalence_is_of_studies_and_counts_are_of_patients():
    """One patient came six times, always positive, and once more, negative."""
    truth = np.array([True] * 6 + [False] * 4)
    patients = np.array([0] * 6 + [0, 1, 2, 3])

    fitted = calibrate.fit("identity", np.zeros(10), truth, patients)

    assert fitted.prevalence == 0.6
    assert (fitted.n_positive, fitted.n_negative) == (1, 4)
    assert fitted.clips(0.6) == pytest.approx((1 / 6, 1 - 1 / 3))


def test_studies_of_one_patient_are_never_on_both_sides(monkeypatch):
    logits, truth, patients = drawn(300, expit, seed=5)
    patients = patients // 3
    seen, real = [], calibrate.fit

    def watched(method, z, y, who, **options):
        seen.append(set(who.tolist()))
        return real(method, z, y, who, **options)

    monkeypatch.setattr(calibrate, "fit", watched)
    calibrate.cross_fitted("platt", logits, truth, patients, seed=0)

    assert len(seen) == 5
    held_out = [set(range(100)) - fitted for fitted in seen]
    assert sum(map(len, held_out)) == 100  # each patient is left out once
    assert set().union(*held_out) == set(range(100))


@pytest.mark.parametrize("method", METHODS)
def test_the_stored_file_gives_the_same_probabilities_bit_for_bit(method, tmp_path):
    logits, truth, patients = drawn(500, bent, seed=7)
    fitted = calibrate.fit(method, logits, truth, patients, note='said "so"\\')

    write_calibration(tmp_path / "c.toml", {"any": fitted}, fitted_on="drawn: ü\n")

    as_the_node_reads = json.dumps(tomllib.loads((tmp_path / "c.toml").read_text("utf-8")))
    stored = TypeAdapter(CalibrationFile).validate_json(as_the_node_reads).labels["any"]
    assert stored == fitted
    fresh, _, _ = drawn(2000, bent, seed=8)
    for prevalence in (None, 0.06):
        ours = calibrate.apply(fitted, fresh, prevalence=prevalence, reference=0.44)
        theirs = calibrate.apply(stored, fresh, prevalence=prevalence, reference=0.44)
        assert ours.tobytes() == theirs.tobytes()
