"""The training slices, patient by patient: `ct-ich` as its own README describes it."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: The order of the model's outputs.
LABELS = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")

#: What grey 0 and 255 of the brain-window pictures stand for: level 40, width 120 HU.
PICTURE_RANGE_HU = (-20.0, 100.0)


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    """All slices, by patient and position (towards the head); arrays have one row a slice."""

    patients: NDArray[np.int64]
    slice_numbers: NDArray[np.int64]
    pictures: tuple[Path, ...]  # 8-bit brain-window pictures
    labels: NDArray[np.bool_]  # (slices, 6), as LABELS
    fracture: NDArray[np.bool_]
    age_years: NDArray[np.float64]
    is_female: NDArray[np.bool_]

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

    def grey(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(slices, rows, cols), 0..255."""
        return np.stack([np.asarray(Image.open(self.pictures[row]).convert("L")) for row in rows])


@dataclass(frozen=True, slots=True)
class LesionBox:
    """A lesion's place on a slice, as fractions of the picture."""

    left: float
    top: float
    right: float
    bottom: float


def read_cohort(data: Path) -> Cohort:
    """The slices of `manifest.csv`.

    Raises
    ------
    FileNotFoundError
        If the folder does not hold the set.
    """
    with (data / "manifest.csv").open(newline="") as file:
        lines = sorted(csv.DictReader(file), key=lambda x: (int(x["patient"]), int(x["slice"])))
    return Cohort(
        patients=np.array([int(line["patient"]) for line in lines]),
        slice_numbers=np.array([int(line["slice"]) for line in lines]),
        pictures=tuple(data / line["brain"] for line in lines),
        labels=np.array([[line[name] == "1" for name in LABELS] for line in lines]),
        fracture=np.array([line["fracture"] == "1" for line in lines]),
        age_years=np.array([float(line["age_years"]) for line in lines]),
        is_female=np.array([line["sex"] == "Female" for line in lines]),
    )


def read_boxes(data: Path) -> dict[tuple[int, int], list[LesionBox]]:
    """(patient, slice number) -> its lesion boxes."""
    boxes: dict[tuple[int, int], list[LesionBox]] = {}
    with (data / "boxes.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            cx, cy, w, h = (float(line[name]) for name in ("cx", "cy", "w", "h"))
            box = LesionBox(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            boxes.setdefault((int(line["PatientNumber"]), int(line["SliceNumber"])), []).append(box)
    return boxes
