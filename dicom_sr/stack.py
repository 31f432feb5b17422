"""The overlays as frames of one object: a Multi-frame True Color Secondary Capture."""

from collections.abc import Mapping, Sequence

from highdicom.frame import encode_frame
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import encapsulate
from pydicom.uid import UID, MultiFrameTrueColorSecondaryCaptureImageStorage

from dicom_sr import capture, evidence, heat, pages
from dicom_sr.plan import OVERLAY, Plan

#: The functional groups that hold what a slice says at its top, in whose place they stand.
_MACROS = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PlanePositionSequence": ("ImagePositionPatient",),
}
#: Without one of these on any frame, no frame has a place.
_NEEDED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID")


def stacked(
    plan: Plan, headers: Mapping[int, Dataset], pictures: Mapping[int, heat.Colour]
) -> Dataset:
    """Frame n is key image n under its heat map; all have one matrix.

    `headers` are by image index, `pictures` by index into `plan.key_images`.
    """
    sources = [headers[key.image] for key in plan.key_images]
    frames = [pages.overlay_page(plan, pictures[i]) for i in range(len(sources))]
    uid, name = plan.pictures[0].sop_instance_uid, plan.output.overlay_series
    built = capture.captured(plan, headers[0], frames[0], OVERLAY, uid, 1, name)
    built.SOPClassUID = MultiFrameTrueColorSecondaryCaptureImageStorage
    built.file_meta = evidence.file_meta(built)
    _join(built, frames)
    _place(built, sources)
    ways = [capture.orientation(source) for source in sources]
    built.PatientOrientation = ways[0] if all(way == ways[0] for way in ways) else None
    capture.derive(built, plan, [plan.image(key) for key in plan.key_images])
    return built


def _join(built: Dataset, frames: Sequence[heat.Colour]) -> None:
    syntax = UID(built.file_meta.TransferSyntaxUID)
    encoded = [
        encode_frame(
            frame,
            transfer_syntax_uid=syntax,
            bits_allocated=8,
            bits_stored=8,
            photometric_interpretation="RGB",
            planar_configuration=0,
        )
        for frame in frames
    ]
    if syntax.is_encapsulated:
        built.PixelData = encapsulate(encoded)
    else:
        joined = b"".join(encoded)
        built.PixelData = joined + b"\0" * (len(joined) % 2)
    built.NumberOfFrames = len(frames)
    if len(frames) > 1:  # type 1C of C.8.6.3, and of C.8.6.4 with it
        built.FrameIncrementPointer = tag_for_keyword("PageNumberVector")
        built.PageNumberVector = list(range(1, len(frames) + 1))


def _place(built: Dataset, sources: Sequence[Dataset]) -> None:
    """Where each frame lies; what is the same for all is said once.

    Only the macros that this IOD has. Which slice a frame shows, the Source Image Sequence says:
    its items are in the order of the frames.
    """
    if not _have_place(sources):
        return
    built.FrameOfReferenceUID = sources[0].FrameOfReferenceUID
    built.PositionReferenceIndicator = sources[0].get("PositionReferenceIndicator", "")
    shared, own = Dataset(), [Dataset() for _ in sources]
    for macro, keywords in _MACROS.items():
        _spread(macro, [_copied(source, keywords) for source in sources], shared, own)
    built.SharedFunctionalGroupsSequence = [shared]
    built.PerFrameFunctionalGroupsSequence = own


def _have_place(sources: Sequence[Dataset]) -> bool:
    """Whether all lie in one space."""
    stated = all(source.get(keyword) for source in sources for keyword in _NEEDED)
    return stated and len({str(source.FrameOfReferenceUID) for source in sources}) == 1


def _spread(macro: str, items: Sequence[Dataset], shared: Dataset, own: Sequence[Dataset]) -> None:
    if all(item == items[0] for item in items):
        setattr(shared, macro, [items[0]])
        return
    for frame, item in zip(own, items, strict=True):
        setattr(frame, macro, [item])


def _copied(header: Dataset, keywords: Sequence[str]) -> Dataset:
    item = Dataset()
    for keyword in keywords:
        if header.get(keyword) not in (None, ""):
            item[keyword] = header[keyword]
    return item
