"""Size, grey and noise of the body, judged by a manifest's limits: what no real picture is like."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from db.result import Eligibility
from inference.body import Box, body_masks, usual_box
from inference.manifest import Gate, Manifest
from inference.volume import Volume
from inference.window import slabs

Pair = tuple[float, float]

# So many images, evenly spread, are enough for a median over millions of pixels.
_NOISE_IMAGES = 16

# Median absolute difference of a pixel from its four neighbours' mean, for white noise of standard
# deviation 1: 0.6745 times the square root of 1 + 1/4.
_MEDIAN_OF_WHITE = 0.754


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of a volume's body beside what the manifest allows."""

    rule: str  # body_area | body_extent | gate:<name>
    value: float
    limits: Pair | None  # both belong to it; None: any
    unit: str
    reason: str  # what is said of a value outside

    @property
    def is_broken(self) -> bool:
        return self.limits is not None and not self.limits[0] <= self.value <= self.limits[1]


def body_refusal(volume: Volume, manifest: Manifest) -> Eligibility | None:
    """The first of the manifest's limits on the body that a volume breaks."""
    if manifest.pixels.body is None:
        return None
    is_empty = True
    for measure in measures(volume, manifest):
        is_empty = False
        if measure.limits is not None and measure.is_broken:
            found = f"{measure.value:.3g} {measure.unit}"
            limit = f"{measure.limits[0]:g}..{measure.limits[1]:g} {measure.unit}"
            return Eligibility(measure.rule, found, limit, measure.reason)
    if is_empty:
        return Eligibility("body", "none", "a body", "Nothing in the images looks like a body.")
    return None


def measures(volume: Volume, manifest: Manifest) -> Iterator[Measure]:
    """Every figure that the manifest's pixel rules judge, in their order; none without a body.

    Sizes are taken only where the size of a pixel is known; see `needs_spacing`.
    """
    body = manifest.pixels.body
    if body is None:
        return
    masks, step = body_masks(volume.pixels, body.above)
    if not masks.any():
        return
    if volume.spacing_mm is not None:
        row_mm, column_mm = (spacing * step for spacing in volume.spacing_mm)
        area = int(masks.sum(axis=(1, 2)).max()) * row_mm * column_mm / 100
        yield Measure("body_area", area, body.area_cm2, "cm2", "The body's area is unlikely.")
        side = _extent(usual_box(masks), row_mm, column_mm)
        reason = "The body's extent is unlikely."
        yield Measure("body_extent", side, body.extent_mm, "mm", reason)
    inside = np.clip(volume.pixels[:, ::step, ::step][masks], *manifest.pixels.value_range)
    yield from (_measure(gate, inside, volume, manifest) for gate in manifest.pixels.gates)


def _extent(box: Box | None, row_mm: float, column_mm: float) -> float:
    """The longer side in mm; 0 where the images' bodies have no place in common."""
    if box is None:
        return 0.0
    return max((box.bottom - box.top) * row_mm, (box.right - box.left) * column_mm)


def _measure(
    gate: Gate, inside: NDArray[np.float32], volume: Volume, manifest: Manifest
) -> Measure:
    rule = f"gate:{gate.name}"
    if gate.noise is not None:
        reason = f"The {gate.name} in the pixel values is unlikely."
        value, unit = _noise(volume, manifest, gate.values), manifest.pixels.domain
        return Measure(rule, value, gate.noise, unit, reason)
    share = float(np.mean((inside >= gate.values[0]) & (inside < gate.values[1])))
    reason = f"The share of {gate.name} in the pixel values is unlikely."
    return Measure(rule, share, gate.share, "of the body", reason)


def _noise(volume: Volume, manifest: Manifest, values: Pair) -> float:
    """Of the slabs that the model sees: thin images are noisy, and their average is not.

    Taken from pixel to pixel, so that a soft kernel, whose grains are wider, counts for less. 0
    where no neighbours' mean has these values: shares judge that.
    """
    groups = slabs(volume, manifest.input.slab_mm)
    every = -(-len(groups) // _NOISE_IMAGES)
    found = [_differences(volume.pixels[list(g)], manifest, values) for g in groups[::every]]
    differences = np.concatenate(found)
    return float(np.median(differences)) / _MEDIAN_OF_WHITE if len(differences) else 0.0


def _differences(
    images: NDArray[np.float32], manifest: Manifest, values: Pair
) -> NDArray[np.float32]:
    """(n, rows, cols), averaged -> (pixels,): each from the mean of its four neighbours."""
    image = np.clip(images.mean(axis=0), *manifest.pixels.value_range)
    beside = (image[:-2, 1:-1] + image[2:, 1:-1] + image[1:-1, :-2] + image[1:-1, 2:]) / 4
    chosen = (beside >= values[0]) & (beside < values[1])
    made: NDArray[np.float32] = np.abs(image[1:-1, 1:-1] - beside)[chosen]
    return made
