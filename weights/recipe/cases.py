"""Labelled studies and pictures, each as the served model would see it."""

import os.path
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from db.errors import PermanentError
from inference.bundle import Bundle
from inference.manifest import Manifest
from inference.volume import volume_from_pictures
from inference.window import ModelInput, model_input
from weights.recipe.data import PICTURE_RANGE_HU, Cohort
from weights.recipe.pictures import (
    BadPicture,
    GreyWindow,
    doubt_about,
    guess_window,
    read_picture,
    without_writing,
)
from weights.recipe.series import NotJudged, read_series
from weights.recipe.tables import read_table

_TRUE = ("1", "1.0", "true", "yes", "positive")
_FALSE = ("0", "0.0", "false", "no", "negative")

#: Of pictures judged one by one.
OF_STUDIES = (
    "a picture counts as a study of one image; calibration and thresholds are those of whole "
    "studies, so probabilities, sensitivity and specificity of single pictures are off, AUC is not"
)


class BadLabels(PermanentError):
    """A table of labels that cannot be used, with the line and the reason."""

    code: ClassVar[str] = "bad_labels"


class WrongBundle(PermanentError):
    """A bundle to which grey values of a CT window mean nothing."""

    code: ClassVar[str] = "wrong_bundle"


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """What is judged as one: a study, or one picture."""

    name: str  # as the table has it
    truth: bool  # of the primary label
    inputs: NDArray[np.float32]  # (n, channels, size, size)
    image_truth: NDArray[np.bool_] | None = None  # (n,), where each image has a label
    group: str = ""  # cases of one patient share it; empty: a patient of its own
    doubt: str = (
        ""  # what speaks against its being what the bundle judges; it is judged all the same
    )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A case that the bundle's own rules, or its file, do not let through."""

    name: str
    truth: bool
    reason: str
    group: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """How many cases there are, and the cases one by one."""

    n: int
    cases: Iterator[Case | LeftOut]
    unit: str  # study | picture
    key: str  # what names a case, as the table's column: path | file | patient
    notes: tuple[str, ...] = ()  # what was assumed


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # in the file
    name: str
    truth: bool
    group: str


def from_cohort(cohort: Cohort, manifest: Manifest) -> Source:
    """The patients of a folder laid out as `ct-ich`, one study each.

    Raises
    ------
    WrongBundle
        If the bundle does not judge Hounsfield units.
    """
    check_domain(manifest)

    def cases() -> Iterator[Case | LeftOut]:
        for patient, rows in cohort.by_patient():
            truth = cohort.labels[rows, 0]
            inputs = seen_by_model(cohort, rows, manifest).inputs
            yield Case(str(patient), bool(truth.any()), inputs, truth)

    return Source(len(cohort.patient_ids), cases(), "study", "patient")


def from_pictures(
    folder: Path, labels: Path, manifest: Manifest, window: GreyWindow | None = None
) -> Source:
    """Single pictures (columns file,label; patient if there is one), each judged by itself.

    window : what the pictures were exported with; None: guessed from them

    Raises
    ------
    BadLabels
        If the table, or a picture it names, is not there or not what it should be.
    WrongBundle
        If the bundle does not judge Hounsfield units.
    """
    check_domain(manifest)
    lines = read_labels(labels, "file")
    _check_there(labels, folder, lines)
    assumed = window or guess_window(_readable(folder, _some(lines)))

    def cases() -> Iterator[Case | LeftOut]:
        for line in lines:
            try:
                grey = read_picture(folder / line.name)
            except BadPicture as error:
                yield LeftOut(line.name, line.truth, error.reason, line.group)
            else:
                yield Case(
                    line.name,
                    line.truth,
                    picture_inputs(grey, manifest, assumed),
                    np.array([line.truth]),
                    line.group,
                    doubt_about(grey),
                )

    how = "as given" if window else "guessed from the pictures"
    notes = (f"window {assumed} HU, {how}", OF_STUDIES)
    return Source(len(lines), cases(), "picture", "file", notes)


def picture_inputs(
    grey: NDArray[np.uint8], manifest: Manifest, window: GreyWindow
) -> NDArray[np.float32]:
    """(1, channels, size, size): one picture through the same function as a served slice."""
    cleaned = without_writing(grey)[None]
    volume = volume_from_pictures(cleaned, window.range_hu, step_mm=None)
    return model_input(volume, manifest.pixels, manifest.input).inputs


def from_studies(folder: Path, labels: Path, bundle: Bundle) -> Source:
    """DICOM studies (columns path,label; patient if there is one), one folder or file each.

    Raises
    ------
    BadLabels
        If the table, or a study it names, is not there or not what it should be.
    """
    lines = read_labels(labels, "path")
    _check_there(labels, folder, lines)

    def cases() -> Iterator[Case | LeftOut]:
        for line in lines:
            try:
                inputs = read_series(folder / line.name, bundle).inputs
            except PermanentError as error:
                reason = str(error) if isinstance(error, NotJudged) else f"{error.code}: {error}"
                yield LeftOut(line.name, line.truth, reason, line.group)
            else:
                yield Case(line.name, line.truth, inputs, None, line.group)

    return Source(len(lines), cases(), "study", "path")


def read_labels(path: Path, column: str) -> list[_Line]:
    """The table's lines; spaces round names and values do not count.

    Raises
    ------
    BadLabels
        If a column is missing, a name is empty, doubled or leaves the folder, or a label is
        neither 0 nor 1.
    """
    lines = [
        _line(path, number, row, column)
        for number, row in read_table(path, (column, "label"), BadLabels)
    ]
    seen: set[str] = set()
    for line in lines:
        if line.name in seen:
            raise BadLabels(f"{path}, line {line.number}: {line.name} is there twice")
        seen.add(line.name)
    return lines


def _line(path: Path, number: int, row: dict[str, str], column: str) -> _Line:
    name, label = row[column], row["label"].lower()
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadLabels(f"{path}, line {number}: {name!r} is no name inside the folder")
    if label not in (*_TRUE, *_FALSE):
        raise BadLabels(f"{path}, line {number}: label {label!r} is neither 0 nor 1")
    return _Line(number, name, label in _TRUE, row.get("patient", ""))


def check_domain(manifest: Manifest) -> None:
    if manifest.pixels.domain != "HU":
        raise WrongBundle(
            f"{manifest.name} judges {manifest.pixels.domain} values, and pictures of a CT window "
            "hold Hounsfield units: use --dicom"
        )


def _check_there(labels: Path, folder: Path, lines: Sequence[_Line]) -> None:
    # Not Path.exists: names that no file can have (too long) raise there.
    missing = [line for line in lines if not os.path.exists(folder / line.name)]
    if missing:
        n, first = f"{len(missing)} of {len(lines)}", missing[0]
        reason = f"{n} names are not in {folder}, first {first.name}"
        raise BadLabels(f"{labels}, line {first.number}: {reason}")


def _some(lines: Sequence[_Line], most: int = 200) -> Sequence[_Line]:
    """Evenly spread over the table: enough for a median."""
    return lines[:: max(1, len(lines) // most)]


def _readable(folder: Path, lines: Sequence[_Line]) -> Iterator[NDArray[np.uint8]]:
    for line in lines:
        with suppress(BadPicture):  # told when its turn comes
            yield without_writing(read_picture(folder / line.name))


def seen_by_model(cohort: Cohort, rows: NDArray[np.int64], manifest: Manifest) -> ModelInput:
    """One patient's slices as the served model would see them."""
    volume = volume_from_pictures(cohort.grey(rows), PICTURE_RANGE_HU)
    return model_input(volume, manifest.pixels, manifest.input)
