"""Synthetic bodies as Hounsfield units on a 1 mm grid, built from solids whose places are known.

Patient coordinates (PS3.3 C.7.6.2.1.1) in millimetres: x to the left, y to the back, z to the
head; the origin is the middle of the brain, or of the chest. No picture of a person is in here.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

Field = NDArray[np.float32]
_Mask = NDArray[np.bool_]
_Place = tuple[Field, Field, Field]  # sparse coordinates x, y, z in mm; broadcast to (z, y, x)

AIR_HU = -1000.0
WHITE_HU, GREY_HU, CSF_HU = 29.0, 37.0, 8.0
BONE_HU, DIPLOE_HU = 1150.0, 750.0
FAT_HU, MUSCLE_HU, SKIN_HU = -85.0, 52.0, 35.0
LESION_HU = 68.0
CONTRAST_HU = 260.0


@dataclass(frozen=True, slots=True)
class Body:
    """Hounsfield units on a grid of 1 mm; `lowest` is the patient coordinate of voxel (0, 0, 0)."""

    hu: Field  # (z, y, x)
    lowest: tuple[float, float, float]  # z, y, x in mm

    def sample(self, x: Field, y: Field, z: Field) -> Field:
        """Hounsfield units at patient coordinates in mm (any shape); air outside the grid."""
        low = self.lowest
        where = np.stack([z - low[0], y - low[1], x - low[2]])
        hu: Field = map_coordinates(self.hu, where, order=1, cval=AIR_HU)
        return hu

    def level(self, x: Field, y: Field, heights_mm: Field) -> Field:
        """As the mean of `sample` over planes across the z axis, in a third of the time."""
        steps = np.clip(heights_mm - self.lowest[0], 0, len(self.hu) - 1.001)
        low = steps.astype(int)
        weight = (steps - low).astype(np.float32)[:, None, None]
        planes = self.hu[low] * (1 - weight) + self.hu[low + 1] * weight
        where = np.stack([y - self.lowest[1], x - self.lowest[2]])
        hu: Field = map_coordinates(planes.mean(axis=0), where, order=1, cval=AIR_HU)
        return hu


# Solids as (centre x, y, z), (half axes), HU, painted in order. Those of a pair are mirrored.
_Solid = tuple[tuple[float, float, float], tuple[float, float, float], float]
_FACE: tuple[_Solid, ...] = (
    ((0, -72, -62), (13, 26, 24), AIR_HU),  # nose
    ((0, -74, -62), (1, 26, 24), BONE_HU),  # its septum
    ((0, -86, -28), (20, 7, 9), AIR_HU),  # frontal sinus
    ((0, -58, -46), (10, 18, 10), AIR_HU),  # ethmoid and sphenoid cells
    ((0, -4, -78), (13, 12, 14), AIR_HU),  # throat
)
_FACE_PAIRS: tuple[_Solid, ...] = (
    ((31, -66, -68), (17, 17, 18), BONE_HU),  # maxillary sinus in its wall
    ((31, -66, -68), (15, 15, 16), AIR_HU),
    ((32, -72, -43), (19, 23, 16), BONE_HU),  # orbit: wall, fat, globe, lens, muscle, nerve
    ((32, -74, -43), (17, 23, 14), FAT_HU),
    ((32, -85, -43), (12, 12, 12), 12.0),
    ((32, -95, -43), (4, 2, 4), 75.0),
    ((44, -68, -43), (2, 15, 4), MUSCLE_HU),
    ((30, -64, -43), (2, 12, 2), 32.0),
    ((52, -28, -66), (7, 22, 16), BONE_HU),  # jaw and cheek
)
_EAR_PAIRS: tuple[_Solid, ...] = (
    ((48, 14, -50), (27, 9, 10), BONE_HU),  # petrous ridge
    ((60, 24, -56), (9, 13, 13), BONE_HU),  # mastoid
)
_INSIDE_PAIRS: tuple[_Solid, ...] = (
    ((9, -22, 18), (4, 15, 5), CSF_HU),  # frontal horn
    ((12, 10, 22), (4, 22, 5), CSF_HU),  # body of the ventricle
    ((22, 28, 10), (5, 13, 6), CSF_HU),  # atrium
    ((22, 30, 8), (2.4, 3, 2.4), 120.0),  # calcified plexus
    ((10, 2, 10), (8, 13, 9), 36.5),  # thalamus
    ((15, -17, 14), (5, 10, 8), 37.5),  # caudate nucleus
    ((24, -8, 8), (6, 16, 10), 37.0),  # lentiform nucleus
    ((44, -10, 4), (2, 18, 2), CSF_HU),  # lateral fissure
)
_INSIDE: tuple[_Solid, ...] = (
    ((0, 0, 6), (1.6, 12, 9), CSF_HU),  # third ventricle
    ((0, 20, 6), (2, 2, 2), 110.0),  # pineal gland
    ((0, -12, -24), (12, 9, 6), CSF_HU),  # suprasellar cistern
    ((0, 20, -10), (13, 4, 4), CSF_HU),  # quadrigeminal cistern
    ((0, 4, -28), (14, 13, 22), 31.0),  # brain stem
    ((0, 30, -36), (6, 4, 6), CSF_HU),  # fourth ventricle
)


@lru_cache(maxsize=4)
def head(seed: int, *, lesion: bool = False, contrast: bool = False) -> Body:
    """A head from the jaw to the crown; with `lesion`, a large dense one of known place."""
    random = np.random.default_rng(seed)
    z, y, x = _grid((-96, 92), (-108, 112), (-92, 92))
    depth = _depth(x, y, z)
    folds, patches, fine = (_texture(random, z, y, x, scale) for scale in (9.0, 14.0, 4.0))
    hu = np.full(depth.shape, AIR_HU, np.float32)
    _shells(hu, depth, patches)
    inside = depth < 0
    _brain(hu, inside, depth, folds, patches, (x, y, z))
    _base(hu, depth, fine, (x, y, z))
    if lesion:
        _lesion(hu, inside, depth, patches, (x, y, z))
    if contrast:
        _vessels(hu, depth, (x, y, z))
    return Body(_blur(hu, 0.45), (-96.0, -108.0, -92.0))


@lru_cache(maxsize=1)
def chest(seed: int) -> Body:
    """A chest: lungs, heart, spine and ribs."""
    random = np.random.default_rng(seed)
    z, y, x = _grid((-60, 60), (-125, 125), (-185, 185))
    lungs, fine = (_texture(random, z, y, x, scale) for scale in (3.0, 8.0))
    hu = np.full(lungs.shape, AIR_HU, np.float32)
    radius = np.sqrt((x / 170) ** 2 + (y / 112) ** 2)
    hu = np.where(radius < 1, FAT_HU, hu)
    hu = np.where(radius < 0.9, MUSCLE_HU + 4 * fine, hu).astype(np.float32)
    rib = (np.abs(radius - 0.86) < 0.035) & (np.sin((z + 0.25 * y) / 4.5) > 0.2)
    hu[rib] = 600.0
    for side in (-1, 1):
        lung = _ellipsoid((x, y, z), (side * 82, -2, 0), (58, 84, 130))
        hu[lung] = (-850 + 60 * lungs)[lung]
    for centre, axes, value in (
        ((18, -38, 0), (52, 42, 70), 42.0), ((22, 34, 0), (13, 13, 200), 45.0),
        ((0, 74, 0), (21, 19, 200), 350.0), ((0, 92, 0), (10, 9, 200), 15.0),
    ):  # fmt: skip
        hu[_ellipsoid((x, y, z), centre, axes)] = value
    return Body(_blur(hu, 0.6), (-60.0, -125.0, -185.0))


def _grid(*spans: tuple[int, int]) -> _Place:
    axes = [np.arange(low, high, dtype=np.float32) for low, high in spans]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    return z, y, x


def _texture(random: Any, z: Field, y: Field, x: Field, scale_mm: float) -> Field:
    """Smooth noise of mean 0 and standard deviation 1 whose grains are about `scale_mm` wide."""
    coarse = max(scale_mm / 2, 1.0)
    shape = [int(axis.size / coarse) + 3 for axis in (z, y, x)]
    sigma = scale_mm / coarse / 2
    # Longer upwards: slices of 5 mm would average round grains away.
    noise = gaussian_filter(random.standard_normal(shape), (2 * sigma, sigma, sigma))
    noise /= noise.std()
    grains: Field = noise.astype(np.float32)
    for axis, coordinates in enumerate((z, y, x)):
        grains = _stretch(grains, coordinates.size, coarse, axis)
    return grains


def _stretch(values: Field, size: int, step: float, axis: int) -> Field:
    """Linear interpolation along one axis at 0, 1 / step, 2 / step, ... of the old samples."""
    at = np.arange(size, dtype=np.float32) / step
    low = at.astype(int)
    weight = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
    near, far = values.take(low, axis), values.take(low + 1, axis)
    return np.asarray(near + (far - near) * weight, dtype=np.float32)


def _depth(x: Field, y: Field, z: Field) -> Field:
    """Roughly how many mm outside the brain's surface; negative inside it."""
    half_width = 67 * (1 + 0.09 * y / 84)  # wider at the back
    half_height = np.where(z > 0, 76.0, 135.0)
    radius = np.sqrt((x / half_width) ** 2 + (y / 85) ** 2 + (z / half_height) ** 2)
    return ((radius - 1) * 74).astype(np.float32)


def _shells(hu: Field, depth: Field, patches: Field) -> None:
    """Skin, fat, muscle and the three layers of the skull, from outside in."""
    thick = 6.5 + 0.8 * patches
    for edge, value in ((thick + 6, SKIN_HU), (thick + 4.5, FAT_HU), (thick + 1, MUSCLE_HU)):
        hu[depth < edge] = value
    hu[depth < thick] = BONE_HU
    hu[(depth > 1.8) & (depth < thick - 1.8)] = DIPLOE_HU
    hu[depth < 0] = CSF_HU


def _brain(
    hu: Field, inside: _Mask, depth: Field, folds: Field, patches: Field,
    place: _Place,
) -> None:  # fmt: skip
    x, y, z = place
    # Sulci are the zero surfaces of a smooth field, deepest at the crown; cortex lines them.
    reach = 16 + np.clip(z, -20, 60) * 0.2
    near = (depth > -reach) & (z > -30)
    width = np.clip(0.10 + 0.0035 * z, 0.05, 0.32) * np.clip(1 + depth / reach, 0, 1)
    cortex = (depth > -4) | (near & (np.abs(folds) < 0.7))
    hu[inside] = (WHITE_HU + 1.0 * patches)[inside]
    hu[inside & cortex] = (GREY_HU + 0.8 * patches)[inside & cortex]
    cerebellum = inside & (z < -22) & (y > 18)
    hu[cerebellum] = (34 + 1.2 * patches)[cerebellum]
    hu[inside & ((depth > -0.8) | (near & (np.abs(folds) < width)))] = CSF_HU + 6
    for solid in _INSIDE:
        _paint(hu, inside, solid, place, 1)
    for solid in _INSIDE_PAIRS:
        for side in (-1, 1):
            _paint(hu, inside, solid, place, side)
    midline = np.abs(x) + 0 * y + 0 * z
    cleft = inside & (z > 20) & ((depth > -14) | (z > 40))
    hu[cleft & (midline < 1.6)] = CSF_HU + 8
    hu[cleft & (midline < 0.7)] = 46.0  # falx
    hu[inside & (midline < 3.5) & (depth > -5) & (y > 20) & (z > -15)] = 50.0  # sagittal sinus


def _base(hu: Field, depth: Field, fine: Field, place: _Place) -> None:
    """The skull base slopes from the brow to the ear; in front of it and below is the face."""
    _, y, z = place
    floor = np.where(y < 6, -26 - (y + 85) * 0.3, -66.0)
    below = (z < floor) & (depth < 10)
    hu[below & (z > floor - 4)] = BONE_HU * 0.8
    deep = below & (z <= floor - 4)
    hu[deep] = np.where(fine > 0.6, FAT_HU + 20, MUSCLE_HU)[deep]
    face = deep | (below & (y < -20)) | ((z < -20) & (y < -45) & (depth < 8))
    for solid in _FACE:
        _paint(hu, face, solid, place, 1)
    for side in (-1, 1):
        for solid in _FACE_PAIRS:
            _paint(hu, face, solid, place, side)
        for solid in _EAR_PAIRS:
            _paint(hu, depth < 10, solid, place, side)
        cells = _ellipsoid(place, (side * 58, 24, -56), (8, 11, 11)) & (fine > 0.0)
        hu[cells] = -700.0
    spine = _ellipsoid(place, (0, 34, -84), (24, 24, 19))
    hu[spine] = BONE_HU * 0.7
    hu[_ellipsoid(place, (0, 36, -80), (14, 15, 26))] = CSF_HU + 6
    hu[_ellipsoid(place, (0, 36, -80), (8, 8, 26))] = 33.0  # cord


def _lesion(hu: Field, inside: _Mask, depth: Field, patches: Field, place: _Place) -> None:
    """A blow to the right: a dense lens under the skull, a crack, dense sulci, a swollen scalp.

    The scalp belongs to it as in life: patients with such a lens have been hit.
    """
    x, y, z = place
    right = x < 0
    along = ((y + 5) / 60) ** 2 + ((z - 28) / 45) ** 2  # 0 in the middle of the lens, 1 at its rim
    spaces = inside & (hu < CSF_HU + 8) & (z > -30) & (depth > -40)
    hu[spaces] = LESION_HU - 10
    lens = inside & right & (depth > -30 * (1 - along))
    hu[lens] = (LESION_HU - 4 + 5 * patches)[lens]
    skull = 6.5 + 0.8 * patches
    crack = (
        right & (np.abs(z - 0.3 * y - 25) < 1.2) & (depth > -0.5) & (depth < skull) & (along < 1)
    )
    hu[crack] = MUSCLE_HU - 12
    surface = skull + 6 + 14 * np.clip(1 - along / 2, 0, 1) * np.clip(-x / 25, 0, 1)
    swollen = right & (depth > skull) & (depth < surface - 1.5) & (surface > skull + 7)
    hu[swollen] = (MUSCLE_HU + 6 * patches)[swollen]
    hu[right & (depth >= surface - 1.5) & (depth < surface)] = SKIN_HU


def _vessels(hu: Field, depth: Field, place: _Place) -> None:
    x, y, z = place
    bright = (np.abs(x) < 4) & (depth > -6) & (depth < 0) & (y > 0) & (z > -15)
    for side in (-1, 1):
        bright = bright | _ellipsoid(place, (side * 24, -14, -14), (24, 2.5, 2.5))
        bright = bright | _ellipsoid(place, (side * 10, -10, -50), (3, 3, 40))
        bright = bright | _ellipsoid(place, (side * 46, -10, 5), (2.5, 20, 2.5))
    bright = bright | _ellipsoid(place, (0, -40, 10), (2.5, 10, 26))
    hu[bright & (depth < 0)] = CONTRAST_HU


def _distance(place: _Place, centre: tuple[float, ...], axes: tuple[float, ...]) -> Field:
    """1 on the ellipsoid's surface, less inside."""
    parts = [((p - c) / a) ** 2 for p, c, a in zip(place, centre, axes, strict=True)]
    return np.asarray(np.sqrt(sum(parts)), dtype=np.float32)


def _ellipsoid(place: _Place, centre: tuple[float, ...], axes: tuple[float, ...]) -> _Mask:
    return _distance(place, centre, axes) < 1


def _paint(hu: Field, within: _Mask, solid: _Solid, place: _Place, side: int) -> None:
    """Give an ellipsoid its value; only the box round it is looked at."""
    (cx, cy, cz), axes, value = solid
    centre = (side * cx, cy, cz)
    spans = [_span(p, c, a) for p, c, a in zip(place, centre, axes, strict=True)]
    x, y, z = place
    near = (x[:, :, spans[0]], y[:, spans[1], :], z[spans[2], :, :])
    box = (spans[2], spans[1], spans[0])
    hu[box][within[box] & _ellipsoid(near, centre, axes)] = value


def _span(coordinates: Field, centre: float, half: float) -> slice:
    first = float(coordinates.flat[0])  # they are 1 mm apart
    low = max(int(centre - half - first) - 1, 0)
    return slice(low, max(int(centre + half - first) + 2, low))


def _blur(hu: Field, sigma_mm: float) -> Field:
    """What the scanner's point spread leaves of sharp edges."""
    return np.asarray(gaussian_filter(hu, sigma_mm), dtype=np.float32)
