"""Fits the map from study logits to probabilities: four candidates, judged on unseen patients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit
from sklearn.isotonic import IsotonicRegression
from sklearn.model_selection import StratifiedGroupKFold

from db.result import RawScore
from inference.calibration import LabelCalibration, calibrate

Method = Literal["identity", "temperature", "platt", "temperature+isotonic"]
Floats = NDArray[np.float64]

#: Fewer positive patients than this, and an isotonic map would fit their noise.
ISOTONIC_POSITIVES = 200

_TEMPERATURES = (0.05, 50.0)
_FOLDS = 5


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen map and how all candidates did."""

    calibration: LabelCalibration
    log_losses: Mapping[Method, float]  # cross-fitted, by method


def choose(
    logits: Floats, truth: NDArray[np.bool_], patients: NDArray[np.int64], *, seed: int
) -> Choice:
    """The map with the smallest cross-fitted log-loss; the simpler one where two are equal.

    logits : one a study, out of fold: from a model that never saw its patient
    """
    positives = len(np.unique(patients[truth]))
    methods: list[Method] = ["identity", "temperature", "platt"]
    note = f"isotonic not warranted: {positives} positive patients, {ISOTONIC_POSITIVES} needed"
    if positives >= ISOTONIC_POSITIVES:
        methods, note = [*methods, "temperature+isotonic"], ""
    losses = {m: cross_fitted_loss(m, logits, truth, patients, seed=seed) for m in methods}
    best = min(methods, key=lambda method: round(losses[method], 4))
    return Choice(fit(best, logits, truth, patients, note=note), losses)


def cross_fitted_loss(
    method: Method,
    logits: Floats,
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    *,
    seed: int,
) -> float:
    """Mean log-loss of studies whose patients had no part in the fit."""
    splitter = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    probability = np.empty(len(logits))
    for rest, held_out in splitter.split(logits, truth, patients):
        fitted = fit(method, logits[rest], truth[rest], patients[rest])
        probability[held_out] = apply(fitted, logits[held_out])
    return log_loss(probability, truth)


def fit(
    method: Method,
    logits: Floats,
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    *,
    note: str = "",
) -> LabelCalibration:
    """One map's numbers, with the prevalence and the counts its clips rest on."""
    made: dict[str, float | tuple[float, ...]] = {}
    if method in ("temperature", "temperature+isotonic"):
        made["temperature"] = fit_temperature(logits, truth)
    if method == "temperature+isotonic":
        x, y = fit_isotonic(logits / made["temperature"], truth)
        made |= {"isotonic_x": x, "isotonic_y": y}
    if method == "platt":
        made["slope"], made["intercept"] = fit_platt(logits, truth)
    return LabelCalibration(
        method=method,
        prevalence=float(truth.mean()),
        n_positive=len(np.unique(patients[truth])),
        n_negative=len(np.unique(patients[~truth])),
        note=note,
        **made,  # type: ignore[arg-type]  # each key is one of its number fields
    )


def fit_temperature(logits: Floats, truth: NDArray[np.bool_]) -> float:
    """The T for which sigmoid(z / T) has the smallest log-loss."""
    sign = np.where(truth, 1.0, -1.0)

    def loss(log_t: float) -> float:
        return float(-log_expit(sign * logits / np.exp(log_t)).mean())

    found = minimize_scalar(loss, bounds=tuple(np.log(_TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def fit_platt(logits: Floats, truth: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept, with Platt's own softened targets, so that separable data stay finite.

    J. Platt, Probabilistic outputs for support vector machines, 1999, section 2.2.
    """
    n_positive, n_negative = int(truth.sum()), int((~truth).sum())
    target = np.where(truth, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))

    def loss(x: Floats) -> tuple[float, Floats]:
        slope = np.exp(x[0])  # positive: calibration never turns the order round
        z = slope * logits + x[1]
        error = (expit(z) - target) / len(z)
        value = -(target * log_expit(z) + (1 - target) * log_expit(-z)).mean()
        return float(value), np.array([slope * (error @ logits), error.sum()])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B")
    return float(np.exp(found.x[0])), float(found.x[1])


def fit_isotonic(
    logits: Floats, truth: NDArray[np.bool_]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The corner points of the step-free isotonic curve: x ascends, y never falls."""
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(logits, truth)
    x, first = np.unique(model.X_thresholds_, return_index=True)
    y = np.maximum.accumulate(model.y_thresholds_[first])
    return tuple(map(float, x)), tuple(map(float, y))


def apply(
    calibration: LabelCalibration,
    logits: Floats,
    *,
    prevalence: float | None = None,
    reference: float | None = None,
) -> Floats:
    """Probabilities as the node gives them, clips included.

    prevalence : what they are shown at; None: that of the fitted data
    reference : show and clip at the label's reference prevalence instead
    """
    at = calibration.prevalence
    return np.array(
        [
            calibrate(
                RawScore(float(z)),
                calibration,
                reference_prevalence=reference or at,
                site_prevalence=prevalence,
            ).value
            for z in logits
        ]
    )


def log_loss(probability: Floats, truth: NDArray[np.bool_]) -> float:
    """Mean log-loss; probabilities are kept from 0 and 1 by the clips."""
    return float(-np.log(np.where(truth, probability, 1 - probability)).mean())
