"""The whole recipe on some patients, and the same repeated in outer folds to say how good it is.

What is fitted stands in `fits`; here is what is chosen from it, each time by patients that neither
the fit nor the judgement has for its own: candidate, smoothing, aggregation, calibration,
thresholds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.calibration import LabelCalibration
from inference.manifest import Aggregation
from inference.predict import aggregate, in_context
from weights.recipe import calibrate
from weights.recipe.candidates.candidate import Candidate, Fit
from weights.recipe.examples import ALL, Examples, Split
from weights.recipe.figures import auc
from weights.recipe.fits import Fits
from weights.recipe.progress import Progress, silent
from weights.recipe.ranked import cross_fitted, fit_ranked

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

AGGREGATIONS = (
    Aggregation(kind="max"),
    Aggregation(kind="topk_mean", k=3),
    Aggregation(kind="topk_mean", k=5),
    Aggregation(kind="smoothed_max", k=3),
    Aggregation(kind="smoothed_max", k=5),
)
#: Told beside them, never chosen: it grows with the number of slices, so a series that overlaps, or
#: is cut thinner, would look sicker than it is.
NOISY_OR = Aggregation(kind="noisy_or")

#: What a threshold must keep, of the positives or the negatives it is chosen on.
HIGH_SENSITIVITY = 0.95
HIGH_SPECIFICITY = 0.90
OPERATING_POINTS = ("high sensitivity", "balanced", "high specificity")

#: Of so many draws of patients, this share must say that a family is better than the default one.
_DRAWS, _BEATEN = 500, 0.95


@dataclass(frozen=True, slots=True)
class Smoothing:
    """How far a slice's neighbours have a say in its logits."""

    context: int  # slices on each side
    share: float  # 0..1, of the neighbourhood's mean

    def apply(self, logits: Floats, groups: Sequence[Rows]) -> Floats:
        """(slices, labels) -> the same; `groups` are the rows of each patient, in order."""
        made, mix = np.array(logits, np.float64), self.mix(logits.shape[1])
        for rows in groups if self.context else ():
            made[rows] = in_context(logits[rows] @ mix.T, self.context)
        return made

    def mix(self, labels: int) -> Floats:
        """(outputs, labels): what the served network makes of its labels' logits."""
        same = np.eye(labels)
        if not self.context:
            return same
        return np.concatenate([(1 - self.share) * same, self.share * same])

    def __str__(self) -> str:
        return f"{self.share:g} of {self.context} each side" if self.context else "none"


SMOOTHINGS = (
    Smoothing(0, 0.0),
    Smoothing(1, 0.5),
    Smoothing(1, 0.75),
    Smoothing(2, 0.5),
    Smoothing(2, 0.75),
    Smoothing(3, 0.75),
)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """All that the recipe makes of the patients outside a split."""

    candidate: Candidate
    fit: Fit
    smoothing: Smoothing
    aggregation: Aggregation
    choice: calibrate.Choice
    thresholds: Mapping[str, float]  # by operating point, on the scale of the calibration
    patients: Rows  # places of those it was made of
    logits: Floats  # (slices,) of the first label, out of the inner folds; NaN of the others
    study_logits: Floats  # one entry for each of `patients`, those logits aggregated
    slice_aucs: Mapping[str, float]  # by family, of its best, out of the inner folds
    aggregation_log_losses: Mapping[str, float]  # cross-fitted, by kind

    @property
    def calibration(self) -> LabelCalibration:
        return self.choice.calibration


@dataclass(frozen=True, slots=True, eq=False)
class OutOfFold:
    """What the outer folds say of patients they did not see; patients in the cohort's order."""

    folds: NDArray[np.int64]  # (patients,)
    chosen: tuple[Chosen, ...]  # one a fold
    logits: Floats  # (slices, labels)
    study_logits: Floats  # (patients,)
    probability: Floats  # (patients,), calibrated
    present: Mapping[str, Bools]  # (patients,) by operating point


class Recipe:
    """Chooses from candidates; the first one's family is taken unless another beats it."""

    def __init__(self, fits: Fits, candidates: Sequence[Candidate], *, seed: int) -> None:
        self._fits = fits
        self._candidates = tuple(candidates)
        self._seed = seed

    @property
    def fits(self) -> Fits:
        return self._fits

    @property
    def examples(self) -> Examples:
        return self._fits.examples

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return self._candidates

    def only(self, family: str) -> "Recipe":
        """The same recipe with one family to choose from."""
        kept = [candidate for candidate in self._candidates if candidate.family == family]
        return Recipe(self._fits, kept, seed=self._seed)

    def choose(self, held: Split = ALL) -> Chosen:
        """Choose, calibrate and set thresholds, with nothing but the patients not held out."""
        examples = self.examples
        patients = examples.patients(held, inside=False)
        truth = examples.truth[patients]
        groups = [examples.groups[i] for i in patients]
        candidate, smoothing, logits, aucs = self._best(held, groups)
        ways = _aggregations(logits, groups, truth, seed=self._seed)
        choices = {
            how: calibrate.choose(study, truth, patients, seed=self._seed)
            for how, study in ways.items()
        }
        losses = {how: min(choices[how].log_losses.values()) for how in ways}
        aggregation = min((how for how in ways if how != NOISY_OR), key=lambda how: losses[how])
        study, choice = ways[aggregation], choices[aggregation]
        return Chosen(
            candidate=candidate,
            fit=self._fits.get(candidate, held),
            smoothing=smoothing,
            aggregation=aggregation,
            choice=choice,
            thresholds=thresholds(calibrate.apply(choice.calibration, study), truth),
            patients=patients,
            logits=logits,
            study_logits=study,
            slice_aucs=aucs,
            aggregation_log_losses={str(how): round(loss, 4) for how, loss in losses.items()},
        )

    def out_of_fold(self, progress: Progress = silent) -> OutOfFold:
        """Each outer fold repeats the whole recipe without its patients and judges them."""
        examples, n = self.examples, self.examples.n_folds
        logits = np.empty(examples.labels.shape)
        study, probability = np.empty(len(examples.folds)), np.empty(len(examples.folds))
        present = {name: np.empty(len(examples.folds), np.bool_) for name in OPERATING_POINTS}
        made = []
        for fold in range(n):
            progress("outer folds", fold, n)
            chosen = self.choose(Split({fold}))
            unseen = examples.patients(Split({fold}), inside=True)
            groups = [examples.groups[i] for i in unseen]
            rows = examples.rows(unseen)
            logits[rows] = chosen.smoothing.apply(chosen.fit.logits, groups)[rows]
            study[unseen] = study_logits(logits[:, 0], groups, chosen.aggregation)
            probability[unseen] = calibrate.apply(chosen.calibration, study[unseen])
            for name, threshold in chosen.thresholds.items():
                present[name][unseen] = probability[unseen] >= threshold
            made.append(chosen)
        progress("outer folds", n, n)
        return OutOfFold(examples.folds, tuple(made), logits, study, probability, present)

    def inner_logits(self, candidate: Candidate, held: Split) -> Floats:
        """(slices, labels), each slice by a fit without its fold and the held ones; NaN of held."""
        examples = self.examples
        logits = np.full(examples.labels.shape, np.nan)
        for fold in sorted(set(range(examples.n_folds)) - held):
            rows = examples.rows(np.flatnonzero(examples.folds == fold))
            logits[rows] = self._fits.get(candidate, held | {fold}).logits[rows]
        return logits

    def _best(
        self, held: Split, groups: Sequence[Rows]
    ) -> tuple[Candidate, Smoothing, Floats, Mapping[str, float]]:
        """By slice AUC, which slices enough carry; with the first label's logits."""
        truth = self.examples.labels[:, 0]
        rows = np.concatenate(list(groups))
        best: dict[str, tuple[float, Candidate, Smoothing, Floats]] = {}
        for candidate in self._candidates:
            plain = self.inner_logits(candidate, held)[:, :1]
            for smoothing in SMOOTHINGS:
                logits = smoothing.apply(plain, groups)[:, 0]
                value = auc(logits[rows], truth[rows])
                if candidate.family not in best or value > best[candidate.family][0]:
                    best[candidate.family] = (value, candidate, smoothing, logits)
        default = best[self._candidates[0].family]
        winner = max(best.values(), key=lambda one: one[0])
        if winner is not default and not beats(
            winner[3], default[3], truth, groups, seed=self._seed
        ):
            winner = default
        return *winner[1:], {family: round(one[0], 4) for family, one in best.items()}


def beats(
    logits: Floats, other: Floats, truth: Bools, groups: Sequence[Rows], *, seed: int
) -> bool:
    """Whether the slice AUC is higher in nearly all of paired draws of patients."""
    rng, better = np.random.default_rng(seed), 0
    for _ in range(_DRAWS):
        rows = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        better += auc(logits[rows], truth[rows]) > auc(other[rows], truth[rows])
    return better >= _BEATEN * _DRAWS


def study_logits(logits: Floats, groups: Sequence[Rows], how: Aggregation) -> Floats:
    """(slices,) -> one logit a patient."""
    return np.array([aggregate(logits[rows], how) for rows in groups])


def thresholds(probability: Floats, truth: Bools) -> dict[str, float]:
    """The three operating points, each halfway between two studies' probabilities.

    balanced: the largest sum of sensitivity and specificity (Youden). high sensitivity: the highest
    that still finds its share of the positives, balanced at most. high specificity: the lowest that
    clears its share of the negatives, balanced at least.

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
    balanced = float(cuts[np.argmax(sensitivity + specificity)])
    return {
        "high sensitivity": min(float(sensitive.max() if len(sensitive) else cuts[0]), balanced),
        "balanced": balanced,
        "high specificity": max(float(specific.min() if len(specific) else cuts[-1]), balanced),
    }


def _aggregations(
    logits: Floats, groups: Sequence[Rows], truth: Bools, *, seed: int
) -> dict[Aggregation, Floats]:
    """One logit a patient by every way; by the learnt one as it was fitted without the patient."""
    made = {how: study_logits(logits, groups, how) for how in (*AGGREGATIONS, NOISY_OR)}
    studies = [logits[rows] for rows in groups]
    made[fit_ranked(studies, truth)] = cross_fitted(studies, truth, seed=seed)
    return made
