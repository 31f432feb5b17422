"""Figures of merit, each with an interval over patients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import rankdata

from weights.recipe.calibrate import log_loss

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

BOOTSTRAPS = 2000
SLOW_BOOTSTRAPS = 500  # where each draw is a fit

_INTERVAL = (2.5, 97.5)  # percent
_BINS = 5
_PERFECT_DRAWS = 2000
_FARTHEST = 50.0  # bound of slopes and shifts of log-odds
_NEWTON_STEPS, _CLOSE = 200, 1e-9


def auc(score: Floats, truth: Bools) -> float:
    """Area under the ROC curve, ties counted half; NaN where one class is missing."""
    n_positive, n_negative = int(truth.sum()), int((~truth).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = rankdata(score)
    above = ranks[truth].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))


def share(flags: Bools) -> float:
    """The mean; NaN of nothing."""
    return float(flags.mean()) if len(flags) else float("nan")


def brier(probability: Floats, truth: Bools) -> float:
    """0..1"""
    return float(np.mean((probability - truth) ** 2))


def recalibration(probability: Floats, truth: Bools) -> tuple[float, float]:
    """Slope and intercept of the truth's log-odds on the probability's, fitted jointly.

    D. R. Cox, Two further applications of a model for binary regression, Biometrika 45, 1958. 1 and
    0 are right; a slope under 1 is too sure. The intercept belongs to this slope: what Van Calster
    et al. call the calibration intercept has the slope fixed at 1 and is
    `calibration_in_the_large` here.

    Parameters
    ----------
    probability : within 0..1, the ends excluded

    Returns
    -------
    The slope within -50..50, which classes that can be parted reach; their intercept is NaN. Both
    are NaN where one class is missing or all probabilities are the same.
    """
    if not truth.any() or truth.all() or np.ptp(probability) == 0:
        return float("nan"), float("nan")
    z = logit(probability)
    on, off = z[truth], z[~truth]
    if on.min() >= off.max() or on.max() <= off.min():  # the likelihood has no maximum
        return (_FARTHEST if on.max() > off.min() else -_FARTHEST), float("nan")
    centre, scale = z.mean(), z.std()
    slope, intercept = _newton((z - centre) / scale, truth)
    slope /= scale
    return float(np.clip(slope, -_FARTHEST, _FARTHEST)), float(intercept - slope * centre)


def _newton(x: Floats, truth: Bools) -> tuple[float, float]:
    """Slope and intercept of a logistic regression on one score of unit spread.

    By hand: a library's fit takes 2 ms, and 60 ms where its threads wait for each other on a busy
    machine; an interval needs 500. Long steps are cut: they overshoot to where all weights are 0.
    """
    slope, intercept = 0.0, float(logit(truth.mean()))
    for _ in range(_NEWTON_STEPS):
        p = expit(slope * x + intercept)
        off, weight = truth - p, p * (1 - p)
        h00, h01, h11 = weight.sum(), (weight * x).sum(), (weight * x * x).sum()
        g0, g1, det = off.sum(), (off * x).sum(), h00 * h11 - h01 * h01
        steps = (g1 * h00 - g0 * h01) / det, (g0 * h11 - g1 * h01) / det
        damp = 1 / max(1.0, *(abs(step) for step in steps))
        slope, intercept = slope + damp * steps[0], intercept + damp * steps[1]
        if max(map(abs, steps)) < _CLOSE:
            break
    return slope, intercept


def calibration_slope(probability: Floats, truth: Bools) -> float:
    """1: as sure as it should be; under 1: too sure. See `recalibration`."""
    return recalibration(probability, truth)[0]


def calibration_in_the_large(probability: Floats, truth: Bools) -> float:
    """The log-odds by which the mean probability lies off; 0 is right, over 0 is too low.

    The intercept of Cox's model with the slope fixed at 1, by maximum likelihood: B. Van Calster et
    al., A calibration hierarchy for risk models, J Clin Epidemiol 74, 2016; Calibration: the
    Achilles heel of predictive analytics, BMC Medicine 17:230, 2019. NaN where one class is
    missing.
    """
    z, wanted = logit(probability), truth.mean()
    if wanted in (0.0, 1.0):
        return float("nan")
    return float(brentq(lambda by: expit(z + by).mean() - wanted, -_FARTHEST, _FARTHEST))


def ece(probability: Floats, truth: Bools, bins: int = _BINS) -> float:
    """Expected calibration error: mean distance of probability and observed share, over bins.

    Bins of equally many studies, weighted by their number; equal probabilities share a bin. Never
    0 by chance: read it beside `ece_if_perfect`.
    """
    parts = _equal_mass(probability, bins)
    gaps = [abs(float(probability[part].mean() - truth[part].mean())) for part in parts]
    return float(np.average(gaps, weights=[len(part) for part in parts]))


def ece_if_perfect(
    probability: Floats, bins: int = _BINS, *, seed: int, draws: int = _PERFECT_DRAWS
) -> dict[str, float]:
    """The ECE that these very probabilities would have if they were true, at this n.

    Truth is drawn from the probabilities, study by study: consistency resampling, J. Bröcker and
    L. A. Smith, Increasing the reliability of reliability diagrams, Weather and Forecasting 22,
    2007. Mean, and the range of 95 % of the draws. Studies of one patient are drawn apart, so with
    many of them the range is too narrow.
    """
    parts = _equal_mass(probability, bins)
    p = probability[np.concatenate(parts)]
    sizes = np.array([len(part) for part in parts])
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(seed)
    drawn = np.empty(draws)
    for i in range(draws):
        off = np.add.reduceat(p - (rng.random(len(p)) < p), starts)  # (bins,), in studies
        drawn[i] = np.abs(off).sum() / len(p)
    low, high = np.percentile(drawn, _INTERVAL)
    return {"mean": _short(drawn.mean()), "low": _short(low), "high": _short(high)}


def reliability(probability: Floats, truth: Bools, bins: int = _BINS) -> list[Mapping[str, float]]:
    """Mean probability against the observed share, in the bins of `ece`."""
    return [
        {
            "n": len(part),
            "predicted": _short(probability[part].mean()),
            "observed": _short(truth[part].mean()),
        }
        for part in _equal_mass(probability, bins)
    ]


def calibration_figures(
    probability: Floats, truth: Bools, groups: Sequence[Rows], *, seed: int
) -> dict[str, Any]:
    """How far probabilities can be believed: every figure of calibration, by its name.

    Parameters
    ----------
    probability : (studies,), within 0..1, the ends excluded
    truth : (studies,)
    groups : the rows of each patient, who are drawn together

    Returns
    -------
    `brier`, `log_loss`, `calibration_slope`, `calibration_intercept` (of that slope),
    `calibration_in_the_large` and `ece`: each {value, low, high}, NaN where one class is missing.
    `ece_if_perfect`: {mean, low, high}. `reliability`: one {n, predicted, observed} a bin.
    The interval of `ece` leans upwards: drawing patients twice adds to every gap.
    """
    p, y = probability, truth

    def fitted(rows: Rows) -> dict[str, float]:
        slope, intercept = recalibration(p[rows], y[rows])
        return {
            "calibration_slope": slope,
            "calibration_intercept": intercept,
            "calibration_in_the_large": calibration_in_the_large(p[rows], y[rows]),
        }

    def counted(rows: Rows) -> dict[str, float]:
        some, true = p[rows], y[rows]
        return {
            "brier": brier(some, true),
            "log_loss": log_loss(some, true),
            "ece": ece(some, true),
        }

    return {
        **with_intervals(counted, groups, seed=seed),
        **with_intervals(fitted, groups, seed=seed, bootstraps=SLOW_BOOTSTRAPS),
        "ece_if_perfect": ece_if_perfect(p, seed=seed),
        "reliability": reliability(p, y),
    }


def predictive_values(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float, float]:
    """PPV and NPV by Bayes' rule; NaN where nothing is called that way.

    Sensitivity and specificity are taken to be those of the other prevalence, too, which holds
    while patients of each kind are as ill as these were.
    """
    true_positive, false_negative = prevalence * sensitivity, prevalence * (1 - sensitivity)
    true_negative = (1 - prevalence) * specificity
    false_positive = (1 - prevalence) * (1 - specificity)
    return (
        _ratio(true_positive, true_positive + false_positive),
        _ratio(true_negative, true_negative + false_negative),
    )


def with_interval(
    figure: Callable[[Rows], float],
    groups: Sequence[Rows],
    *,
    seed: int,
    bootstraps: int = BOOTSTRAPS,
) -> dict[str, float]:
    """A figure and its 95 % interval, patients drawn with replacement.

    figure : rows -> value; NaN where a draw does not allow it
    groups : the rows of each patient
    """
    made = with_intervals(
        lambda rows: {"it": figure(rows)}, groups, seed=seed, bootstraps=bootstraps
    )
    return made["it"]


def with_intervals(
    figures: Callable[[Rows], Mapping[str, float]],
    groups: Sequence[Rows],
    *,
    seed: int,
    bootstraps: int = BOOTSTRAPS,
) -> dict[str, dict[str, float]]:
    """Several figures by name, as `with_interval`, all from the same draws."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate(list(groups))
    is_single = len(rows) == len(groups)  # a study each: no list of arrays a draw
    values = figures(rows)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(bootstraps):
        some = rng.integers(len(groups), size=len(groups))
        again = rows[some] if is_single else np.concatenate([groups[i] for i in some])
        for name, value in figures(again).items():
            drawn[name].append(value)
    return {name: _interval(values[name], drawn[name]) for name in values}


def known(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same with null for what cannot be said, however deep it stands: JSON has no NaN."""
    return {name: _known(value) for name, value in figures.items()}


def _known(value: Any) -> Any:
    if isinstance(value, Mapping):
        return known(value)
    if isinstance(value, list):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _interval(value: float, drawn: Sequence[float]) -> dict[str, float]:
    found = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.percentile(found, _INTERVAL) if len(found) else (np.nan, np.nan)
    return {"value": _short(value), "low": _short(low), "high": _short(high)}


def _equal_mass(probability: Floats, bins: int) -> list[Rows]:
    """The rows of each bin, equally many as far as ties allow; no bin is empty.

    A bin begins at a value, not at a place: rows of one probability are never parted by their
    order in the table.
    """
    ranked = np.sort(probability)
    sizes = [len(part) for part in np.array_split(ranked, bins)]
    starts = np.cumsum(sizes)[:-1]
    edges = ranked[starts[starts < len(ranked)]]
    number = np.searchsorted(edges, probability, side="right")
    return [np.flatnonzero(number == one) for one in np.unique(number)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def _short(value: float) -> float:
    return round(float(value), 4)
