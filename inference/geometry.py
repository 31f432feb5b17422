"""Where images lie in the patient: planes, positions along the normal, duplicates and holes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray

Cosines = tuple[float, ...]  # ImageOrientationPatient: six direction cosines, along a row first

PLANES = ("sagittal", "coronal", "axial")  # by the axis of the normal: x, y, z
SAME_PLACE_MM = 0.05  # positions are written with far fewer digits than they have

# Patient axes (PS3.3 C.7.6.2.1.1: x to the left, y to the back, z to the head) that run down the
# columns and along the rows in the usual display of each plane.
_DOWN = {"sagittal": (0, 0, -1), "coronal": (0, 0, -1), "axial": (0, 1, 0)}
_ALONG = {"sagittal": (0, 1, 0), "coronal": (1, 0, 0), "axial": (1, 0, 0)}


@dataclass(frozen=True, slots=True)
class Reorientation:
    """Turns a source matrix into the usual display: transpose first, then flip."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """(..., rows, cols) in the source's order -> in the usual display's; a view."""
        turned = image.swapaxes(-1, -2) if self.transpose else image
        return turned[..., :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def undo(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """The inverse of `apply`; a view."""
        turned = image[..., :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return turned.swapaxes(-1, -2) if self.transpose else turned


def is_orthonormal(orientation: Cosines) -> bool:
    """Whether six numbers can be direction cosines; scanners round, so to 1 %."""
    if len(orientation) != 6 or not np.isfinite(orientation).all():
        return False
    along, down = np.asarray(orientation[:3]), np.asarray(orientation[3:])
    lengths = abs(np.linalg.norm(along) - 1) < 0.01 and abs(np.linalg.norm(down) - 1) < 0.01
    return bool(lengths and abs(float(along @ down)) < 0.01)


def normal(orientation: Cosines) -> NDArray[np.float64]:
    """The unit normal, turned so that it points to the patient's left, back or head."""
    vector = np.cross(orientation[:3], orientation[3:])
    vector = vector / np.linalg.norm(vector)
    return vector if vector[int(np.argmax(np.abs(vector)))] > 0 else -vector


def plane(orientation: Cosines) -> tuple[str, float]:
    """The nearest plane, and the angle to it in degrees."""
    vector = normal(orientation)
    axis = int(np.argmax(vector.clip(0)))
    return PLANES[axis], float(np.degrees(np.arccos(min(1.0, vector[axis]))))


def reorientation(orientation: Cosines | None) -> Reorientation:
    """How to show an image as its plane is usually shown; unknown orientation: as it is."""
    if orientation is None:
        return Reorientation()
    name, _ = plane(orientation)
    along, down = np.asarray(orientation[:3]), np.asarray(orientation[3:])
    wanted_along, wanted_down = np.asarray(_ALONG[name]), np.asarray(_DOWN[name])
    transpose = abs(along @ wanted_along) < abs(down @ wanted_along)
    if transpose:
        along, down = down, along
    return Reorientation(
        bool(transpose), bool(down @ wanted_down < 0), bool(along @ wanted_along < 0)
    )


def position_along(orientation: Cosines, position: Sequence[float]) -> float:
    """Millimetres along the normal."""
    return float(normal(orientation) @ np.asarray(position, dtype=np.float64))


def holes(
    positions: Sequence[float], thicknesses: Sequence[float | None], factor: float
) -> tuple[tuple[float, float], ...]:
    """Places where images are missing, as (position before, position after), millimetres.

    A step is measured against the usual step between slices of those two thicknesses, so that 4 and
    7 mm slices may stand in one series; and against the thicknesses themselves, so that a series of
    which only every other slice has come is not whole. `positions` ascend without duplicates.
    """
    pairs = list(pairwise(thicknesses))
    steps = [after - before for before, after in pairwise(positions)]
    by_kind: dict[object, list[float]] = defaultdict(list)
    for pair, step in zip(pairs, steps, strict=True):
        by_kind[_kind(pair)].append(step)
    found = []
    for index, (pair, step) in enumerate(zip(pairs, steps, strict=True)):
        alike = by_kind[_kind(pair)]
        own = sum(stated) / 2 if len(stated := [t for t in pair if t and t > 0]) == 2 else None
        limits = [median(alike)] if len(alike) >= 3 or own is None else []
        limits += [own] if own else []
        if step > factor * min(limits):
            found.append((positions[index], positions[index + 1]))
    return tuple(found)


def _kind(pair: tuple[float | None, float | None]) -> tuple[float, ...]:
    return tuple(sorted(round(x, 1) if x else 0.0 for x in pair))
