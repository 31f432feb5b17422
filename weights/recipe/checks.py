"""What training needs of a folder, checked before anything slow begins."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weights.recipe.data import (
    BOXES,
    LABELS,
    TABLE,
    BadBoxes,
    Cohort,
    LesionBox,
    TooFewPatients,
    read_boxes,
    read_cohort,
)
from weights.recipe.pictures import read_picture

#: What an outer fold leaves of each kind of patient, at least: a calibration is fitted to them.
LEFT = 5
#: One to judge, one to choose and calibrate by, one to learn from.
LEAST_FOLDS = 3


def check_training(data: Path, folds: int) -> None:
    """All that can be known of a folder without a network; seconds.

    folds : outer ones; the table's own take their place

    Raises
    ------
    BadData
        As `read_cohort` and `read_boxes`; if no box lies on a slice with a bleed; or
        `TooFewPatients`.
    BadPicture
        As `check_pictures`.
    """
    cohort = read_cohort(data)
    _check_boxes(data / BOXES, cohort, read_boxes(data))
    _check_patients(data / TABLE, cohort, folds)
    check_pictures(cohort)


def check_pictures(cohort: Cohort) -> None:
    """Decode every picture once.

    Raises
    ------
    BadPicture
        For the first that is cut off or damaged.
    """
    for picture in cohort.pictures:
        read_picture(picture)


def _check_boxes(path: Path, cohort: Cohort, boxes: dict[tuple[int, int], list[LesionBox]]) -> None:
    places = zip(cohort.patients.tolist(), cohort.slice_numbers.tolist(), strict=True)
    bleeds = dict(zip(places, cohort.labels[:, 0].tolist(), strict=True))
    for patient, number in boxes:
        if (patient, number) not in bleeds:
            raise BadBoxes(f"{path}: patient {patient}, slice {number} is not in {TABLE}")
    if not any(bleeds[place] for place in boxes):
        raise BadBoxes(f"{path}: no box lies on a slice whose column {LABELS[0]} is 1")


def _check_patients(path: Path, cohort: Cohort, folds: int) -> None:
    """Enough of each kind that every fold has some, and the rest can be parted again."""
    truth = cohort.per_patient(cohort.labels)[:, 0]
    own = None if cohort.folds is None else _by_patient(cohort, cohort.folds)
    if (n_folds := folds if own is None else int(own.max()) + 1) < LEAST_FOLDS:
        raise TooFewPatients(f"{path}: {n_folds} folds; {LEAST_FOLDS} are needed")
    for kind, words in ((True, "positive"), (False, "negative")):
        n = int((truth == kind).sum())
        if n == 0:
            raise TooFewPatients(f"{path}: no {words} patient by column {LABELS[0]}")
        most = -(-n // folds) if own is None else int(np.bincount(own[truth == kind]).max())
        if (own is None and n < folds) or n - most < LEFT:
            parts = f"{folds} folds" if own is None else "these folds"
            raise TooFewPatients(
                f"{path}: {n} {words} patients are too few for {parts}: each fold needs one, and "
                f"{LEFT} must be left beside the largest, which has {most}"
            )


def _by_patient(cohort: Cohort, values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array([values[rows[0]] for _, rows in cohort.by_patient()])
