"""The plain candidate: logistic regression on a frozen network's pooled features."""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types
from torch import nn

from inference.heatmap import grad_cam
from inference.manifest import EvidenceSpec
from weights.recipe.augment import PLAIN
from weights.recipe.backbone import Backbone
from weights.recipe.bank import Bank
from weights.recipe.candidates.candidate import Candidate, Explanation, Fit, Maps, Rows, Weights
from weights.recipe.examples import Examples
from weights.recipe.network import with_classifier
from weights.recipe.progress import Progress

Balance = Literal["none", "balanced"]

_MAX_ITERATIONS = 400


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Logistic regression on a frozen network's pooled features."""

    bank: Bank
    backbone: Backbone
    c: float  # the smaller, the stronger the penalty on standardised features
    balance: Balance

    @property
    def name(self) -> str:
        return f"linear {self.architecture} c={self.c:g} {self.balance}"

    @property
    def family(self) -> str:
        return f"linear {self.architecture}"

    @property
    def architecture(self) -> str:
        return self.backbone.architecture

    @property
    def needs(self) -> tuple[Candidate, ...]:
        return ()

    def prepare(self, progress: Progress) -> None:
        self.bank.features(PLAIN, progress)

    def fit(self, examples: Examples, rows: Rows, *, seed: int, given: tuple[Fit, ...]) -> Fit:
        features = np.asarray(self.bank.features(PLAIN), np.float32)
        head = fit_linear(features[rows], examples.labels[rows], self.c, self.balance)
        weights = {
            "weight": head.weight.astype(np.float32),
            "bias": head.bias.astype(np.float32),
        }
        return Fit(weights, head.logits(features))

    @property
    def pretrained(self) -> str:
        return f"{self.backbone.origin}; frozen"

    @property
    def words(self) -> str:
        return (
            f"The network is `{self.architecture}` with its ImageNet weights, frozen; one linear "
            "layer (logistic regression) was fitted on its pooled features."
        )

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        # The last feature maps, after their activation: there all methods but Grad-CAM++ are one,
        # and exact for a layer that is linear in their mean.
        return (Explanation("grad-cam", "bn2"), Explanation("grad-cam++", "bn2"))

    def maps(self, weights: Weights, rows: Rows, how: Explanation) -> Maps:
        network = self.network(weights, np.eye(len(weights["bias"])))
        inputs = self.bank.pictures.as_input(self.bank.pictures.unit(rows)).numpy()
        return grad_cam(network, how.layer, inputs, [{0: 1.0}] * len(rows), how.method)

    def untrained(self, weights: Weights, seed: int) -> Weights:
        rng = np.random.default_rng(seed)
        return {
            "weight": rng.normal(size=weights["weight"].shape).astype(np.float32),
            "bias": np.zeros_like(weights["bias"]),
        }

    def network(self, weights: Weights, mix: NDArray[np.float64]) -> nn.Module:
        return with_classifier(self.backbone, weights["weight"], weights["bias"], mix)

    @property
    def evidence(self) -> EvidenceSpec | None:
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear layer: (n, width) features -> (n, labels) logits."""

    weight: NDArray[np.float64]  # (labels, width)
    bias: NDArray[np.float64]  # (labels,)

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        made: NDArray[np.float64] = features.astype(np.float64) @ self.weight.T + self.bias
        return made


def fit_linear(
    features: NDArray[np.float32], labels: NDArray[np.bool_], c: float, balance: Balance
) -> Head:
    """Fit one logistic regression a label.

    features : shape (n, width)
    labels : shape (n, labels)
    c : the smaller, the stronger the penalty on standardised features
    """
    mean, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6] = 1.0  # a feature that never fires says nothing
    standard = ((features - mean) / scale).astype(np.float32)
    fitted = [_fit(standard, column, c, balance) for column in labels.T]
    # The standardisation is folded into the layer, so that the served model is a plain network.
    weight = np.stack([coefficients for coefficients, _ in fitted]) / scale
    bias = np.array([intercept for _, intercept in fitted]) - weight @ mean
    return Head(weight, bias)


def _fit(
    standard: NDArray[np.float32], label: NDArray[np.bool_], c: float, balance: Balance
) -> tuple[NDArray[np.float64], float]:
    if not label.any():  # a rare label may be missing among these patients
        return np.zeros(standard.shape[1]), float(np.log(0.5 / (len(label) + 0.5)))
    model = LogisticRegression(
        C=c,
        class_weight="balanced" if balance == "balanced" else None,
        max_iter=_MAX_ITERATIONS,
        tol=1e-4,
    )
    # One thread: on matrices this small a second one only waits (measured: 0.1 s, not 2 s).
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        # A fit that stops early is a little more regularised, no less valid: folds judge it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(standard, label)
    intercept = float(model.intercept_[0])
    if balance == "balanced":
        # Back from one half to the share of positives there is, so that the logits of all options,
        # and of all folds, lie on one scale. Without: pooled slice AUC 0.834 for 0.871.
        intercept += float(np.log(label.mean()) - np.log1p(-label.mean()))
    return model.coef_[0].astype(np.float64), intercept
