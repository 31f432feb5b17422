"""What the outer folds say: headline, subgroups, and the shortcuts that could flatter it."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weights.recipe.calibrate import log_loss
from weights.recipe.data import LABELS, Cohort
from weights.recipe.figures import auc, brier, calibration_figures, share, with_interval
from weights.recipe.nested import OPERATING_POINTS, OutOfFold
from weights.recipe.operating import PREVALENCES, exact_interval, operating_point

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]
Figure = dict[str, float]

ADULT_YEARS = 18.0
_POSITION_BANDS = 3


class Judge:
    """A cohort, the outer folds' answers for it, and one seed for all intervals."""

    def __init__(self, cohort: Cohort, found: OutOfFold, *, seed: int) -> None:
        self._cohort = cohort
        self._found = found
        self._seed = seed
        self._groups = tuple(rows for _, rows in cohort.by_patient())
        self._labels = cohort.per_patient(cohort.labels)  # (patients, labels)
        self._fracture = cohort.per_patient(cohort.fracture)
        first = np.array([rows[0] for rows in self._groups])
        self._is_child = cohort.age_years[first] < ADULT_YEARS
        self._is_female = cohort.is_female[first]

    @property
    def truth(self) -> Bools:
        """(patients,), by the first label."""
        return self._labels[:, 0]

    def headline(self) -> dict[str, Any]:
        """The first label, over all slices and all patients."""
        slices, p, truth = self._found.logits[:, 0], self._found.probability, self.truth
        constant = np.full(len(truth), truth.mean())
        return {
            "slice_auc": self._slice_auc(slices, self._cohort.labels[:, 0]),
            "patient_auc": self._patient(lambda rows: auc(p[rows], truth[rows])),
            **calibration_figures(p, truth, self._each(), seed=self._seed),
            "brier_of_prevalence_alone": round(brier(constant, truth), 4),
            "log_loss_of_prevalence_alone": round(log_loss(constant, truth), 4),
        }

    def operating_points(self) -> dict[str, dict[str, Any]]:
        """What each threshold makes of patients who had no part in setting it."""
        prevalences = (*PREVALENCES, float(self.truth.mean()))
        return {
            name: operating_point(
                self._found.present[name],
                self.truth,
                self._each(),
                prevalences=prevalences,
                seed=self._seed,
            )
            for name in OPERATING_POINTS
        }

    def subgroups(self, active: str) -> dict[str, dict[str, Any]]:
        """The first label where it could differ; few patients each, as the intervals say."""
        parts = {
            "under 18": self._is_child,
            "18 and over": ~self._is_child,
            "female": self._is_female,
            "male": ~self._is_female,
            "fracture": self._fracture,
            "no fracture": ~self._fracture,
        }
        return {name: self._part(np.flatnonzero(inside), active) for name, inside in parts.items()}

    def by_subtype(self, active: str) -> dict[str, dict[str, Any]]:
        """How many patients of each subtype the first label finds, and its own slice AUC."""
        made: dict[str, dict[str, Any]] = {}
        for column, name in enumerate(LABELS[1:], start=1):
            patients = np.flatnonzero(self._labels[:, column])
            truth = self._cohort.labels[:, column]
            found = self._found.present[active]
            made[name] = {
                "patients": len(patients),
                "slices": int(truth.sum()),
                "only_bleed": int((self._labels[patients, 1:].sum(axis=1) == 1).sum()),
                "found_as_any": _exact(found[patients]),
                "slice_auc": self._slice_auc(self._found.logits[:, column], truth),
            }
        return made

    def shortcuts(self) -> dict[str, Any]:
        """What position, fracture, sex and age explain by themselves, and what is left inside.

        What is left inside each sex and age is among the subgroups.
        """
        slices, truth = self._found.logits[:, 0], self._cohort.labels[:, 0]
        position = np.concatenate([np.linspace(0, 1, len(rows)) for rows in self._groups])
        bands = np.minimum((position * _POSITION_BANDS).astype(int), _POSITION_BANDS - 1)
        positive = [rows for rows, has in zip(self._groups, self.truth, strict=True) if has]
        p = self._found.probability
        without = np.flatnonzero(~self._fracture)
        return {
            "slice_auc_of_position_alone": round(self._position_auc(bands), 4),
            "slice_auc_by_position_band": {
                name: round(auc(slices[bands == band], truth[bands == band]), 4)
                for band, name in enumerate(("lower third", "middle third", "upper third"))
            },
            "slice_auc_within_positive_patients": round(
                float(np.nanmean([auc(slices[rows], truth[rows]) for rows in positive])), 4
            ),
            "patient_auc_of_fracture_alone": round(
                auc(self._fracture.astype(float), self.truth), 4
            ),
            "patient_auc_without_fracture": self._patient(
                lambda rows: auc(p[rows], self.truth[rows]), among=without
            ),
            **of_cohort(self._cohort, seed=self._seed),
        }

    def _position_auc(self, bands: Rows) -> float:
        """Scored by the share of positives at the same height in the other folds' patients."""
        truth, score = self._cohort.labels[:, 0], np.empty(len(bands))
        fold = np.repeat(self._found.folds, [len(rows) for rows in self._groups])
        fine = np.concatenate(
            [np.linspace(0, 9.999, len(rows)).astype(int) for rows in self._groups]
        )
        for number in np.unique(fold):
            for height in np.unique(fine):
                others = (fold != number) & (fine == height)
                score[(fold == number) & (fine == height)] = truth[others].mean()
        return auc(score, truth)

    def _part(self, patients: Rows, active: str) -> dict[str, Any]:
        p, truth = self._found.probability, self.truth
        return {
            "patients": len(patients),
            "positive": int(truth[patients].sum()),
            "patient_auc": self._patient(lambda rows: auc(p[rows], truth[rows]), among=patients),
            "sensitivity": _exact(self._found.present[active][patients[truth[patients]]]),
            "specificity": _exact(~self._found.present[active][patients[~truth[patients]]]),
        }

    def _slice_auc(self, score: Floats, truth: Bools) -> Figure:
        return with_interval(
            lambda rows: auc(score[rows], truth[rows]), self._groups, seed=self._seed
        )

    def _patient(self, figure: Callable[[Rows], float], *, among: Rows | None = None) -> Figure:
        return with_interval(figure, self._each(among), seed=self._seed)

    def _each(self, among: Rows | None = None) -> list[Rows]:
        places = range(len(self._groups)) if among is None else among
        return [np.array([place]) for place in places]


def of_cohort(cohort: Cohort, *, seed: int) -> dict[str, Figure]:
    """What sex and age tell by themselves, without any model: patient AUCs.

    Older patients, and men, count as the likelier to bleed; under 0.5 it is the other way round.
    """
    first = np.array([rows[0] for _, rows in cohort.by_patient()])
    truth = cohort.per_patient(cohort.labels)[:, 0]
    groups = [np.array([place]) for place in range(len(first))]

    def alone(score: Floats) -> Figure:
        return with_interval(lambda rows: auc(score[rows], truth[rows]), groups, seed=seed)

    return {
        "patient_auc_of_sex_alone": alone((~cohort.is_female[first]).astype(np.float64)),
        "patient_auc_of_age_alone": alone(cohort.age_years[first]),
    }


def _exact(flags: Bools) -> Figure:
    """A share of patients; NaN of none."""
    value = round(share(flags), 4) if len(flags) else float("nan")
    return {"value": value, **exact_interval(flags)}
