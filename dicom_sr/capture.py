"""Secondary Capture images: the summary page and one overlay a key image."""

from collections.abc import Mapping, Sequence

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from db import paint
from db.result import Code, ImageRef
from dicom_sr import evidence, heat, pages
from dicom_sr.attributes import GEOMETRY
from dicom_sr.plan import MANUFACTURER, MODEL_NAME, OVERLAY, SUMMARY, Issue, Plan

#: Its definition names Grad-CAM; the other methods weigh activations by gradients, too.
GRAD_CAM = Code("130403", "DCM", "Gradient-weighted class activation")
SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")
SHOWN_THUMBNAILS = 3


def painted(
    plan: Plan,
    headers: Mapping[int, Dataset],
    pixels: Mapping[int, NDArray[np.float32]],
    maps: Mapping[int, NDArray[np.float32]],
) -> dict[int, heat.Colour]:
    """The slices under their heat maps, by index into `plan.key_images`.

    `headers` and `pixels` are keyed by image index, `maps` by index into `finding.key_images`.
    """
    finding, output = plan.finding, plan.finding.output
    pictures = {}
    for index, key in enumerate(plan.key_images):
        is_inverted = headers[key.image].get("PhotometricInterpretation") == "MONOCHROME1"
        values = pixels[key.image]
        grey = paint.grey_levels(
            values, output.window_centre, output.window_width, is_inverted=is_inverted
        )
        modality = str(headers[key.image].get("Modality", ""))
        cam = paint.inside(maps[finding.key_images.index(key)], values, modality)
        pictures[index] = heat.blend(grey, cam, finding.map_scale, paint.opacity(plan.label(key)))
    return pictures


def summary(plan: Plan, header: Dataset, pictures: Mapping[int, heat.Colour]) -> Dataset:
    """The summary page; `header` is of the first analysed image."""
    strongest = sorted(pictures, key=lambda index: plan.key_images[index].raw, reverse=True)
    shown = {index: pictures[index] for index in strongest[:SHOWN_THUMBNAILS]}
    page = pages.summary_page(plan, shown)
    uid = plan.uid(SUMMARY)
    built = captured(plan, header, page, SUMMARY, uid, 1, plan.output.summary_series)
    built.PatientOrientation = None  # 2C, and a page has none
    built.DerivationDescription = "AI result summary page; not for primary diagnosis"
    sources = [plan.image(key) for key in plan.key_images] or [plan.finding.images[0]]
    refer(built, sources, is_in_place=False)
    return built


def overlay(
    plan: Plan, index: int, header: Dataset, study_header: Dataset, picture: heat.Colour
) -> Dataset:
    """One key image under its heat map, in the source's matrix and place.

    `header` is of the key image itself, `study_header` of the first analysed one.
    """
    image = plan.image(plan.key_images[index])
    page = pages.overlay_page(plan, picture)
    uid = plan.pictures[index].sop_instance_uid
    built = captured(plan, study_header, page, OVERLAY, uid, index + 1, plan.output.overlay_series)
    _lay_over(built, header)
    derive(built, plan, [image])
    return built


def derive(built: Dataset, plan: Plan, images: Sequence[ImageRef]) -> None:
    """Say that overlays lie on these images, and how they came about."""
    made, word = plan.output.map_word, plan.output.image_word
    built.DerivationDescription = f"{made} overlay on source {word}; not for primary diagnosis"
    built.DerivationCodeSequence = [evidence.coded(GRAD_CAM)]
    refer(built, images, is_in_place=True)


def captured(
    plan: Issue, header: Dataset, page: heat.Colour, role: str, uid: str, number: int, name: str
) -> Dataset:
    """A page as a Secondary Capture; `header` gives patient and study."""
    built = hd.sc.SCImage.from_ref_dataset(
        evidence.carrier(header),
        pixel_array=np.ascontiguousarray(page),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),  # overwritten by each kind
        sop_instance_uid=uid,
        instance_number=number,
        transfer_syntax_uid=RLELossless if plan.variant.is_rle else ExplicitVRLittleEndian,
        **evidence.series_values(plan, role, name),
    )
    built.ConversionType = "WSD"
    built.SecondaryCaptureDeviceManufacturer = MANUFACTURER
    built.SecondaryCaptureDeviceManufacturerModelName = MODEL_NAME
    built.SecondaryCaptureDeviceSoftwareVersions = evidence.software_versions(plan)
    built.BurnedInAnnotation = "NO"  # no identity is drawn: pages.py gets none
    built.RecognizableVisualFeatures = "NO"
    describe(built, plan, header)
    evidence.stamp(built, plan, header)
    return built


def describe(built: Dataset, plan: Issue, header: Dataset) -> None:
    """What every image made of the source states: which part of the body, and whether lossy."""
    built.BodyPartExamined = plan.output.body_part
    if plan.output.laterality:
        built.Laterality = plan.output.laterality
    _keep_loss(built, header)


def _keep_loss(built: Dataset, header: Dataset) -> None:
    """Once lossy, always lossy: never reset (PS3.3 C.7.6.1.1.5)."""
    built.LossyImageCompression = "01" if header.get("LossyImageCompression") == "01" else "00"
    if built.LossyImageCompression == "01":
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if header.get(keyword) not in (None, ""):
                built[keyword] = header[keyword]


def _lay_over(built: Dataset, header: Dataset) -> None:
    for keyword in GEOMETRY:
        if header.get(keyword) not in (None, ""):
            built[keyword] = header[keyword]
    if "FrameOfReferenceUID" in built and "PositionReferenceIndicator" not in built:
        built.PositionReferenceIndicator = ""  # type 2 of its module
    built.PatientOrientation = orientation(header)


def orientation(header: Dataset) -> list[str] | None:
    """Row and column direction in letters: from the cosines, else as the source says."""
    cosines = header.get("ImageOrientationPatient")
    if cosines is not None and len(cosines) == 6:
        numbers = [float(cosine) for cosine in cosines]
        return [_letters(numbers[:3]), _letters(numbers[3:])]
    stated = header.get("PatientOrientation")
    return list(stated) if stated else None


def _letters(direction: Sequence[float]) -> str:
    """The letter of the axis a direction lies nearest to (PS3.3 C.7.6.1.1.1)."""
    axis = max(range(3), key=lambda place: abs(direction[place]))
    return ("RL", "AP", "FH")[axis][direction[axis] > 0]


def refer(built: Dataset, images: Sequence[ImageRef], *, is_in_place: bool) -> None:
    """Name the source images, and the series they are in.

    `is_in_place`: their pixels lie where those of `built` do.
    """
    built.SourceImageSequence = [source_item(image, is_in_place=is_in_place) for image in images]
    _name_series(built, images)


def source_item(image: ImageRef, *, is_in_place: bool) -> Dataset:
    """An item of a Source Image Sequence."""
    item = evidence.referenced(image)
    item.SpatialLocationsPreserved = "YES" if is_in_place else "NO"
    item.PurposeOfReferenceCodeSequence = [evidence.coded(SOURCE_IMAGE)]
    return item


def _name_series(built: Dataset, images: Sequence[ImageRef]) -> None:
    """Name the series that images are in, each instance once (Common Instance Reference)."""
    series: dict[str, dict[str, ImageRef]] = {}
    for image in images:
        references = series.setdefault(image.series_instance_uid, {})
        references[image.sop_instance_uid] = image
    built.ReferencedSeriesSequence = [
        _series_item(uid, list(held.values())) for uid, held in series.items()
    ]


def _series_item(series_instance_uid: str, images: Sequence[ImageRef]) -> Dataset:
    item = Dataset()
    item.SeriesInstanceUID = series_instance_uid
    item.ReferencedInstanceSequence = []
    for image in images:
        reference = Dataset()
        reference.ReferencedSOPClassUID = image.sop_class_uid
        reference.ReferencedSOPInstanceUID = image.sop_instance_uid
        item.ReferencedInstanceSequence.append(reference)
    return item
