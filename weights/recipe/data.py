"""The training slices, patient by patient: `ct-ich` as its own README describes it."""

import hashlib
import math
import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from db.errors import PermanentError
from weights.recipe.pictures import picture_size, read_picture
from weights.recipe.tables import Line, read_table

#: The order of the model's outputs.
LABELS = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")

#: What grey 0 and 255 of the brain-window pictures stand for: level 40, width 120 HU.
PICTURE_RANGE_HU = (-20.0, 100.0)

TABLE, BOXES = "manifest.csv", "boxes.csv"

_FLAGS = (*LABELS, "fracture")
_NEEDS = ("patient", "slice", "brain", *_FLAGS, "age_years", "sex")
_BOX_NEEDS = ("patientnumber", "slicenumber", "cx", "cy", "w", "h")
_FEMALE = ("female", "f")


class BadData(PermanentError):
    """The table of slices cannot be used; file, line or column, and the reason."""

    code: ClassVar[str] = "bad_data"


class BadBoxes(BadData):
    """The table of lesion boxes cannot be used."""

    code: ClassVar[str] = "bad_boxes"


class BadPictures(BadData):
    """Pictures that the table names are not there, or do not fit together."""

    code: ClassVar[str] = "bad_pictures"


class TooFewPatients(BadData):
    """Too few patients, of one kind or in one fold, to train and judge anything."""

    code: ClassVar[str] = "too_few_patients"


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    """All slices, by patient and position (towards the head); arrays have one row a slice."""

    patients: NDArray[np.int64]
    slice_numbers: NDArray[np.int64]
    pictures: tuple[Path, ...]  # 8-bit brain-window pictures; of one size within a patient
    labels: NDArray[np.bool_]  # (slices, 6), as LABELS
    fracture: NDArray[np.bool_]
    age_years: NDArray[np.float64]
    is_female: NDArray[np.bool_]
    folds: NDArray[np.int64] | None = None  # the site's own, from 0; None: there are none

    @property
    def patient_ids(self) -> NDArray[np.int64]:
        """Ascending; what arrays with one row a patient are ordered by."""
        return np.unique(self.patients)

    def per_patient(self, values: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether it holds for any slice, one row a patient; (slices, ...) -> (patients, ...)."""
        return np.stack([values[rows].any(axis=0) for _, rows in self.by_patient()])

    def by_patient(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each patient and the rows of its slices."""
        for patient in self.patient_ids:
            yield int(patient), np.flatnonzero(self.patients == patient)

    def digest(self) -> str:
        """Of what the pictures hold, in order: others are not what was kept."""
        made = hashlib.sha256()
        for picture in self.pictures:
            made.update(hashlib.sha256(picture.read_bytes()).digest())
        return made.hexdigest()

    def grey(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(slices, rows, cols), 0..255.

        Raises
        ------
        BadPicture
            If one of them is cut off or damaged.
        """
        return np.stack([read_picture(self.pictures[row]) for row in rows])


@dataclass(frozen=True, slots=True)
class LesionBox:
    """A lesion's place on a slice, as fractions of the picture."""

    left: float
    top: float
    right: float
    bottom: float


def read_cohort(data: Path) -> Cohort:
    """The slices of `manifest.csv`; pictures are looked at, but not decoded.

    A column `fold`, if there is one, holds a site's own folds: whole numbers from 0.

    Raises
    ------
    BadData
        If the table is not there, lacks a column, has a value that its column does not allow, a
        slice twice, or a patient in two folds; or `BadPictures`.
    BadPicture
        If a file is no 8-bit picture.
    """
    path = data / TABLE
    read = [_slice(path, line) for line in read_table(path, _NEEDS, BadData)]
    slices = sorted(read, key=lambda one: (one.patient, one.number))
    _check_once(path, slices)
    cohort = Cohort(
        patients=np.array([one.patient for one in slices]),
        slice_numbers=np.array([one.number for one in slices]),
        pictures=tuple(data / one.picture for one in slices),
        labels=np.array([one.flags[: len(LABELS)] for one in slices]),
        fracture=np.array([one.flags[-1] for one in slices]),
        age_years=np.array([one.age_years for one in slices]),
        is_female=np.array([one.is_female for one in slices]),
        folds=_folds(path, slices),
    )
    _check_sizes(path, cohort)
    return cohort


def read_boxes(data: Path) -> dict[tuple[int, int], list[LesionBox]]:
    """(patient, slice number) -> its lesion boxes.

    Raises
    ------
    BadBoxes
        If the table is not there, lacks a column, or has a box that is none.
    """
    boxes: dict[tuple[int, int], list[LesionBox]] = {}
    path = data / BOXES
    for line in read_table(path, _BOX_NEEDS, BadBoxes):
        patient, number = (_whole(path, line, name, BadBoxes) for name in _BOX_NEEDS[:2])
        cx, cy, w, h = (_number(path, line, name, BadBoxes) for name in _BOX_NEEDS[2:])
        if not (0 <= cx <= 1 and 0 <= cy <= 1 and 0 < w <= 1 and 0 < h <= 1):
            reason = "cx, cy, w and h must be fractions of the picture, 0..1"
            raise BadBoxes(f"{path}, line {line[0]}: {reason}")
        box = LesionBox(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        boxes.setdefault((patient, number), []).append(box)
    return boxes


@dataclass(frozen=True, slots=True)
class _Slice:
    line: int
    patient: int
    number: int
    picture: str
    flags: tuple[bool, ...]  # as _FLAGS
    age_years: float
    is_female: bool
    fold: int | None


def _slice(path: Path, line: Line) -> _Slice:
    number, row = line
    if not row["brain"]:
        raise BadData(f"{path}, line {number}: column brain names no picture")
    for name in _FLAGS:
        if row[name] not in ("0", "1"):
            raise BadData(f"{path}, line {number}: {name} {row[name]!r} is neither 0 nor 1")
    age = _number(path, line, "age_years", BadData)
    fold = _whole(path, line, "fold", BadData) if "fold" in row else None
    if age < 0 or (fold is not None and fold < 0):
        raise BadData(f"{path}, line {number}: age_years and fold must not be negative")
    return _Slice(
        line=number,
        patient=_whole(path, line, "patient", BadData),
        number=_whole(path, line, "slice", BadData),
        picture=row["brain"],
        flags=tuple(row[name] == "1" for name in _FLAGS),
        age_years=age,
        is_female=row["sex"].lower() in _FEMALE,
        fold=fold,
    )


def _number(path: Path, line: Line, name: str, error: type[BadData]) -> float:
    text = line[1][name]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise error(f"{path}, line {line[0]}: {name} {text!r} is no number")
    return value


def _whole(path: Path, line: Line, name: str, error: type[BadData]) -> int:
    text = line[1][name]
    try:
        return int(text)
    except ValueError:
        raise error(f"{path}, line {line[0]}: {name} {text!r} is no whole number") from None


def _check_once(path: Path, slices: Sequence[_Slice]) -> None:
    first: dict[tuple[int, int], int] = {}
    for one in slices:
        known = first.setdefault((one.patient, one.number), one.line)
        if known != one.line:
            raise BadData(
                f"{path}, line {one.line}: patient {one.patient}, slice {one.number} is there "
                f"already, in line {known}"
            )


def _folds(path: Path, slices: Sequence[_Slice]) -> NDArray[np.int64] | None:
    of_patient: dict[int, int] = {}
    for one in slices:
        if one.fold is None:
            return None
        known = of_patient.setdefault(one.patient, one.fold)
        if known != one.fold:
            raise BadData(
                f"{path}, line {one.line}: patient {one.patient} is in folds {known} and "
                f"{one.fold}; all slices of a patient belong to one"
            )
    if absent := sorted(set(range(max(of_patient.values()) + 1)) - set(of_patient.values())):
        raise BadData(f"{path}: column fold: no patient is in fold {absent[0]}; count them from 0")
    return np.array([one.fold for one in slices])


def _check_sizes(path: Path, cohort: Cohort) -> None:
    # Not Path.is_file: names that no file can have (too long) raise there.
    if missing := [picture for picture in cohort.pictures if not os.path.isfile(picture)]:
        n = len(cohort.pictures)
        reason = f"{len(missing)} of {n} pictures are not there, first {missing[0]}"
        raise BadPictures(f"{path}: column brain: {reason}")
    for patient, rows in cohort.by_patient():
        sizes = [picture_size(cohort.pictures[row]) for row in rows]
        if odd := next((i for i, size in enumerate(sizes) if size != sizes[0]), None):
            first, other = (f"{c} x {r}" for r, c in (sizes[0], sizes[odd]))
            raise BadPictures(
                f"{cohort.pictures[rows[odd]]}: {other} pixels, but patient {patient} begins with "
                f"{first}; all of a patient's pictures must have one size"
            )
