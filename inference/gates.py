"""Size and grey of the body, judged by a manifest's limits: what no real picture is like."""

import numpy as np
from numpy.typing import NDArray

from db.result import Eligibility
from inference.body import body_masks, usual_box
from inference.manifest import BodySpec, Gate, Manifest
from inference.volume import Volume


def body_refusal(volume: Volume, manifest: Manifest) -> Eligibility | None:
    """The first of the manifest's limits on the body that a volume breaks.

    Sizes are judged only where the size of a pixel is known; see `needs_spacing`.
    """
    body = manifest.pixels.body
    if body is None:
        return None
    masks, step = body_masks(volume.pixels, body.above)
    if not masks.any():
        return Eligibility("body", "none", "a body", "Nothing in the images looks like a body.")
    if volume.spacing_mm is not None:
        row_mm, column_mm = volume.spacing_mm
        if broken := _size(masks, (row_mm * step, column_mm * step), body):
            return broken
    inside = np.clip(volume.pixels[:, ::step, ::step][masks], *manifest.pixels.value_range)
    return _shares(inside, manifest.pixels.gates)


def _size(
    masks: NDArray[np.bool_], spacing: tuple[float, float], body: BodySpec
) -> Eligibility | None:
    area = int(masks.sum(axis=(1, 2)).max()) * spacing[0] * spacing[1] / 100
    reason = "The body's area is unlikely."
    if broken := _outside("body_area", area, body.area_cm2, "cm2", reason):
        return broken
    box = usual_box(masks)
    if box is None:
        return None
    sides = (box.bottom - box.top) * spacing[0], (box.right - box.left) * spacing[1]
    reason = "The body's extent is unlikely."
    return _outside("body_extent", max(sides), body.extent_mm, "mm", reason)


def _shares(inside: NDArray[np.float32], gates: tuple[Gate, ...]) -> Eligibility | None:
    for gate in gates:
        share = float(np.mean((inside >= gate.values[0]) & (inside < gate.values[1])))
        reason = f"The share of {gate.name} in the pixel values is unlikely."
        if broken := _outside(f"gate:{gate.name}", share, gate.share, "of the body", reason):
            return broken
    return None


def _outside(
    rule: str, value: float, limits: tuple[float, float] | None, unit: str, reason: str
) -> Eligibility | None:
    if limits is None or limits[0] <= value <= limits[1]:
        return None
    return Eligibility(rule, f"{value:.3g} {unit}", f"{limits[0]:g}..{limits[1]:g} {unit}", reason)
