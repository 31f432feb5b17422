"""Bleeds drawn into slices that have none: what a head learns when patients are too few to tell.

Fitted on 36 bleeding patients alone, a head over frozen features hardly answers to a bright place
as such: it reads what else is there in the injured (measured: `answer.py`). A drawn
bleed is known to the pixel and comes without a swollen scalp, a fracture or a certain age. Only
slices of training patients are drawn into, and none is ever judged.

Three kinds, as blood lies: inside the brain, under the skull, in the spaces that hold fluid.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

Image = NDArray[np.float32]  # (rows, cols), Hounsfield units
Mask = NDArray[np.bool_]

#: Of the positive slices that a fit sees, where it sees drawn bleeds at all.
SHARE = 0.5

_BONE_HU = 90.0
_FLUID_HU = 18.0
_BLOOD_HU = (50.0, 88.0)
_LEAST_SHARE = 0.05  # of the image, inside the skull: with less there is no room
_LEAST_PIXELS = 30
_SEEN = 0.5  # of the bleed's density, from which a pixel counts as its own
_GRAIN_HU = 8.0
_TRIES = 4


def with_bleed(image: Image, rng: Generator) -> tuple[Image, Image]:
    """The slice with a bleed, and where it is, 0..1; nothing drawn and all 0 where is no room."""
    inner = inside_skull(image)
    nothing = np.zeros(image.shape, np.float32)
    if inner.mean() < _LEAST_SHARE:
        return image, nothing
    for _ in range(_TRIES):
        shape = _KINDS[rng.integers(len(_KINDS))](image, inner, rng) & inner
        if shape.sum() >= _LEAST_PIXELS:
            soft = ndimage.gaussian_filter(shape.astype(np.float32), rng.uniform(0.7, 2.0))
            soft *= inner
            soft /= soft.max()  # what is thin must not be blurred away
            return _filled(image, soft, inner, rng), (soft > _SEEN).astype(np.float32)
    return image, nothing


def inside_skull(image: Image) -> Mask:
    """What bone goes round on this slice; nothing where it does not close."""
    bone = ndimage.binary_closing(image > _BONE_HU, iterations=3)
    inner: Mask = ndimage.binary_fill_holes(bone) & ~ndimage.binary_dilation(bone)
    named, n = ndimage.label(inner)
    if n == 0:
        return inner
    largest: Mask = named == 1 + int(np.argmax(np.bincount(named.ravel())[1:]))
    return largest


def _in_brain(image: Image, inner: Mask, rng: Generator) -> Mask:
    """An uneven ellipse, from 2 mm to half a hemisphere."""
    side = image.shape[0]
    places = np.argwhere(inner)
    row, column = places[rng.integers(len(places))]
    long, ratio = np.exp(rng.uniform(np.log(0.015), np.log(0.16))) * side, rng.uniform(0.4, 1.0)
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:side, : image.shape[1]] - np.array([row, column])[:, None, None]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    radius = np.hypot(along / long, across / (long * ratio))
    made: Mask = radius + 0.5 * _smooth(image.shape, long / 2, rng) < 1
    return made


def _under_skull(image: Image, inner: Mask, rng: Generator) -> Mask:
    """A lens or a crescent along the bone."""
    depth = ndimage.distance_transform_edt(inner)
    middle = ndimage.center_of_mass(inner)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    angle = np.arctan2(y - middle[0], x - middle[1])
    away = np.abs((angle - rng.uniform(-np.pi, np.pi) + np.pi) % (2 * np.pi) - np.pi)
    half = np.radians(rng.uniform(12, 80))
    thick = np.exp(rng.uniform(np.log(0.012), np.log(0.09))) * image.shape[0]
    profile = np.cos(np.clip(away / half, 0, 1) * np.pi / 2) ** rng.uniform(0.4, 1.2)
    uneven = 1 + 0.3 * _smooth(image.shape, thick, rng)
    made: Mask = (depth < thick * profile * uneven) & (away < half)
    return made


def _in_fluid(image: Image, inner: Mask, rng: Generator) -> Mask:
    """What is dark as fluid in some part of the head: a ventricle, sulci, cisterns."""
    places = np.argwhere(inner & (image < _FLUID_HU))
    if not len(places):
        return np.zeros_like(inner)
    row, column = places[rng.integers(len(places))]
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    reach = rng.uniform(0.06, 0.25) * image.shape[0]
    fluid = ndimage.gaussian_filter(image, 1.0) < _FLUID_HU
    made: Mask = fluid & (np.hypot(y - row, x - column) < reach)
    return made


_KINDS: tuple[Callable[[Image, Mask, Generator], Mask], ...] = (
    _in_brain, _in_brain, _under_skull, _under_skull, _in_fluid,
)  # fmt: skip


def _filled(image: Image, soft: Image, inner: Mask, rng: Generator) -> Image:
    """Blood of uneven density, with the slice's own grain; in some a darker rim round it."""
    level = rng.uniform(*_BLOOD_HU)
    # Bone is near some of it: what its edge does to the mean is no grain.
    grain = np.clip(image - ndimage.gaussian_filter(image, 1.5), -_GRAIN_HU, _GRAIN_HU)
    uneven = np.clip(_smooth(image.shape, 8.0, rng), -1, 1)
    blood = level + rng.uniform(0, 8) * uneven + grain
    made = image
    if rng.random() < 0.4:
        rim = np.clip(ndimage.gaussian_filter(soft, rng.uniform(4, 9)) * 2, 0, 1) * inner
        made = made - rng.uniform(3, 12) * rim * (made > 0)
    made = made * (1 - soft) + np.maximum(blood, made) * soft
    result: Image = np.where(inner, made, image).astype(np.float32)
    return result


def _smooth(shape: tuple[int, ...], scale: float, rng: Generator) -> Image:
    """A random field of mean 0 and deviation 1, `scale` pixels coarse."""
    small = rng.standard_normal([max(int(side / max(scale, 2.0)), 2) + 1 for side in shape])
    factors = [side / n for side, n in zip(shape, small.shape, strict=True)]
    grown = ndimage.zoom(small, factors, order=1)[: shape[0], : shape[1]]
    made: Image = ((grown - grown.mean()) / (grown.std() + 1e-6)).astype(np.float32)
    return made
