"""Small content items of the structured report, in the words of PS3.16."""

from collections.abc import Sequence

import highdicom as hd
import numpy as np
from highdicom.sr import RelationshipTypeValues as Relationship
from pydicom import Dataset
from pydicom.sr.codedict import codes

from db.result import Code, ImageRef, LabelResult, Region, percent_exact
from db.wording import shown_threshold
from dicom_sr.evidence import PRIVATE_SCHEME, coded

PERCENT = Code("%", "UCUM", "Percent")
NO_UNITS = Code("1", "UCUM", "no units")
PROBABILITY = Code("122157", "DCM", "Probability")
RAW_SCORE = Code("RAWSCORE", PRIVATE_SCHEME, "Uncalibrated classifier output")
THRESHOLD = Code("DECTHR", PRIVATE_SCHEME, "Decision threshold")
PRESENCE = Code("121052", "DCM", "Presence of property")
PRESENCE_VALUES = {  # CID 240; the DCM codes 121053 and 121054 are retired
    True: Code("52101004", "SCT", "Present"),
    False: Code("272519000", "SCT", "Absent"),
    None: Code("373068000", "SCT", "Undetermined"),
}
COMMENT = Code("121106", "DCM", "Comment")
SOURCE_OF_MEASUREMENT = Code("121112", "DCM", "Source of Measurement")
VISUAL_EXPLANATION = Code("130401", "DCM", "Visual explanation")
MILLIMETRE = Code("mm", "UCUM", "mm")
PIXELS = Code("{pixels}", "UCUM", "Pixels")
COSINE = Code("{-1:1}", "UCUM", "{-1:1}")


def number(
    name: Code, value: float, unit: Code, relationship: Relationship = Relationship.CONTAINS
) -> hd.sr.NumContentItem:
    return hd.sr.NumContentItem(
        name=coded(name), value=value, unit=coded(unit), relationship_type=relationship
    )


def text(
    name: Code, value: str, relationship: Relationship = Relationship.CONTAINS
) -> hd.sr.TextContentItem:
    return hd.sr.TextContentItem(name=coded(name), value=value, relationship_type=relationship)


def code(
    name: Code, value: Code, relationship: Relationship = Relationship.CONTAINS
) -> hd.sr.CodeContentItem:
    return hd.sr.CodeContentItem(
        name=coded(name), value=coded(value), relationship_type=relationship
    )


def image(
    name: Code, sop_class: str, sop_instance: str, frame: int | None = None
) -> hd.sr.ImageContentItem:
    return hd.sr.ImageContentItem(
        name=coded(name),
        referenced_sop_class_uid=sop_class,
        referenced_sop_instance_uid=sop_instance,
        referenced_frame_numbers=frame,
        relationship_type=Relationship.CONTAINS,
    )


def source_image(reference: ImageRef) -> hd.sr.ImageContentItem:
    return image(
        SOURCE_OF_MEASUREMENT, reference.sop_class_uid, reference.sop_instance_uid, reference.frame
    )


def selected_from(reference: ImageRef) -> hd.sr.SourceImageForRegion:
    return hd.sr.SourceImageForRegion(
        referenced_sop_class_uid=reference.sop_class_uid,
        referenced_sop_instance_uid=reference.sop_instance_uid,
        referenced_frame_numbers=None if reference.frame is None else [reference.frame],
    )


def rectangle(region: Region, within: ImageRef) -> np.ndarray:
    """A closed polygon of (column, row) pairs, in the original matrix, shape (5, 2)."""
    left, right = (min(max(x, 0.0), float(within.columns)) for x in (region.left, region.right))
    top, bottom = (min(max(y, 0.0), float(within.rows)) for y in (region.top, region.bottom))
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])


def whole_image(reference: ImageRef) -> hd.sr.CoordinatesForMeasurement:
    """The classifier scored the whole image: the honest region, and OHIF opens no group without."""
    whole = Region(0.0, 0.0, float(reference.columns), float(reference.rows))
    return hd.sr.CoordinatesForMeasurement(
        graphic_type="POLYLINE",
        graphic_data=rectangle(whole, reference),
        source_image=selected_from(reference),
    )


def raw_score(
    output: float, relationship: Relationship = Relationship.CONTAINS
) -> hd.sr.NumContentItem:
    return number(RAW_SCORE, round(output, 4), NO_UNITS, relationship)


def measurement(label: LabelResult, top: ImageRef, *, is_anchored: bool) -> hd.sr.Measurement:
    """What a label's group measures: its probability, or for an exploratory label its raw score."""
    anchors = [whole_image(top)] if is_anchored else None
    if label.probability is None:
        score = round(label.raw.output, 4)
        return hd.sr.Measurement(
            name=coded(RAW_SCORE), value=score, unit=coded(NO_UNITS), referenced_coordinates=anchors
        )
    measured = hd.sr.Measurement(
        name=coded(PROBABILITY),
        value=percent_exact(label.probability.value),
        unit=coded(PERCENT),
        referenced_coordinates=anchors,
    )
    _children(measured[0]).append(raw_score(label.raw.output, Relationship.INFERRED_FROM))
    return measured


def presence(label: LabelResult) -> hd.sr.CodeContentItem:
    item = code(PRESENCE, PRESENCE_VALUES[label.is_present])
    threshold = shown_threshold(label)
    if threshold is not None:
        number_item = number(
            THRESHOLD, percent_exact(threshold), PERCENT, Relationship.INFERRED_FROM
        )
        _children(item).append(number_item)
    return item


def _children(item: Dataset) -> hd.sr.ContentSequence:
    """The item's content, made where it has none yet."""
    if "ContentSequence" not in item:
        item.ContentSequence = hd.sr.ContentSequence()
    children: hd.sr.ContentSequence = item.ContentSequence
    return children


def library_entry(reference: ImageRef, header: Dataset) -> hd.sr.ImageContentItem:
    """TID 1601 with the descriptors of TID 1602 and 1604 that the source has.

    highdicom's own raises where a source lacks one; a report must not be lost for that.
    """
    entry = image(
        Code("260753009", "SCT", "Source"),
        reference.sop_class_uid,
        reference.sop_instance_uid,
        reference.frame,
    )
    entry.ContentSequence = hd.sr.ContentSequence(_descriptors(reference, header))
    return entry


def _descriptors(reference: ImageRef, header: Dataset) -> Sequence[hd.sr.ContentItem]:
    context = Relationship.HAS_ACQ_CONTEXT
    found: list[hd.sr.ContentItem] = []
    if (modality := MODALITIES.get(str(header.get("Modality", "")))) is not None:
        found.append(code(Code("121139", "DCM", "Modality"), modality, context))
    if header.get("FrameOfReferenceUID"):
        found.append(
            hd.sr.UIDRefContentItem(
                name=codes.DCM.FrameOfReferenceUID,
                value=header.FrameOfReferenceUID,
                relationship_type=context,
            )
        )
    found.append(number(Code("110910", "DCM", "Pixel Data Rows"), reference.rows, PIXELS, context))
    found.append(
        number(Code("110911", "DCM", "Pixel Data Columns"), reference.columns, PIXELS, context)
    )
    for keyword, place, name, unit in GEOMETRY:
        values = header.get(keyword)
        if values not in (None, ""):
            value = values[place] if place is not None else values
            found.append(number(name, float(value), unit, context))
    return found


def _from_dictionary(keyword: str) -> Code:
    known = getattr(codes.DCM, keyword)
    return Code(known.value, known.scheme_designator, known.meaning)


#: Keyword, place in its value, concept (TID 1604), unit.
GEOMETRY: tuple[tuple[str, int | None, Code, Code], ...] = (
    ("PixelSpacing", 1, _from_dictionary("HorizontalPixelSpacing"), MILLIMETRE),
    ("PixelSpacing", 0, _from_dictionary("VerticalPixelSpacing"), MILLIMETRE),
    ("SliceThickness", None, _from_dictionary("SliceThickness"), MILLIMETRE),
    ("ImagePositionPatient", 0, _from_dictionary("ImagePositionPatientX"), MILLIMETRE),
    ("ImagePositionPatient", 1, _from_dictionary("ImagePositionPatientY"), MILLIMETRE),
    ("ImagePositionPatient", 2, _from_dictionary("ImagePositionPatientZ"), MILLIMETRE),
    ("ImageOrientationPatient", 0, _from_dictionary("ImageOrientationPatientRowX"), COSINE),
    ("ImageOrientationPatient", 1, _from_dictionary("ImageOrientationPatientRowY"), COSINE),
    ("ImageOrientationPatient", 2, _from_dictionary("ImageOrientationPatientRowZ"), COSINE),
    ("ImageOrientationPatient", 3, _from_dictionary("ImageOrientationPatientColumnX"), COSINE),
    ("ImageOrientationPatient", 4, _from_dictionary("ImageOrientationPatientColumnY"), COSINE),
    ("ImageOrientationPatient", 5, _from_dictionary("ImageOrientationPatientColumnZ"), COSINE),
)

#: CID 29 by Modality; an image of another one is listed without.
MODALITIES = {
    known.value: Code(known.value, known.scheme_designator, known.meaning)
    for known in codes.cid29.concepts.values()
}
