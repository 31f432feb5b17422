"""Whether a bundle can judge a study, and on which images: by headers, then by pixels."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from db.header import InstanceHeader
from db.result import Eligibility
from inference import geometry, rules
from inference.gates import body_refusal
from inference.manifest import Manifest
from inference.volume import Volume
from inference.words import first_match

Member = tuple[str, InstanceHeader]  # instance id, header
Difference = Callable[[InstanceHeader], object]

# Of a series' images this share at positions that another one has makes it several passes over the
# same place (perfusion, phases), not a few slices sent twice.
_REPEATED = 0.2
_DIFFERENCES: tuple[Difference, ...] = (
    lambda header: header.image_type,
    lambda header: header.kernel.upper(),
    lambda header: header.acquisition_number,
)


@dataclass(frozen=True, slots=True)
class Selection:
    """The images to analyse; the same ones in whatever order they arrived."""

    series_instance_uids: tuple[str, ...]  # one where the unit is a volume
    instance_ids: tuple[str, ...]  # in order along the normal; images by themselves: best first
    missing: tuple[str, ...] = ()  # what a complete series would have, in words
    description: str = ""  # why these, among the eligible ones

    @property
    def is_complete(self) -> bool:
        """No holes, and the manifest's minimum is covered."""
        return not self.missing


def judge(headers: Mapping[str, InstanceHeader], manifest: Manifest) -> Selection | Eligibility:
    """Choose the images of one study that this bundle should analyse, or say why there are none.

    headers : by instance id, all of one study, in any order

    Of several refusals the one is told that broke the latest rule: it came nearest. Only if every
    image is of another modality, object or body part is the study not applicable at all.
    """
    members = sorted(headers.items(), key=lambda member: (member[1].sop_instance_uid, member[0]))
    accepted: list[Member] = []
    refused: list[tuple[int, Eligibility]] = []
    for member in members:
        if broken := rules.refusal(member[1], manifest):
            refused.append(broken)
        else:
            accepted.append(member)
    if not accepted:
        return _nearest(refused, manifest)
    if manifest.selection.unit == "image":
        return _images(accepted, manifest)
    return _series(accepted, manifest)


def check_pixels(volume: Volume, manifest: Manifest) -> Eligibility | None:
    """Judge the volume itself: what headers cannot tell, or told wrongly. None: accepted."""
    least = manifest.selection.min_images
    if len(volume.pixels) < least:
        reason = "Too few images at different positions."
        return Eligibility("images", str(len(volume.pixels)), f">= {least}", reason)
    if volume.positions_mm is not None and (
        broken := rules.orientation_refusal(volume.orientation, manifest)
    ):
        return broken
    if manifest.pixels.needs_spacing and volume.spacing_mm is None:
        reason = "The size of a pixel is not stated."
        return Eligibility("pixel_spacing", "not stated", "> 0 mm", reason)
    return body_refusal(volume, manifest)


def _nearest(refused: Sequence[tuple[int, Eligibility]], manifest: Manifest) -> Eligibility:
    if not refused:
        allowed = ", ".join(manifest.applies.modalities)
        return Eligibility(
            "images", "none", allowed, "The study has no images.", is_applicable=False
        )
    return max(refused, key=lambda item: (item[0], item[1].value, item[1].limit))[1]


def _images(accepted: Sequence[Member], manifest: Manifest) -> Selection:
    """Images by themselves, best view first."""
    views = manifest.selection.views

    def rank(member: Member) -> tuple[object, ...]:
        header = member[1]
        view = header.view_position.upper()
        place = views.index(view) if view in views else len(views)
        return place, *_numbers(header), header.sop_instance_uid, member[0]

    chosen = sorted(accepted, key=rank)[: manifest.selection.max_images]
    least, found = manifest.selection.min_images, len(chosen)
    missing = (f"{found} of at least {least} images",) if found < least else ()
    series = tuple(dict.fromkeys(header.series_instance_uid for _, header in chosen))
    words = f"{found} of {len(accepted)} eligible images"
    return Selection(series, tuple(member[0] for member in chosen), missing, words)


@dataclass(frozen=True, slots=True)
class _Stack:
    """Images of one series that make one volume, in order along the normal."""

    members: tuple[Member, ...]
    positions: tuple[
        float, ...
    ]  # distinct, ascending; of a multi-frame object only its first frame's
    repeated: float  # share of images at a position that another has
    missing: tuple[str, ...]
    coverage_mm: float


def _series(accepted: Sequence[Member], manifest: Manifest) -> Selection | Eligibility:
    """The best of the eligible volumes."""
    stacks = [stack for group in _groups(accepted) for stack in _stacks(group, manifest)]
    single = [stack for stack in stacks if stack.repeated <= _REPEATED]
    if not single:
        share = min(stack.repeated for stack in stacks)
        reason = "The series passes several times over the same place."
        return Eligibility("repeated_positions", f"{share:.0%}", f"<= {_REPEATED:.0%}", reason)
    fitting = [s for s in single if _count(s) <= manifest.selection.max_images]
    if not fitting:
        least, limit = min(map(_count, single)), manifest.selection.max_images
        return Eligibility("images", str(least), f"<= {limit}", "The series has too many images.")
    best = min(fitting, key=lambda stack: _rank(stack, manifest))
    header = best.members[0][1]
    words = (
        f"{len(fitting)} eligible, chosen: {len(best.members)} x {header.slice_thickness or 0:g} mm"
    )
    ids = tuple(member[0] for member in best.members)
    return Selection((header.series_instance_uid,), ids, best.missing, words)


def _groups(accepted: Iterable[Member]) -> list[list[Member]]:
    """Split by series, then by matrix, size of a pixel and orientation.

    `accepted` comes sorted, so that the first orientation of a group, which others are compared
    with, is the same one on every run. A multi-frame object is a volume by itself.
    """
    groups: dict[tuple[object, ...], list[Member]] = defaultdict(list)
    turns: list[geometry.Cosines] = []
    for member in accepted:
        header = member[1]
        cosines = header.orientation or ()
        turn = next(
            (i for i, known in enumerate(turns) if np.allclose(known, cosines, atol=0.01)), None
        )
        if turn is None:
            turn = len(turns)
            turns.append(cosines)
        alone = header.sop_instance_uid if header.frames > 1 else ""
        spacing = tuple(round(value, 3) for value in header.pixel_spacing or ())
        key = (header.series_instance_uid, header.rows, header.columns, spacing, turn, alone)
        groups[key].append(member)
    return list(groups.values())


def _stacks(group: Sequence[Member], manifest: Manifest) -> list[_Stack]:
    """One stack; or several, where images lie at one place, by what tells them apart.

    Not before: one scan may change its kernel half way up, or count an
    acquisition for every slice.
    """
    stacks = [_stack(group, manifest)]
    for difference in _DIFFERENCES:
        if all(stack.repeated <= _REPEATED for stack in stacks):
            break
        stacks = [_stack(part, manifest) for s in stacks for part in _parted(s, difference)]
    return stacks


def _parted(stack: _Stack, difference: Difference) -> list[list[Member]]:
    if stack.repeated <= _REPEATED:
        return [list(stack.members)]
    parts: dict[object, list[Member]] = defaultdict(list)
    for member in stack.members:
        parts[difference(member[1])].append(member)
    return list(parts.values())


def _stack(group: Sequence[Member], manifest: Manifest) -> _Stack:
    placed = sorted((_place(h), *_numbers(h), h.sop_instance_uid, i) for i, h in group)
    headers = dict(group)
    distinct: list[tuple[float, InstanceHeader]] = []
    for place, *_, instance_id in placed:
        if not distinct or place - distinct[-1][0] > geometry.SAME_PLACE_MM:
            distinct.append((place, headers[instance_id]))
    positions = tuple(place for place, _ in distinct)
    thickness = [header.slice_thickness for _, header in distinct]
    ends = ((thickness[0] or 0.0) + (thickness[-1] or 0.0)) / 2
    coverage = positions[-1] - positions[0] + ends
    members = tuple((item[-1], headers[item[-1]]) for item in placed)
    missing = _missing(members, positions, thickness, coverage, manifest)
    repeated = 1 - len(positions) / len(members)
    return _Stack(members, positions, repeated, missing, coverage)


def _place(header: InstanceHeader) -> float:
    """Along the normal; a multi-frame object is alone in its stack."""
    assert header.orientation is not None  # the rules have seen to it
    return geometry.position_along(header.orientation, header.position or (0.0, 0.0, 0.0))


def _missing(
    members: Sequence[Member],
    positions: Sequence[float],
    thickness: Sequence[float | None],
    coverage: float,
    manifest: Manifest,
) -> tuple[str, ...]:
    """What the stack lacks to be whole. A multi-frame object came whole, or not at all."""
    selection, missing = manifest.selection, []
    count = max(len(positions), members[0][1].frames)
    if count < selection.min_images:
        missing.append(f"{count} of at least {selection.min_images} images")
    if members[0][1].frames > 1:
        return tuple(missing)
    if coverage < selection.min_coverage_mm:
        missing.append(f"{coverage:.0f} of at least {selection.min_coverage_mm:.0f} mm")
    for before, after in geometry.holes(positions, thickness, selection.hole_factor):
        missing.append(f"images between {before:.1f} and {after:.1f} mm")
    return tuple(missing)


def _count(stack: _Stack) -> int:
    return max(len(stack.members), stack.members[0][1].frames)


def _rank(stack: _Stack, manifest: Manifest) -> tuple[object, ...]:
    """Complete, kernel, thickness, original before derived, coverage; then number and UID."""
    selection, header = manifest.selection, stack.members[0][1]
    kernel = first_match(header.kernel, selection.preferred_kernels)
    wanted, thickness = selection.preferred_thickness_mm, header.slice_thickness
    off = abs((thickness or 0.0) - wanted) if wanted is not None else 0.0
    return (
        bool(stack.missing),
        selection.preferred_kernels.index(kernel) if kernel else len(selection.preferred_kernels),
        round(off, 1),
        "ORIGINAL" not in header.image_type,
        -round(stack.coverage_mm),
        -_count(stack),
        *_numbers(header),
        header.series_instance_uid,
        header.sop_instance_uid,
    )


def _numbers(header: InstanceHeader) -> tuple[int, int]:
    """Series and instance number; an absent one comes last."""
    absent = 2**31
    return (
        header.series_number if header.series_number is not None else absent,
        header.instance_number if header.instance_number is not None else absent,
    )
