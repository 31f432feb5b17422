"""The whole recipe on some patients, and the same repeated in outer folds to say how good it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from inference.calibration import LabelCalibration
from inference.manifest import Aggregation
from inference.predict import aggregate
from weights.recipe import calibrate
from weights.recipe.data import Cohort
from weights.recipe.features import Progress, silent
from weights.recipe.figures import auc
from weights.recipe.folds import patient_folds
from weights.recipe.head import Balance, Head, Options, fit_head

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

_BALANCES: tuple[Balance, ...] = ("none", "balanced")
_CONTEXTS = (0, 1, 2)
OPTIONS = tuple(
    Options(c, balance, context)
    for c, balance, context in product((3e-4, 1e-3, 3e-3), _BALANCES, _CONTEXTS)
)
AGGREGATIONS = (
    Aggregation(kind="max"),
    Aggregation(kind="topk_mean", k=3),
    Aggregation(kind="topk_mean", k=5),
    Aggregation(kind="noisy_or"),
    Aggregation(kind="smoothed_max", k=3),
    Aggregation(kind="smoothed_max", k=5),
)

#: What a threshold must keep, of the positives or the negatives it is chosen on.
HIGH_SENSITIVITY = 0.95
HIGH_SPECIFICITY = 0.90
OPERATING_POINTS = ("high sensitivity", "balanced", "high specificity")

_INNER_FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Features and labels of some slices, with the rows of each patient."""

    features: NDArray[np.float32]  # (slices, width)
    labels: Bools  # (slices, labels)
    groups: tuple[Rows, ...]  # one entry a patient

    @classmethod
    def of(cls, cohort: Cohort, features: NDArray[np.float32]) -> "Examples":
        return cls(features, cohort.labels, tuple(rows for _, rows in cohort.by_patient()))

    @property
    def any_patient(self) -> Bools:
        """Whether each patient has a positive slice, by the first label."""
        return np.array([self.labels[rows, 0].any() for rows in self.groups])

    def only(self, patients: Sequence[int] | Rows) -> "Examples":
        """The slices of these patients (places in `groups`), and nothing of the others."""
        chosen = [self.groups[i] for i in patients]
        rows = np.concatenate(chosen)
        ends = np.cumsum([len(group) for group in chosen])
        groups = tuple(np.arange(end - len(g), end) for g, end in zip(chosen, ends, strict=True))
        return Examples(self.features[rows], self.labels[rows], groups)


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """All that the recipe makes of some patients."""

    head: Head
    options: Options
    aggregation: Aggregation
    choice: calibrate.Choice
    thresholds: Mapping[str, float]  # by operating point, on the scale of the calibration
    logits: Floats  # (slices,) of the first label, out of the inner folds
    study_logits: Floats  # (patients,), those logits aggregated

    @property
    def calibration(self) -> LabelCalibration:
        return self.choice.calibration


@dataclass(frozen=True, slots=True, eq=False)
class OutOfFold:
    """What the outer folds say of patients they did not see; patients in the cohort's order."""

    folds: NDArray[np.int64]  # (patients,)
    fitted: tuple[Fitted, ...]  # one a fold
    logits: Floats  # (slices, labels)
    study_logits: Floats  # (patients,)
    probability: Floats  # (patients,), calibrated
    present: Mapping[str, Bools]  # (patients,) by operating point


def fit_recipe(examples: Examples, *, seed: int) -> Fitted:
    """Choose, fit, calibrate and set thresholds, with nothing but these patients.

    Every choice is made on inner folds by patient; the head is then fitted on all of them.
    """
    truth = examples.any_patient
    options, logits = _best_options(examples, seed=seed)
    aggregation, choice = _best_aggregation(examples, logits, seed=seed)
    study = study_logits(logits, examples.groups, aggregation)
    probability = calibrate.apply(choice.calibration, study)
    return Fitted(
        head=fit_head(examples.features, examples.labels, examples.groups, options),
        options=options,
        aggregation=aggregation,
        choice=choice,
        thresholds=thresholds(probability, truth),
        logits=logits,
        study_logits=study,
    )


def out_of_fold(
    examples: Examples, *, folds: int, seed: int, progress: Progress = silent
) -> OutOfFold:
    """Each outer fold repeats the whole recipe on its training patients and judges the others."""
    number = patient_folds(examples.any_patient, folds, seed)
    logits = np.empty(examples.labels.shape)
    study, probability = np.empty(len(number)), np.empty(len(number))
    present = {name: np.empty(len(number), np.bool_) for name in OPERATING_POINTS}
    fitted = []
    for fold in range(folds):
        progress("outer folds", fold, folds)
        made = fit_recipe(examples.only(np.flatnonzero(number != fold)), seed=seed)
        held_out = np.flatnonzero(number == fold)
        rows = np.concatenate([examples.groups[i] for i in held_out])
        unseen = examples.only(held_out)
        logits[rows] = made.head.logits(unseen.features, unseen.groups)
        groups = [examples.groups[i] for i in held_out]
        study[held_out] = study_logits(logits[:, 0], groups, made.aggregation)
        probability[held_out] = calibrate.apply(made.calibration, study[held_out])
        for name, threshold in made.thresholds.items():
            present[name][held_out] = probability[held_out] >= threshold
        fitted.append(made)
    progress("outer folds", folds, folds)
    return OutOfFold(number, tuple(fitted), logits, study, probability, present)


def study_logits(logits: Floats, groups: Sequence[Rows], how: Aggregation) -> Floats:
    """(slices,) -> one logit a patient."""
    return np.array([aggregate(logits[rows], how) for rows in groups])


def thresholds(probability: Floats, truth: Bools) -> dict[str, float]:
    """The three operating points, each halfway between two studies' probabilities.

    high sensitivity: the highest that still finds its share of the positives. high specificity: the
    lowest that clears its share of the negatives. balanced: the largest sum of both (Youden).

    Raises
    ------
    ValueError
        If all probabilities are one: no threshold parts them.
    """
    levels = np.unique(probability)
    if len(levels) < 2:
        raise ValueError("every study has the same probability: no threshold parts them")
    cuts = (levels[1:] + levels[:-1]) / 2
    sensitivity = np.array([(probability[truth] >= cut).mean() for cut in cuts])
    specificity = np.array([(probability[~truth] < cut).mean() for cut in cuts])
    sensitive = cuts[sensitivity >= HIGH_SENSITIVITY]
    specific = cuts[specificity >= HIGH_SPECIFICITY]
    return {
        "high sensitivity": float(sensitive.max() if len(sensitive) else cuts[0]),
        "balanced": float(cuts[np.argmax(sensitivity + specificity)]),
        "high specificity": float(specific.min() if len(specific) else cuts[-1]),
    }


def _best_options(examples: Examples, *, seed: int) -> tuple[Options, Floats]:
    """By out-of-fold slice AUC, which slices enough carry; with those logits."""
    tried = {options: _inner_logits(examples, options, seed=seed) for options in OPTIONS}
    best = max(tried, key=lambda options: auc(tried[options], examples.labels[:, 0]))
    return best, tried[best]


def _inner_logits(examples: Examples, options: Options, *, seed: int) -> Floats:
    """(slices,) of the first label, each from a head that did not see its patient."""
    logits = np.empty(len(examples.labels))
    number = patient_folds(examples.any_patient, _INNER_FOLDS, seed)
    for fold in range(_INNER_FOLDS):
        seen = examples.only(np.flatnonzero(number != fold))
        unseen = examples.only(np.flatnonzero(number == fold))
        head = fit_head(seen.features, seen.labels[:, :1], seen.groups, options)
        rows = np.concatenate([examples.groups[i] for i in np.flatnonzero(number == fold)])
        logits[rows] = head.logits(unseen.features, unseen.groups)[:, 0]
    return logits


def _best_aggregation(
    examples: Examples, logits: Floats, *, seed: int
) -> tuple[Aggregation, calibrate.Choice]:
    """By the cross-fitted log-loss of the best calibration each one allows."""
    truth, patients = examples.any_patient, np.arange(len(examples.groups))
    tried = {
        how: calibrate.choose(
            study_logits(logits, examples.groups, how), truth, patients, seed=seed
        )
        for how in AGGREGATIONS
    }
    best = min(tried, key=lambda how: min(tried[how].log_losses.values()))
    return best, tried[best]
