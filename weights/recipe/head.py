"""The one layer that is fitted: logistic regression on the frozen network's features.

With context an image is judged by its own features and by the mean over its neighbourhood.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types

from inference.predict import in_context, neighbourhood

Balance = Literal["none", "balanced"]

_MAX_ITERATIONS = 400

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Options:
    """What is chosen inside the folds."""

    c: float  # the smaller, the stronger the penalty on standardised features
    balance: Balance  # balanced: positives and negatives weigh the same in all
    context: int = 0  # images on each side that have a say


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear layer: (n, width) features -> (n, outputs), as the served model gives them."""

    weight: NDArray[np.float64]  # (outputs, width)
    bias: NDArray[np.float64]  # (outputs,)
    context: int = 0

    def logits(self, features: NDArray[np.float32], groups: Sequence[Rows]) -> NDArray[np.float64]:
        """(n, labels); `groups` are the rows of each patient, in order along the normal."""
        outputs = features.astype(np.float64) @ self.weight.T + self.bias
        if not self.context:
            return outputs
        made = np.empty((len(features), len(self.bias) // 2))
        for rows in groups:
            made[rows] = in_context(outputs[rows], self.context)
        return made


def fit_head(
    features: NDArray[np.float32],
    labels: NDArray[np.bool_],
    groups: Sequence[Rows],
    options: Options,
) -> Head:
    """Fit one logistic regression a label.

    features : shape (n, width)
    labels : shape (n, labels)
    groups : the rows of each patient, in order along the normal
    """
    if not options.context:
        return _plain(features, labels, options)
    beside = neighbourhood_means(features, groups, options.context)
    both = _plain(np.concatenate([features, beside], axis=1), labels, options)
    own, mean = np.split(both.weight, 2, axis=1)
    # The bias goes with the image's own say: the mean of the neighbourhood's would be the same.
    bias = np.concatenate([both.bias, np.zeros_like(both.bias)])
    return Head(np.concatenate([own, mean]), bias, options.context)


def neighbourhood_means(
    features: NDArray[np.float32], groups: Sequence[Rows], context: int
) -> NDArray[np.float32]:
    """(n, width): of each image and its neighbours of the same patient, the mean."""
    means = np.empty_like(features)
    for rows in groups:
        mine = features[rows]
        for place, row in enumerate(rows):
            means[row] = mine[neighbourhood(place, len(rows), context)].mean(axis=0)
    return means


def _plain(features: NDArray[np.float32], labels: NDArray[np.bool_], options: Options) -> Head:
    mean, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6] = 1.0  # a feature that never fires says nothing
    standard = ((features - mean) / scale).astype(np.float32)
    fitted = [_fit(standard, column, options) for column in labels.T]
    # The standardisation is folded into the layer, so that the served model is a plain network.
    weight = np.stack([coefficients for coefficients, _ in fitted]) / scale
    bias = np.array([intercept for _, intercept in fitted]) - weight @ mean
    return Head(weight, bias)


def _fit(
    standard: NDArray[np.float32], label: NDArray[np.bool_], options: Options
) -> tuple[NDArray[np.float64], float]:
    model = LogisticRegression(
        C=options.c,
        class_weight="balanced" if options.balance == "balanced" else None,
        max_iter=_MAX_ITERATIONS,
        tol=1e-4,
    )
    # One thread: on matrices this small a second one only waits (measured: 0.1 s, not 2 s).
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        # A fit that stops early is a little more regularised, no less valid: folds judge it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(standard, label)
    intercept = float(model.intercept_[0])
    if options.balance == "balanced":
        # Back from one half to the share of positives there is, so that the logits of all options,
        # and of all folds, lie on one scale. Without: pooled slice AUC 0.834 for 0.871.
        intercept += float(np.log(label.mean()) - np.log1p(-label.mean()))
    return model.coef_[0].astype(np.float64), intercept
