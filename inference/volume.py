"""The images of one analysis as an array, in order, with what is known of where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from db.errors import PermanentError
from db.header import InstanceHeader
from db.result import ImageRef
from inference import geometry
from inference.manifest import Manifest
from inference.voi import shown_grey


class NoVolume(PermanentError):
    """The images do not make one array: different matrices, or none has a position."""

    code: ClassVar[str] = "no_volume"


@dataclass(frozen=True, slots=True)
class Decoded:
    """One instance: its header, and what `db.pixels.read_images` gave of it."""

    instance_id: str
    header: InstanceHeader
    meta: dict[str, Any]
    pixels: NDArray[np.float32]  # (frames, rows, cols), the modality's rescaled values


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """Images in order along the normal (towards head, back or left), as acquired: not turned.

    Where `positions_mm` is None the images have no order in space: each stands for itself.
    """

    pixels: NDArray[np.float32]  # (slices, rows, cols), in the domain the manifest names
    refs: tuple[ImageRef, ...]  # one an image
    positions_mm: tuple[float, ...] | None  # ascending
    thickness_mm: tuple[float | None, ...]
    spacing_mm: tuple[float, float] | None  # between rows, between columns
    orientation: geometry.Cosines | None
    holes: tuple[tuple[float, float], ...] = ()  # positions before and after each
    notes: tuple[str, ...] = ()  # what a reader must know
    is_lossy: bool = False

    def __post_init__(self) -> None:
        n = len(self.pixels)
        if self.pixels.ndim != 3 or n == 0 or n != len(self.refs) or n != len(self.thickness_mm):
            raise ValueError(f"not a volume: pixels {self.pixels.shape}, {len(self.refs)} images")
        if self.positions_mm is not None and len(self.positions_mm) != n:
            raise ValueError("a volume needs one position an image, or none at all")

    @property
    def coverage_mm(self) -> float:
        """First to last image, half their thickness at each end included; 0 without positions."""
        if self.positions_mm is None:
            return 0.0
        ends = ((self.thickness_mm[0] or 0.0) + (self.thickness_mm[-1] or 0.0)) / 2
        return self.positions_mm[-1] - self.positions_mm[0] + ends


def build_volume(images: Sequence[Decoded], manifest: Manifest) -> Volume:
    """The volume of a selection's images, whatever order they come in.

    Raises
    ------
    NoVolume
        If the images do not share one matrix or orientation, or lack positions, though the
        manifest's unit is a volume.
    """
    slices = [single for image in images for single in _slices(image, manifest)]
    if not slices:
        raise NoVolume("no image")
    if manifest.selection.unit == "image":
        return _singles(slices)
    return _stack(slices, manifest.selection.hole_factor)


def volume_from_pictures(
    grey: NDArray[np.uint8],
    value_range: tuple[float, float],
    *,
    spacing_mm: tuple[float, float] | None = None,
    step_mm: float | None = 5.0,
) -> Volume:
    """A volume from 8-bit pictures of a known window: 0 is the range's lower end, 255 its upper.

    grey : shape (slices, rows, cols), in order towards head, back or left, turned as usually shown.
    step_mm : None where each picture stands for itself.
    """
    low, high = value_range
    values = grey.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
    positions = None if step_mm is None else tuple(step_mm * i for i in range(len(grey)))
    rows, columns = grey.shape[1:]
    refs = tuple(
        ImageRef(f"picture-{i}", "", "", "", None, i + 1, at, rows, columns)
        for i, at in enumerate(positions or (None,) * len(grey))
    )
    thickness = (step_mm,) * len(grey)
    orientation = None if step_mm is None else (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    return Volume(values, refs, positions, thickness, spacing_mm, orientation)


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    ref: ImageRef
    pixels: NDArray[np.float32]  # (rows, cols)
    position: tuple[float, ...] | None
    orientation: geometry.Cosines | None
    spacing: tuple[float, float] | None
    thickness: float | None
    is_lossy: bool


def _slices(image: Decoded, manifest: Manifest) -> list[_Slice]:
    pairs = zip(image.meta["frames"], image.pixels, strict=True)
    return [_slice(image, frame, pixels, manifest) for frame, pixels in pairs]


def _slice(
    image: Decoded, frame: dict[str, Any], pixels: NDArray[np.float32], manifest: Manifest
) -> _Slice:
    header, spacing = image.header, frame["spacing"]
    is_shown = manifest.pixels.domain == "VOI"
    return _Slice(
        ref=ImageRef(
            instance_id=image.instance_id,
            sop_class_uid=header.sop_class_uid,
            sop_instance_uid=header.sop_instance_uid,
            series_instance_uid=header.series_instance_uid,
            frame=frame["frame"],
            instance_number=header.instance_number,
            position_mm=None,
            rows=pixels.shape[0],
            columns=pixels.shape[1],
        ),
        pixels=shown_grey(pixels, frame, image.meta) if is_shown else pixels,
        position=tuple(frame["position"]) if frame["position"] else None,
        orientation=tuple(frame["orientation"]) if frame["orientation"] else None,
        spacing=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
        thickness=frame["thickness"],
        is_lossy=bool(image.meta["is_lossy"]),
    )


def _singles(slices: Sequence[_Slice]) -> Volume:
    """Images by themselves, in the order given; smaller ones lie at the top left of the array."""
    rows = max(single.ref.rows for single in slices)
    columns = max(single.ref.columns for single in slices)
    pixels = np.zeros((len(slices), rows, columns), np.float32)
    for into, single in zip(pixels, slices, strict=True):
        into[: single.ref.rows, : single.ref.columns] = single.pixels
    return Volume(
        pixels=pixels,
        refs=tuple(single.ref for single in slices),
        positions_mm=None,
        thickness_mm=(None,) * len(slices),
        spacing_mm=slices[0].spacing,
        orientation=None,
        is_lossy=any(single.is_lossy for single in slices),
    )


def _stack(slices: Sequence[_Slice], hole_factor: float) -> Volume:
    orientation = _common_orientation(slices)
    placed = sorted(
        ((geometry.position_along(orientation, each.position or ()), each) for each in slices),
        key=lambda item: (round(item[0], 3), *_order(item[1].ref)),
    )
    kept = [placed[0]]
    for position, single in placed[1:]:
        if position - kept[-1][0] > geometry.SAME_PLACE_MM:
            kept.append((position, single))
    positions = tuple(position for position, _ in kept)
    thickness = tuple(single.thickness for _, single in kept)
    holes = geometry.holes(positions, thickness, hole_factor)
    return Volume(
        pixels=np.stack([single.pixels for _, single in kept]),
        refs=tuple(replace(single.ref, position_mm=round(at, 4)) for at, single in kept),
        positions_mm=positions,
        thickness_mm=thickness,
        spacing_mm=kept[0][1].spacing,
        orientation=orientation,
        holes=holes,
        notes=_notes(len(placed) - len(kept), holes),
        is_lossy=any(single.is_lossy for _, single in kept),
    )


def _order(ref: ImageRef) -> tuple[int, int, str]:
    """Which of several images at one place is kept: the same one on every run."""
    return ref.instance_number or 0, ref.frame or 0, ref.sop_instance_uid


def _common_orientation(slices: Sequence[_Slice]) -> geometry.Cosines:
    first = min(slices, key=lambda single: single.ref.sop_instance_uid)
    orientation = first.orientation
    if orientation is None or not geometry.is_orthonormal(orientation):
        raise NoVolume("an image without a usable orientation")
    for single in slices:
        if single.position is None or len(single.position) != 3:
            raise NoVolume("an image without a position")
        if single.orientation is None or not np.allclose(
            single.orientation, orientation, atol=0.01
        ):
            raise NoVolume("the images differ in orientation")
        if single.pixels.shape != first.pixels.shape:
            raise NoVolume("the images differ in rows or columns")
    return orientation


def _notes(duplicates: int, holes: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    notes = []
    if duplicates:
        notes.append(f"{duplicates} image(s) at a position that another one has were left out")
    for before, after in holes:
        notes.append(f"images are missing between {before:.1f} and {after:.1f} mm")
    return tuple(notes)
