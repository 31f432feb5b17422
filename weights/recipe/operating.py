"""What a threshold makes of labelled studies, and what its calls are worth elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from weights.recipe.figures import predictive_values, share, with_interval, with_intervals

Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]
Interval = dict[str, float]

#: Shares of positive studies at which predictive values are told; a hospital's lies among them.
PREVALENCES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.10, 0.20)

#: Where this share of patients bleeds, most of what is called STAT must be true, or none is.
STAT_PREVALENCE, STAT_PPV = 0.05, 0.5


def is_worth_stat(point: Mapping[str, Any]) -> bool:
    """Whether an operating point may call a radiologist away from what else waits.

    point : as `operating_point` makes it
    """
    return stat_ppv(point) >= STAT_PPV


def stat_ppv(point: Mapping[str, Any]) -> float:
    """How many of its calls are true at `STAT_PREVALENCE`."""
    lines = {line["prevalence"]: line for line in point["predictive_values"]}
    return float(lines[STAT_PREVALENCE]["ppv"]["value"])


def exact_interval(flags: Bools) -> dict[str, float]:
    """The 95 % interval of a share of independent studies: `low`, `high`; NaN of none.

    C. Clopper, E. Pearson, The use of confidence or fiducial limits, Biometrika 1934.
    """
    if not len(flags):
        return {"low": float("nan"), "high": float("nan")}
    found = binomtest(int(flags.sum()), len(flags)).proportion_ci(0.95, "exact")
    return {"low": round(float(found.low), 4), "high": round(float(found.high), 4)}


def sensitivity(present: Bools, truth: Bools, groups: Sequence[Rows], *, seed: int) -> Interval:
    """{value, low, high}; exact where each patient is one study, else over patients."""
    found = with_interval(lambda rows: share(present[rows][truth[rows]]), groups, seed=seed)
    if len(groups) == len(truth):
        found |= exact_interval(present[truth])
    return found


def operating_point(
    present: Bools,
    truth: Bools,
    groups: Sequence[Rows],
    *,
    prevalences: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """Sensitivity and specificity, and what a call is worth at several prevalences.

    Intervals rest on the same draws of patients: those of PPV and NPV keep whatever sensitivity
    and specificity have to do with each other. Where each patient is one study, sensitivity and
    specificity have exact intervals instead: draws say nothing where no study is missed.

    Returns
    -------
    `sensitivity`, `specificity`: {value, low, high}; `confusion`: [[true positives, false
    negatives], [false positives, true negatives]]; `predictive_values`: one {prevalence, ppv, npv}
    a prevalence, ascending.
    """
    ordered = sorted(set(prevalences))

    def figures(rows: Rows) -> dict[str, float]:
        called, true = present[rows], truth[rows]
        on, off = share(called[true]), share(~called[~true])
        made = {"sensitivity": on, "specificity": off}
        for at in ordered:
            made[f"ppv {at}"], made[f"npv {at}"] = predictive_values(on, off, at)
        return made

    found = with_intervals(figures, groups, seed=seed)
    if len(groups) == len(truth):
        found["sensitivity"] |= exact_interval(present[truth])
        found["specificity"] |= exact_interval(~present[~truth])
    return {
        "sensitivity": found["sensitivity"],
        "specificity": found["specificity"],
        "confusion": [
            [int((present & truth).sum()), int((~present & truth).sum())],
            [int((present & ~truth).sum()), int((~present & ~truth).sum())],
        ],
        "predictive_values": [
            {"prevalence": round(at, 4), "ppv": found[f"ppv {at}"], "npv": found[f"npv {at}"]}
            for at in ordered
        ],
    }
