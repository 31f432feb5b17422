"""Fits the map from study logits to probabilities: four candidates, judged on unseen patients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from db.result import RawScore
from inference.calibration import LabelCalibration, calibrate

Method = Literal["identity", "temperature", "platt", "temperature+isotonic"]
Floats = NDArray[np.float64]

#: Fewer positive patients than this, and an isotonic map would fit their noise.
ISOTONIC_POSITIVES = 200

_TEMPERATURES = (0.05, 50.0)
_FLATTEST = 1e-6  # Platt's slope where scores do not rise with the truth: a constant, in effect
_NO_SPREAD = 1e-9  # standard deviation of logits that are all the same
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

    Raises
    ------
    ValueError
        If a logit is not finite, the lengths differ, or fewer than two patients have a positive
        or a negative study.
    """
    _check(logits, truth, patients)
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
    return log_loss(cross_fitted(method, logits, truth, patients, seed=seed), truth)


def cross_fitted(
    method: Method,
    logits: Floats,
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    *,
    seed: int,
    prevalence: float | None = None,
) -> Floats:
    """Each study's probability by a map that was fitted without its patient.

    prevalence : what they are shown at; None: each fold's own

    Raises
    ------
    ValueError
        As `choose`.
    """
    _check(logits, truth, patients)
    kinds = [len(np.unique(patients[truth == kind])) for kind in (True, False)]
    if min(kinds) < 2:
        raise ValueError(f"{kinds[0]} positive and {kinds[1]} negative patients: 2 of each needed")
    splitter = StratifiedGroupKFold(min(_FOLDS, *kinds), shuffle=True, random_state=seed)
    probability = np.empty(len(logits))
    for rest, held_out in splitter.split(logits, truth, patients):
        fitted = fit(method, logits[rest], truth[rest], patients[rest])
        probability[held_out] = apply(fitted, logits[held_out], prevalence=prevalence)
    return probability


def fit(
    method: Method,
    logits: Floats,
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    *,
    note: str = "",
) -> LabelCalibration:
    """One map's numbers, with the prevalence and the counts its clips rest on.

    The prevalence is the share of positive studies, since it is studies that get a probability; the
    counts are of patients, since two studies of one patient are not two patients' worth of proof.

    Raises
    ------
    ValueError
        If a logit is not finite, the lengths differ, or one class is missing.
    """
    _check(logits, truth, patients)
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
    """The T within 0.05..50 for which sigmoid(z / T) has the smallest log-loss.

    A logistic regression without intercept, whose one coefficient is 1 / T. The loss is convex in
    it, so its slope at the two ends says whether the smallest lies between them; beyond them are
    separable data (no end to the coefficient) and scores that fall where the truth rises.
    """
    margin = np.where(truth, logits, -logits)
    coldest, warmest = _TEMPERATURES

    def cooling_gains(t: float) -> float:
        return float((margin * expit(-margin / t)).mean())

    if cooling_gains(warmest) <= 0:
        return warmest
    if cooling_gains(coldest) >= 0:
        return coldest
    scale = float(np.sqrt(np.mean(logits**2)))
    coefficient, _ = _regression(logits / scale, truth.astype(float), has_intercept=False)
    return float(np.clip(scale / coefficient, coldest, warmest))


def fit_platt(logits: Floats, truth: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept, with Platt's own softened targets, so that separable data stay finite.

    J. Platt, Probabilistic outputs for support vector machines, 1999, section 2.2. The slope is
    positive: where the best one is not, the map is as good as constant.
    """
    n_positive, n_negative = int(truth.sum()), int((~truth).sum())
    target = np.where(truth, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    centre, scale = float(logits.mean()), float(logits.std())
    # Only the class means decide the sign: the targets have two values.
    rises = logits[truth].mean() > logits[~truth].mean() and scale > _NO_SPREAD
    slope = 0.0
    if rises:
        coefficient, intercept = _regression((logits - centre) / scale, target)
        slope = coefficient / scale
    if slope <= _FLATTEST:
        return _FLATTEST, float(logit(target.mean())) - _FLATTEST * centre
    return slope, intercept - slope * centre


def _regression(x: Floats, target: Floats, *, has_intercept: bool = True) -> tuple[float, float]:
    """Coefficient and intercept, unpenalised; x near unit spread; targets within 0..1.

    A target between 0 and 1 is two studies in one: a positive of that weight, a negative of the
    rest, since scikit-learn takes classes only.
    """
    model = LogisticRegression(
        C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000, fit_intercept=has_intercept
    )
    twice, classes = np.concatenate([x, x])[:, None], np.repeat([1, 0], len(x))
    model.fit(twice, classes, sample_weight=np.concatenate([target, 1 - target]))
    return float(model.coef_[0, 0]), float(model.intercept_[0] if has_intercept else 0.0)


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


def _check(logits: Floats, truth: NDArray[np.bool_], patients: NDArray[np.int64]) -> None:
    if not len(logits) == len(truth) == len(patients):
        raise ValueError(f"{len(logits)} logits, {len(truth)} labels, {len(patients)} patients")
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).sum())} logits are not finite")
    if not truth.any() or truth.all():
        raise ValueError("studies of one class alone: nothing to calibrate against")
