"""Candidates side by side: each family through the whole recipe on the same folds."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from weights.recipe.figures import auc, brier, with_interval
from weights.recipe.nested import OutOfFold, Recipe
from weights.recipe.progress import Progress, silent

Rows = NDArray[np.int64]


def compared(recipe: Recipe, *, seed: int, progress: Progress = silent) -> list[dict[str, Any]]:
    """One entry a family: figures out of fold, and how they differ from the first family's.

    Differences are paired: both are judged on the same draws of patients.
    """
    families = list(dict.fromkeys(candidate.family for candidate in recipe.candidates))
    found = {name: recipe.only(name).out_of_fold(progress) for name in families}
    first = found[families[0]]
    return [
        {
            "family": name,
            **_figures(recipe, one, seed),
            "chosen": [chosen.candidate.name for chosen in one.chosen],
            **({} if one is first else _differences(recipe, one, first, seed)),
        }
        for name, one in found.items()
    ]


def _figures(recipe: Recipe, found: OutOfFold, seed: int) -> dict[str, Any]:
    truth, slices = recipe.examples.truth, recipe.examples.labels[:, 0]
    p, z = found.probability, found.logits[:, 0]
    groups, each = recipe.examples.groups, _each(recipe)
    return {
        "slice_auc": with_interval(lambda r: auc(z[r], slices[r]), groups, seed=seed),
        "patient_auc": with_interval(lambda r: auc(p[r], truth[r]), each, seed=seed),
        "brier": with_interval(lambda r: brier(p[r], truth[r]), each, seed=seed),
    }


def _differences(recipe: Recipe, one: OutOfFold, first: OutOfFold, seed: int) -> dict[str, Any]:
    truth, slices = recipe.examples.truth, recipe.examples.labels[:, 0]
    z, other = one.logits[:, 0], first.logits[:, 0]
    p, before = one.probability, first.probability

    def by_slice(rows: Rows) -> float:
        return auc(z[rows], slices[rows]) - auc(other[rows], slices[rows])

    def by_patient(rows: Rows) -> float:
        return auc(p[rows], truth[rows]) - auc(before[rows], truth[rows])

    return {
        "slice_auc_gain": with_interval(by_slice, recipe.examples.groups, seed=seed),
        "patient_auc_gain": with_interval(by_patient, _each(recipe), seed=seed),
    }


def _each(recipe: Recipe) -> list[Rows]:
    return [np.array([place]) for place in range(len(recipe.examples.groups))]
