"""From a volume to what the model sees: one function, for training and for serving.

In order: thin slices are averaged to slabs; values are clipped to the manifest's range, and nothing
after that looks beyond it, for 8-bit training pictures knew no more; each image is turned as
usually shown; one square round the body is cut out of all of them; resized; windows and neighbours
become channels; normalised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from inference.body import Box, body_box
from inference.geometry import Reorientation, reorientation
from inference.manifest import InputSpec, PixelSpec
from inference.volume import Volume

# A series whose slices are at least this share of a slab is left as it is.
_THICK_ENOUGH = 0.75


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """What the model sees, and the way back to the source images."""

    inputs: NDArray[np.float32]  # (n, channels, size, size), normalised
    sources: tuple[tuple[int, ...], ...]  # for each input, the volume's images averaged into it
    boxes: tuple[Box, ...]  # for each input, what was cut out, in the turned matrix
    reorientation: Reorientation
    matrix: tuple[int, int]  # rows, columns of the volume, before turning

    def centre(self, index: int) -> int:
        """The volume's image in the middle of an input's slab."""
        return self.sources[index][len(self.sources[index]) // 2]


@dataclass(frozen=True, slots=True, eq=False)
class Cropped:
    """A volume turned, cut and resized, before windows: where training augments."""

    images: NDArray[np.float32]  # (n, size, size), in the pixels' domain, within value_range
    sources: tuple[tuple[int, ...], ...]
    boxes: tuple[Box, ...]
    reorientation: Reorientation


def model_input(volume: Volume, pixels: PixelSpec, spec: InputSpec) -> ModelInput:
    """Turn a volume into normalised model inputs, one an image or slab."""
    made = cropped(volume, pixels, spec)
    return ModelInput(
        as_channels(made.images, spec),
        made.sources,
        made.boxes,
        made.reorientation,
        volume.pixels.shape[1:],
    )


def cropped(volume: Volume, pixels: PixelSpec, spec: InputSpec) -> Cropped:
    """The first half of `model_input`: one image a slab, values as in the volume, clipped."""
    sources = slabs(volume, spec.slab_mm)
    low, high = pixels.value_range
    turn = reorientation(volume.orientation)
    averaged = np.stack([_average(volume.pixels, group) for group in sources])
    clipped = np.ascontiguousarray(turn.apply(np.clip(averaged, low, high)))
    boxes = _boxes(clipped, volume, turn, pixels, spec)
    small = np.stack(
        [_cut(image, box, spec.size, low) for image, box in zip(clipped, boxes, strict=True)]
    )
    return Cropped(small, sources, boxes, turn)


def slabs(volume: Volume, slab_mm: float | None) -> tuple[tuple[int, ...], ...]:
    """Groups of neighbouring images that together are as thick as a slab.

    A slab of a thin series is what a thicker acquisition would have shown, for partial volume is an
    average. Thick series, and single images, are left as they are: one image a group.
    """
    alone = tuple((index,) for index in range(len(volume.pixels)))
    positions = volume.positions_mm
    if slab_mm is None or positions is None or len(positions) < 3:
        return alone
    step = median(b - a for a, b in pairwise(positions))
    thickness = median([max(t or 0.0, step) for t in volume.thickness_mm])
    if thickness >= _THICK_ENOUGH * slab_mm:
        return alone
    groups: dict[int, list[int]] = {}
    for index, position in enumerate(positions):
        groups.setdefault(int((position - positions[0]) / slab_mm + 1e-6), []).append(index)
    made = [tuple(group) for group in groups.values()]
    if len(made) > 1 and len(made[-1]) * step < slab_mm / 2:  # a thin rest would be noise
        made[-2:] = [made[-2] + made[-1]]
    return tuple(made)


def _average(images: NDArray[np.float32], group: Sequence[int]) -> NDArray[np.float32]:
    if len(group) == 1:
        single: NDArray[np.float32] = images[group[0]]
        return single
    mean: NDArray[np.float32] = images[list(group)].mean(axis=0, dtype=np.float32)
    return mean


def _boxes(
    images: NDArray[np.float32],
    volume: Volume,
    turn: Reorientation,
    pixels: PixelSpec,
    spec: InputSpec,
) -> tuple[Box, ...]:
    """One box for a volume; for single images each has its own, since their matrices differ."""
    row_mm, column_mm = volume.spacing_mm or (1.0, 1.0)
    aspect = column_mm / row_mm if turn.transpose else row_mm / column_mm
    above = pixels.body.above if spec.crop == "body" and pixels.body else None
    if volume.positions_mm is not None:
        return (_box(images, above, aspect, spec.crop_margin),) * len(images)
    return tuple(
        _box(image[None, : ref.rows, : ref.columns], above, aspect, spec.crop_margin)
        for image, ref in zip(images, volume.refs, strict=True)
    )


def _box(images: NDArray[np.float32], above: float | None, aspect: float, margin: float) -> Box:
    whole = Box(0.0, 0.0, float(images.shape[1]), float(images.shape[2]))
    box = body_box(images, above) if above is not None else None
    return box.grown(margin).squared(aspect) if box else whole.squared(aspect)


def _cut(image: NDArray[np.float32], box: Box, size: int, outside: float) -> NDArray[np.float32]:
    """The box out of an image, filled with `outside` where it passes the matrix; (size, size)."""
    top, left, bottom, right = box.pixels
    cut = np.full((bottom - top, right - left), outside, np.float32)
    rows, columns = image.shape
    inside = image[max(top, 0) : min(bottom, rows), max(left, 0) : min(right, columns)]
    from_top, from_left = max(-top, 0), max(-left, 0)
    cut[from_top : from_top + inside.shape[0], from_left : from_left + inside.shape[1]] = inside
    return resize(cut, (size, size))


def resize(image: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """(rows, cols) -> shape, bilinear; when shrinking, the filter widens to cover all pixels.

    As torch's antialiased bilinear, without torch: loader processes run this, too.
    """
    rows, columns = _weights(image.shape[0], shape[0]), _weights(image.shape[1], shape[1])
    made: NDArray[np.float32] = np.ascontiguousarray((columns @ (rows @ image).T).T)
    return made


@lru_cache(maxsize=64)
def _weights(source: int, target: int) -> csr_array:
    """(target, source), sparse: a triangle filter between pixel centres; each row sums to 1."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(source)[None, :] - centres[:, None]) / max(scale, 1.0)
    # Beyond the first and last centre only one pixel is near; dividing by the sum repeats it.
    weights = np.clip(1.0 - distance, 0.0, None)
    return csr_array((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def as_channels(images: NDArray[np.float32], spec: InputSpec) -> NDArray[np.float32]:
    """The second half: windowed, neighbours beside, normalised.

    (n, size, size) -> (n, channels, size, size), the images in order along the normal
    """
    windowed = np.stack(
        [
            np.clip((images - np.float32(w.centre - w.width / 2)) / np.float32(w.width), 0, 1)
            for w in spec.windows
        ],
        axis=1,
    )  # (n, windows, size, size)
    last = len(images) - 1
    offsets = range(-spec.neighbours, spec.neighbours + 1)
    beside = [windowed[[min(max(i + by, 0), last) for i in range(last + 1)]] for by in offsets]
    stacked = np.concatenate(beside, axis=1)  # (n, channels, size, size)
    mean = np.asarray(spec.mean, np.float32)[None, :, None, None]
    std = np.asarray(spec.std, np.float32)[None, :, None, None]
    return np.ascontiguousarray((stacked - mean) / std, dtype=np.float32)
