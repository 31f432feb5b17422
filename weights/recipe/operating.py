"""What a threshold makes of labelled studies, and what its calls are worth elsewhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weights.recipe.figures import predictive_values, share, with_intervals

Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

#: Shares of positive studies at which predictive values are told; a hospital's lies among them.
PREVALENCES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.10, 0.20)


def operating_point(
    present: Bools,
    truth: Bools,
    groups: Sequence[Rows],
    *,
    prevalences: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """Sensitivity and specificity, and what a call is worth at several prevalences.

    Every interval rests on the same draws of patients: those of PPV and NPV keep whatever
    sensitivity and specificity have to do with each other.

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
