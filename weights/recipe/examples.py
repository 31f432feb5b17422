"""What is learnt from: slices with labels, patients and lesion boxes, and ways to part them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.body import Box
from weights.recipe.bank import Pictures
from weights.recipe.data import Cohort, LesionBox
from weights.recipe.folds import patient_folds

Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

#: Folds whose patients a fit does not see: none, one (to judge it), or two (one to judge, one to
#: choose and calibrate by what was chosen).
Split = frozenset[int]

ALL: Split = frozenset()

MAP_SIDE = 80  # cells of a lesion map


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Slices in the cohort's order, and the fold of each patient."""

    labels: Bools  # (slices, labels)
    groups: tuple[Rows, ...]  # the rows of each patient, in order along the normal
    folds: NDArray[np.int64]  # (patients,), 0..n-1
    lesions: Mapping[int, tuple[LesionBox, ...]]  # by row; fractions of the square cut out

    @classmethod
    def of(
        cls,
        cohort: Cohort,
        pictures: Pictures,
        boxes: Mapping[tuple[int, int], Sequence[LesionBox]],
        *,
        folds: int,
        seed: int,
    ) -> "Examples":
        """Folds are the cohort's own where it brings them, else drawn."""
        groups = tuple(rows for _, rows in cohort.by_patient())
        lesions: dict[int, tuple[LesionBox, ...]] = {}
        places = zip(cohort.by_patient(), pictures.boxes, pictures.shapes, strict=True)
        for (patient, rows), cut, shape in places:
            for row in rows:
                found = boxes.get((patient, int(cohort.slice_numbers[row])), ())
                # One box (patient 86, slice 17) lies on a slice the radiologists call clear.
                if found and cohort.labels[row, 0]:
                    lesions[int(row)] = tuple(in_cut(box, cut, shape) for box in found)
        truth = np.array([cohort.labels[rows, 0].any() for rows in groups])
        if cohort.folds is not None:
            number = np.array([cohort.folds[rows[0]] for rows in groups])
        else:
            number = patient_folds(truth, folds, seed)
        return cls(cohort.labels, groups, number, lesions)

    @property
    def truth(self) -> Bools:
        """(patients,): whether each has a slice positive by the first label."""
        return np.array([self.labels[rows, 0].any() for rows in self.groups])

    @property
    def n_folds(self) -> int:
        return int(self.folds.max()) + 1

    @property
    def patient_of(self) -> Rows:
        """(slices,): the place of each slice's patient."""
        made = np.empty(len(self.labels), np.int64)
        for place, rows in enumerate(self.groups):
            made[rows] = place
        return made

    def patients(self, held: Split, *, inside: bool) -> Rows:
        """The places of the patients inside the held folds, or of all others."""
        return np.flatnonzero(np.isin(self.folds, sorted(held)) == inside)

    def rows(self, patients: Rows | Sequence[int]) -> Rows:
        """All slices of these patients."""
        return np.concatenate([self.groups[i] for i in patients])

    def splits(self) -> Iterator[Split]:
        """Every split that the nested judgement needs.

        A fit without folds j and k serves twice: it chooses for fold k by what it says of j, and
        for j by what it says of k. So n folds need 1 + n + n (n - 1) / 2 fits, not n * n + n + 1.
        """
        for size in (2, 1, 0):
            yield from map(frozenset, combinations(range(self.n_folds), size))


def in_cut(box: LesionBox, cut: Box, picture: tuple[int, int]) -> LesionBox:
    """From fractions of the picture (rows, columns) to fractions of the square cut out of it."""
    top, left, bottom, right = cut.pixels
    return LesionBox(
        left=(box.left * picture[1] - left) / (right - left),
        top=(box.top * picture[0] - top) / (bottom - top),
        right=(box.right * picture[1] - left) / (right - left),
        bottom=(box.bottom * picture[0] - top) / (bottom - top),
    )


def lesion_map(lesions: Sequence[LesionBox], side: int) -> NDArray[np.float32]:
    """(side, side), 0..1: the share of each cell that the boxes cover."""
    covered, at = np.zeros((side, side), np.float32), np.arange(side)
    for box in lesions:
        down, across = (
            np.clip(np.minimum(end * side, at + 1) - np.maximum(start * side, at), 0, 1)
            for start, end in ((box.top, box.bottom), (box.left, box.right))
        )
        covered = np.maximum(covered, (down[:, None] * across[None, :]).astype(np.float32))
    return covered


def lesion_maps(examples: Examples, rows: Rows) -> Tensor:
    """(n, side, side), 0..1: finer than any grid, so that they can be moved; 0 where unmarked."""
    maps = [lesion_map(examples.lesions.get(int(row), ()), MAP_SIDE) for row in rows]
    return torch.from_numpy(np.stack(maps))
