"""Figures of merit, each with an interval over patients."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import expit, log_expit, logit
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

BOOTSTRAPS = 2000
_INTERVAL = (2.5, 97.5)  # percent


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
    return float(np.mean((probability - truth) ** 2))


def calibration_slope(probability: Floats, truth: Bools) -> float:
    """1: as sure as it should be; under 1: too sure. Cox's logistic recalibration."""
    z = logit(probability)
    sign = np.where(truth, 1.0, -1.0)

    def loss(x: Floats) -> float:
        return float(-log_expit(sign * (x[0] * z + x[1])).mean())

    return float(minimize(loss, np.array([1.0, 0.0]), method="BFGS", options={"gtol": 1e-5}).x[0])


def calibration_in_the_large(probability: Floats, truth: Bools) -> float:
    """The log-odds by which the mean probability lies off; 0 is right, over 0 is too low."""
    z, wanted = logit(probability), truth.mean()
    if wanted in (0.0, 1.0):
        return float("nan")
    return float(brentq(lambda by: expit(z + by).mean() - wanted, -20.0, 20.0))


def with_interval(
    figure: Callable[[NDArray[np.int64]], float],
    groups: Sequence[NDArray[np.int64]],
    *,
    seed: int,
    bootstraps: int = BOOTSTRAPS,
) -> dict[str, float]:
    """A figure and its 95 % interval, patients drawn with replacement.

    figure : rows -> value; NaN where a draw does not allow it
    groups : the rows of each patient
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(bootstraps):
        some = rng.integers(len(groups), size=len(groups))
        drawn.append(figure(np.concatenate([groups[i] for i in some])))
    found = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.percentile(found, _INTERVAL) if len(found) else (np.nan, np.nan)
    value = figure(np.concatenate(list(groups)))
    return {"value": _short(value), "low": _short(low), "high": _short(high)}


def reliability(probability: Floats, truth: Bools, bins: int = 5) -> list[Mapping[str, float]]:
    """Mean probability against the observed share, in bins of equally many studies."""
    order = np.argsort(probability, kind="stable")
    return [
        {
            "n": len(part),
            "predicted": _short(probability[part].mean()),
            "observed": _short(truth[part].mean()),
        }
        for part in np.array_split(order, bins)
    ]


def _short(value: float) -> float:
    return round(float(value), 4)
