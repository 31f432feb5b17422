"""Volumes in Hounsfield units built from ellipses: heads of many kinds, and what is no head.

Nothing in here comes from a person. Every function is pure: the same generator state, the same
volume. They are rough; they have a head's sizes, its shares of bone, fat, brain and fluid, its
noise, and that is all that pixel rules look at.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from inference.volume import Volume, volume_from_pictures

Field = NDArray[np.float32]  # (slices, rows, cols), HU
_Mask = NDArray[np.bool_]

MATRIX, SLICES = 384, 16
AIR_HU, FAT_HU, MUSCLE_HU, CSF_HU = -1000.0, -90.0, 52.0, 8.0
_BASE_MM = -28.0  # below the middle of the brain: skull base, sinuses, face

#: Noise of soft kernels at 5 mm, in HU, and how far apart its grains lie, in pixels.
SOFT_NOISE, SOFT_GRAIN = (3.0, 6.5), 0.8
SHARP_NOISE, SHARP_GRAIN = (18.0, 45.0), 0.35

# Ellipses across all slices: centre to the left and back, half axes, HU; painted in order.
_Ellipse = tuple[float, float, float, float, float]
_ABDOMEN: tuple[_Ellipse, ...] = (
    (0, 0, 170, 120, FAT_HU), (0, 0, 150, 100, MUSCLE_HU), (0, -8, 138, 84, FAT_HU),
    (-62, -20, 70, 60, 58), (75, 10, 34, 48, 48), (-60, 48, 26, 34, 34), (60, 48, 26, 34, 34),
    (20, -40, 60, 34, 30), (40, -50, 20, 16, -900), (18, 30, 12, 12, 42), (0, 60, 22, 19, 230),
)  # fmt: skip
_CHEST: tuple[_Ellipse, ...] = (
    (0, 0, 180, 115, FAT_HU), (0, 0, 162, 100, MUSCLE_HU), (-80, -2, 58, 78, -850),
    (80, -2, 58, 78, -850), (18, -34, 52, 44, 42), (22, 34, 13, 13, 45), (0, 70, 21, 19, 320),
    (-235, 10, 42, 42, MUSCLE_HU), (235, 10, 42, 42, MUSCLE_HU), (-235, 10, 13, 13, 900),
    (235, 10, 13, 13, 900),
)  # fmt: skip
_NECK: tuple[_Ellipse, ...] = (
    (0, 0, 68, 62, FAT_HU), (0, 0, 62, 57, MUSCLE_HU), (0, -30, 9, 12, -1000),
    (0, 14, 18, 15, 420), (0, 26, 9, 9, 30), (-30, -14, 6, 6, 45), (30, -14, 6, 6, 45),
    (0, -44, 16, 5, 180),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a head is like; lengths in mm, values in HU."""

    half_mm: tuple[float, float, float] = (67.0, 84.0, 75.0)  # of the brain: side, front, up
    skull_mm: float = 6.5
    skull_hu: float = 950.0
    scalp_mm: float = 6.0
    white: float = 28.0
    grey: float = 37.0
    ventricles: float = 1.0  # lengths, against usual ones
    gaps: bool = False  # sutures and fontanelles that are still open
    blood: float = 0.0  # half axis of a collection in one half, against the brain's
    opened: bool = False  # a third of the skull on one side is not there
    vessels: float = 0.0  # of blood with contrast agent; 0: none
    tumour: float = 0.0
    metal: float = 0.0  # strength of its streaks


def adult(rng: Generator, look: Look | None = None) -> Look:
    """An adult's size and densities; the rest as in `look`."""
    half = rng.uniform(60, 74), rng.uniform(77, 92), rng.uniform(66, 82)
    return replace(
        look or Look(),
        half_mm=half,
        skull_mm=rng.uniform(5.0, 9.0),
        skull_hu=rng.uniform(700, 1200),
        scalp_mm=rng.uniform(4.0, 9.0),
        white=rng.uniform(25, 31),
        grey=rng.uniform(34, 40),
        ventricles=rng.uniform(0.7, 1.6) * (look or Look()).ventricles,
    )


def newborn(rng: Generator) -> Look:
    """From a small preterm to a large term one: thin skull, watery white matter, open sutures."""
    width = rng.uniform(34, 46)
    return Look(
        half_mm=(width, width * rng.uniform(1.2, 1.35), width * rng.uniform(0.95, 1.1)),
        skull_mm=rng.uniform(1.6, 2.8),
        skull_hu=rng.uniform(350, 700),
        scalp_mm=rng.uniform(2.0, 4.0),
        white=rng.uniform(16, 23),
        grey=rng.uniform(27, 33),
        ventricles=rng.uniform(0.4, 0.8),
        gaps=True,
    )


def head(rng: Generator, look: Look) -> Volume:
    """From the skull base to the crown, in a field of view a little larger than it."""
    outside = look.skull_mm + look.scalp_mm
    spacing = 2 * (max(look.half_mm[:2]) + outside) * rng.uniform(1.08, 1.3) / MATRIX
    reach = look.half_mm[2]
    x, y, z = _grid(spacing, (-0.75 * reach, 0.93 * reach))
    depth = _depth(look, x, y, z)
    hu = np.full(depth.shape, AIR_HU, np.float32)
    hu[depth < outside] = FAT_HU
    hu[depth < look.skull_mm + look.scalp_mm * 0.55] = MUSCLE_HU
    hu[(depth < outside) & (depth > outside - 1.5)] = 30.0  # skin
    _skull(hu, depth, look, (x, y, z))
    _brain(rng, hu, depth, look, (x, y, z))
    if reach > 55:  # a newborn's base is cartilage and hardly pneumatised
        _base(rng, hu, depth, look, (x, y, z))
    if look.vessels:
        _vessels(hu, depth, look, (x, y, z))
    if look.metal:
        _streaks(rng, hu, depth, look.metal, (x, y, z))
    made = np.stack([gaussian_filter(one, 0.6) for one in hu])
    return volume(made, spacing)


def cylinder(radius_mm: float, inside: float, wall: tuple[float, float]) -> Field:
    """Round, of one material, in a wall (mm, HU), which may be 0 mm; in 250 mm of view."""
    x, y, z = _grid(250.0 / MATRIX, (0.0, 100.0))
    radius = np.hypot(x, y) + 0 * z
    hu = np.full(radius.shape, AIR_HU, np.float32)
    hu[radius < radius_mm] = wall[1]
    hu[radius < radius_mm - wall[0]] = inside
    return hu


def with_rods(rng: Generator, hu: Field, radius_mm: float) -> Field:
    """Rods of the usual plastics, bone and air, and pairs of lines of metal, on a ring."""
    x, y, z = _grid(250.0 / MATRIX, (0.0, 100.0))
    made, values = hu.copy(), (955.0, 120.0, -95.0, -1000.0, 990.0, 340.0)
    for place, value in enumerate(values):
        angle = 2 * np.pi * (place / len(values) + rng.random() * 0.1)
        at = 0.6 * radius_mm * np.cos(angle), 0.6 * radius_mm * np.sin(angle)
        made[np.hypot(x - at[0], y - at[1]) + 0 * z < rng.uniform(6, 13)] = value
    lines = (np.abs(x) < 18) & (np.abs(y) < 12) & (np.sin(x * rng.uniform(1.5, 4.0)) > 0) & (z > 40)
    made[lines] = 1800.0
    return made


def torso(rng: Generator, part: str, size: tuple[float, float] = (0.85, 1.2)) -> Volume:
    """A part of a body, its size against an adult's.

    part : abdomen | chest, with arms | neck | shoulders, under a neck
    """
    ellipses = {"abdomen": _ABDOMEN, "chest": _CHEST, "neck": _NECK, "shoulders": _NECK}[part]
    by = rng.uniform(*size)
    view = {"abdomen": 400.0, "chest": 600.0, "neck": 180.0, "shoulders": 480.0}[part] * by
    x, y, z = _grid(view / MATRIX, (0.0, 100.0))
    hu = np.full((SLICES, MATRIX, MATRIX), AIR_HU, np.float32)
    for cx, cy, rx, ry, value in ellipses:
        wave = by * (1 + 0.06 * np.sin(z / 18 + cx))
        hu[((x - cx * by) / (rx * wave)) ** 2 + ((y - cy * by) / (ry * wave)) ** 2 < 1] = value
    if part == "shoulders":
        low = (z < 30) & ((x / (210 * by)) ** 2 + (y / (75 * by)) ** 2 < 1) & (hu < -500)
        hu[low] = MUSCLE_HU
    made = np.stack([gaussian_filter(one, 0.6) for one in hu])
    return noisy(rng, volume(made, view / MATRIX), rng.uniform(8, 16))


def noisy(rng: Generator, of: Volume, strength: float, grain: float = SOFT_GRAIN) -> Volume:
    """With noise of a standard deviation in HU, its grains `grain` pixels wide."""
    shape = of.pixels.shape[1:]
    made = np.empty_like(of.pixels)
    for into, image in zip(made, of.pixels, strict=True):
        noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), grain)
        into[:] = image + noise * (strength / noise.std())
    return replace(of, pixels=made)


def sharpened(of: Volume, by: float) -> Volume:
    """Edges enhanced as by a bone kernel: overshoot on both sides of the skull."""
    blurred = np.stack([gaussian_filter(image, 1.5) for image in of.pixels])
    return replace(of, pixels=of.pixels + np.float32(by) * (of.pixels - blurred))


def thinner(of: Volume, times: int, step_mm: float) -> Volume:
    """Each image so many times, one above the other: a body that changes little in between."""
    assert of.spacing_mm is not None
    return volume(np.repeat(of.pixels, times, axis=0), of.spacing_mm[0], step_mm)


def volume(hu: Field, spacing_mm: float, step_mm: float = 7.5) -> Volume:
    """Axial images of square pixels, one above the other."""
    blank = np.zeros(hu.shape, np.uint8)
    spacing = spacing_mm, spacing_mm
    made = volume_from_pictures(blank, (0.0, 1.0), spacing_mm=spacing, step_mm=step_mm)
    return replace(made, pixels=hu.astype(np.float32))


_Place = tuple[Field, Field, Field]


def _grid(spacing: float, heights: tuple[float, float]) -> _Place:
    """Sparse coordinates in mm: to the left, to the back, upwards; they broadcast to a volume."""
    line = ((np.arange(MATRIX) - (MATRIX - 1) / 2) * spacing).astype(np.float32)
    z = np.linspace(*heights, SLICES, dtype=np.float32)
    return line[None, None, :], line[None, :, None], z[:, None, None]


def _depth(look: Look, x: Field, y: Field, z: Field) -> Field:
    """Roughly how many mm outside the brain; negative inside."""
    a, b, c = look.half_mm
    below = np.where(z > 0, c, 1.8 * c)
    radius = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / below) ** 2)
    return np.asarray((radius - 1) * (a + b) / 2, dtype=np.float32)


def _skull(hu: Field, depth: Field, look: Look, place: _Place) -> None:
    x, y, z = place
    a, b, _ = look.half_mm
    bone = (depth >= 0) & (depth < look.skull_mm)
    if look.opened:
        bone &= ~((x > 0.45 * a) & (np.abs(y) < 0.6 * b) & (z > -10))
    if look.gaps:
        bone &= ~((np.abs(x) < 5) & (np.abs(y + 0.3 * b) < 0.35 * b) & (z > 0))
        bone &= ~(np.abs(y - 0.2 * b) + 0 * x + 0 * z < 2.5)
    hu[bone] = look.skull_hu
    if look.skull_mm > 4:
        hu[bone & (depth > 1.8) & (depth < look.skull_mm - 1.8)] = 0.6 * look.skull_hu


def _brain(rng: Generator, hu: Field, depth: Field, look: Look, place: _Place) -> None:
    x, y, z = place
    a, b, c = look.half_mm
    inside = depth < 0
    folds = gaussian_filter(rng.standard_normal((SLICES, 48, 48)), (0.8, 1.2, 1.2))
    folds = np.repeat(np.repeat(folds / folds.std(), MATRIX // 48, 1), MATRIX // 48, 2)
    cortex = (depth > -4) | ((depth > -0.25 * a) & (np.abs(folds) < 0.6))
    hu[inside] = look.white
    hu[inside & cortex] = look.grey
    hu[inside & (depth > -0.2 * a) & (np.abs(folds) < 0.12)] = CSF_HU
    for side in (-1, 1):
        for cx, cy, cz, rx, ry, rz in (
            (0.14, -0.22, 0.25, 0.07, 0.22, 0.12), (0.24, 0.2, 0.2, 0.09, 0.26, 0.14),
        ):  # fmt: skip
            v = look.ventricles
            at = ((x - side * cx * a) / (rx * v * a)) ** 2 + ((y - cy * b) / (ry * v * b)) ** 2
            hu[inside & (at + ((z - cz * c) / (rz * v * c)) ** 2 < 1)] = CSF_HU
    if look.blood:
        r = look.blood
        at = ((x + 0.5 * a) / (r * a)) ** 2 + (y / (r * 1.4 * b)) ** 2 + ((z - 10) / (r * c)) ** 2
        hu[inside & (at < 1)] = rng.uniform(58, 80)


def _base(rng: Generator, hu: Field, depth: Field, look: Look, place: _Place) -> None:
    """Petrous bones, sphenoid and orbits, and the air in sinuses and mastoids."""
    x, y, z = place
    b = look.half_mm[1]
    low = (z < _BASE_MM) & (depth < 0)
    hu[low & (y < -0.45 * b)] = FAT_HU
    for side in (-1, 1):
        petrous = (np.abs(y - 12 - 0.4 * (side * x - 30)) < 9) & (side * x > 8) & low
        hu[petrous] = 0.9 * look.skull_hu
        hu[petrous & (side * x > 44)] = -600.0
        hu[low & (np.hypot(x - side * 32, y + 0.72 * b) < 13)] = 12.0
    hu[low & (np.abs(x) < 20) & (y < -0.15 * b) & (y > -0.42 * b)] = 0.7 * look.skull_hu
    air = rng.uniform(9, 17)
    hu[low & (np.hypot(x / 1.4, y + 0.6 * b) < air)] = AIR_HU


def _vessels(hu: Field, depth: Field, look: Look, place: _Place) -> None:
    """Sinuses and arteries filled with contrast agent; a little in the tissue, and a tumour."""
    x, y, z = place
    a, b, c = look.half_mm
    hu[(depth < 0) & (hu > 15) & (hu < 60)] += 3.0
    bright = (np.abs(x) < 4) & (depth > -6) & (y > 0) & (z > -15)
    for side in (-1, 1):
        bright = bright | (np.hypot(y + 0.16 * b, z + 14) + 0 * x < 4) & (np.abs(x) < 0.6 * a)
        bright = bright | (np.hypot(x - side * 0.65 * a, y + 0.1 * b) < 2.5) & (z > -20)
        bright = bright | (np.hypot(x - side * 0.85 * a, y - 0.4 * b) < 5) & (z < -5)
    hu[bright & (depth < 0)] = look.vessels
    if look.tumour:
        at = np.hypot(np.hypot(x - 0.4 * a, y - 0.1 * b), z - 0.3 * c)
        hu[(depth < 0) & (np.abs(at - 0.8 * look.tumour) < 0.2 * look.tumour)] = 75.0


def _streaks(rng: Generator, hu: Field, depth: Field, strength: float, place: _Place) -> None:
    """A clip or coil, and the stripes it throws over the slices near it."""
    x, y, z = place
    at = rng.uniform(-25, 25, 2)
    distance = np.hypot(x - at[0], y - at[1])
    angle = np.arctan2(y - at[1], x - at[0])
    height = rng.uniform(-30, 30)
    near = np.exp(-(((z - height) / 12) ** 2))
    stripes = np.cos(angle * rng.integers(6, 14)) * strength * near * np.exp(-distance / 60)
    hu += np.where(depth < 20, stripes, 0).astype(np.float32)
    hu[(distance < 4) & (np.abs(z - height) < 12)] = 3000.0
