"""A learnt way from images to a study: weights for its highest logit, its second highest, ..."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.model_selection import StratifiedKFold

from inference.manifest import Aggregation
from inference.predict import aggregate

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RANKS = 5  # images that have a say
_PENALTY = 0.02  # on how far weights are from equal ones: studies are few
_FOLDS = 5


def fit_ranked(studies: Sequence[Floats], truth: Bools) -> Aggregation:
    """Weights, none below 0, sum 1, by the log-loss of the weighted logit through a sigmoid.

    studies : the logits of each study's images
    """
    top = np.stack([_highest(logits) for logits in studies])

    def loss(parameters: Floats) -> float:
        weights, (slope, intercept) = _softmax(parameters[:RANKS]), parameters[RANKS:]
        chance = np.clip(expit(slope * (top @ weights) + intercept), 1e-6, 1 - 1e-6)
        found = -np.mean(np.where(truth, np.log(chance), np.log1p(-chance)))
        return float(found + _PENALTY * np.sum(parameters[:RANKS] ** 2))

    start = np.concatenate([np.zeros(RANKS), [1.0, 0.0]])
    found = minimize(loss, start, method="L-BFGS-B")
    weights = np.round(_softmax(found.x[:RANKS]), 3)
    return Aggregation(kind="ranked", k=RANKS, weights=tuple(float(w) for w in weights))


def cross_fitted(studies: Sequence[Floats], truth: Bools, *, seed: int) -> Floats:
    """One logit a study, by weights that were fitted without it."""
    folds = min(_FOLDS, int(truth.sum()), int((~truth).sum()))
    made = np.empty(len(studies))
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for rest, held_out in splitter.split(truth, truth):
        how = fit_ranked([studies[i] for i in rest], truth[rest])
        made[held_out] = [aggregate(studies[i], how) for i in held_out]
    return made


def _highest(logits: Floats) -> Floats:
    """(RANKS,), falling; of fewer images the lowest counts for those that are not there."""
    ranked = np.sort(logits)[::-1][:RANKS]
    return np.pad(ranked, (0, RANKS - len(ranked)), mode="edge")


def _softmax(values: Floats) -> Floats:
    raised = np.exp(values - values.max())
    made: Floats = raised / raised.sum()
    return made
