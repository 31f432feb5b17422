"""The one layer that is fitted: logistic regression on the frozen network's features."""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types

Balance = Literal["none", "balanced"]

_MAX_ITERATIONS = 400


@dataclass(frozen=True, slots=True)
class Options:
    """What is chosen inside the folds."""

    c: float  # the smaller, the stronger the penalty on standardised features
    balance: Balance  # balanced: positives and negatives weigh the same in all


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear layer: (n, width) features -> (n, labels) logits."""

    weight: NDArray[np.float64]  # (labels, width)
    bias: NDArray[np.float64]  # (labels,)

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        made: NDArray[np.float64] = features.astype(np.float64) @ self.weight.T + self.bias
        return made


def fit_head(features: NDArray[np.float32], labels: NDArray[np.bool_], options: Options) -> Head:
    """Fit one logistic regression a label.

    features : shape (n, width)
    labels : shape (n, labels)
    """
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
