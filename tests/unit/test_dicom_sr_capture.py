"""Summary page, overlays and key objects (DICOM_OUTPUT 1, 3, 4)."""

import dataclasses
import io
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import RLELossless

from db import paint
from db.meta import IMPLEMENTATION_CLASS_UID
from db.result import LabelStatus, OutputSpec
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.plan import Context, Variant
from tests.findings import (
    by_index,
    label_result,
    make_finding,
    make_maps,
    make_pixels,
    synthetic_headers,
)

CONTEXT = Context("north", 1, "0.1.0", "vigil-1")


def build(finding, headers, context=CONTEXT, maps=None, **variant) -> list[BuiltObject]:
    return build_objects(
        finding,
        by_index(headers),
        make_pixels(finding),
        make_maps(finding) if maps is None else maps,
        context,
        Variant(**variant),
    )


def opened(built: BuiltObject) -> Dataset:
    return pydicom.dcmread(io.BytesIO(built.data))


def of_role(objects: list[BuiltObject], role: str) -> list[Dataset]:
    return [opened(built) for built in objects if built.role == role]


@pytest.fixture
def headers() -> list[Dataset]:
    return synthetic_headers()


def test_objects_come_in_sending_order_with_their_series_numbers(headers):
    objects = build(make_finding(headers), headers)

    assert [o.role for o in objects] == ["summary", *["overlay"] * 3, "sr", "ko"]
    assert [o.seq for o in objects] == [1, 2, 3, 4, 5, 6]
    opened_ones = [opened(o) for o in objects]
    assert [int(d.SeriesNumber) for d in opened_ones] == [9901, 9902, 9902, 9902, 9903, 9904]
    assert [d.Modality for d in opened_ones] == ["OT", "OT", "OT", "OT", "SR", "KO"]
    assert [int(d.InstanceNumber) for d in opened_ones] == [1, 1, 2, 3, 1, 1]
    assert len({d.SOPInstanceUID for d in opened_ones}) == 6
    assert len({d.SeriesInstanceUID for d in opened_ones}) == 4
    assert {d.StudyInstanceUID for d in opened_ones} == {headers[0].StudyInstanceUID}


@pytest.mark.parametrize(
    ("emit", "roles"),
    [("sr+summary", ["summary", "sr"]), ("sr", ["sr"]), ("none", [])],
)
def test_a_negative_sends_what_the_site_asked_for(headers, emit, roles):
    objects = build(make_finding(headers, positive=False), headers, emit_negative=emit)

    assert [o.role for o in objects] == roles


def test_at_most_k_overlays_and_the_strongest_stay_in_order(headers):
    finding = make_finding(headers, keys=(0, 2, 4))
    weakest_first = tuple(
        replace(key, raw=type(key.raw)(float(i))) for i, key in enumerate(finding.key_images)
    )

    overlays = of_role(build(replace(finding, key_images=weakest_first), headers, k=2), "overlay")

    sources = [d.SourceImageSequence[0].ReferencedSOPInstanceUID for d in overlays]
    assert sources == [headers[2].SOPInstanceUID, headers[4].SOPInstanceUID]


def test_building_twice_gives_the_same_bytes(headers):
    finding = make_finding(headers)

    assert build(finding, headers) == build(finding, synthetic_headers())


def test_a_finding_survives_its_storage(headers):
    finding = make_finding(headers)

    assert build(type(finding).from_json(finding.to_json()), headers) == build(finding, headers)


@pytest.mark.parametrize(
    "change",
    [
        {"k": 1},
        {"is_rle": True},
        {"content_qualification": "PRODUCT"},
        {"series_base": 5000},
        {"anchors_groups": False},
        {"roles": ("summary", "sr")},
    ],
)
def test_other_bytes_never_share_a_uid(headers, change):
    finding = make_finding(headers)

    plain = {o.sop_instance_uid for o in build(finding, headers)}
    other = {o.sop_instance_uid for o in build(finding, headers, **change)}

    assert not plain & other


def test_two_tenants_with_the_same_study_share_no_uid(headers):
    finding = make_finding(headers)

    north = {o.sop_instance_uid for o in build(finding, headers)}
    south = {o.sop_instance_uid for o in build(finding, headers, replace(CONTEXT, tenant="south"))}

    assert not north & south


def test_an_overlay_says_how_its_map_was_made(headers):
    finding = make_finding(headers)
    other = replace(finding, output=replace(finding.output, map_word="HiResCAM"))

    for one, word in ((finding, "Grad-CAM"), (other, "HiResCAM")):
        overlay = of_role(build(one, headers), "overlay")[0]
        described = f"{word} overlay on source slice; not for primary diagnosis"
        assert overlay.DerivationDescription == described
        assert overlay.DerivationCodeSequence[0].CodeValue == "130403"


def test_an_overlay_lies_exactly_on_its_slice(headers):
    finding = make_finding(headers)

    overlays = of_role(build(finding, headers), "overlay")

    for overlay, key in zip(overlays, finding.key_images, strict=True):
        source = headers[key.image]
        for keyword in (
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
            "SliceThickness",
            "SliceLocation",
            "FrameOfReferenceUID",
            "PositionReferenceIndicator",
            "Rows",
            "Columns",
        ):
            assert overlay[keyword].value == source[keyword].value, keyword
        assert overlay.PatientOrientation == ["L", "P"]
        (reference,) = overlay.SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert reference.SpatialLocationsPreserved == "YES"
        purpose = reference.PurposeOfReferenceCodeSequence[0]
        assert (purpose.CodeValue, purpose.CodingSchemeDesignator) == ("121322", "DCM")
        assert overlay.DerivationCodeSequence[0].CodeValue == "130403"


def test_the_summary_has_no_place_in_the_patient(headers):
    (summary,) = of_role(build(make_finding(headers), headers), "summary")

    assert (summary.Rows, summary.Columns) == (1024, 1024)
    assert summary["PatientOrientation"].is_empty
    for keyword in ("ImagePositionPatient", "PixelSpacing", "FrameOfReferenceUID"):
        assert keyword not in summary
    preserved = {item.SpatialLocationsPreserved for item in summary.SourceImageSequence}
    assert preserved == {"NO"}
    assert "DerivationCodeSequence" not in summary


@pytest.mark.parametrize("role", ["summary", "overlay"])
def test_captures_say_what_they_are(headers, role):
    built = of_role(build(make_finding(headers), headers), role)[0]

    assert built.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert built.ImageType == ["DERIVED", "SECONDARY", "OTHER"]
    assert built.ConversionType == "WSD"
    assert (built.PhotometricInterpretation, built.BitsAllocated) == ("RGB", 8)
    assert built.BurnedInAnnotation == built.RecognizableVisualFeatures == "NO"
    assert built.LossyImageCompression == "00"
    assert built.BodyPartExamined == "HEAD"
    assert built.ContentQualification == "RESEARCH"
    assert (built.DateOfSecondaryCapture, built.TimeOfSecondaryCapture) == ("20260301", "130509")
    assert built.file_meta.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
    assert built.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"


def test_common_instance_reference_names_the_same_images(headers):
    for built in of_role(build(make_finding(headers), headers), "summary"):
        listed = [
            item.ReferencedSOPInstanceUID
            for series in built.ReferencedSeriesSequence
            for item in series.ReferencedInstanceSequence
        ]
        assert listed == [item.ReferencedSOPInstanceUID for item in built.SourceImageSequence]


def test_no_clock_is_read(headers):
    for built in map(opened, build(make_finding(headers), headers)):
        stamps = {
            str(element.value)
            for element in built.iterall()
            if element.VR in ("DA", "TM", "DT")
            and element.keyword not in ("StudyDate", "StudyTime")
        }
        assert stamps <= {"20260301", "130509", "20260301130509", "19500101"}


def test_the_patient_is_in_the_header_and_never_in_the_picture(headers):
    other = synthetic_headers(
        PatientName="Somebody^Else", PatientID="ZZ-9", AccessionNumber="B-1", PatientSex="M",
        PatientBirthDate="19991231", StudyDate="20251212", StudyTime="010101",
    )  # fmt: skip
    finding = make_finding(headers)

    for role in ("summary", "overlay"):
        ours = of_role(build(finding, headers), role)
        theirs = of_role(build(finding, other), role)
        for one, two in zip(ours, theirs, strict=True):
            assert one.PatientName != two.PatientName
            assert one.PixelData == two.PixelData


def test_once_lossy_always_lossy(headers):
    lossy = synthetic_headers(
        LossyImageCompression="01",
        LossyImageCompressionRatio=8,
        LossyImageCompressionMethod="ISO_10918_1",
    )

    for built in map(opened, build(make_finding(lossy), lossy)):
        if "PixelData" in built:
            assert built.LossyImageCompression == "01"
            assert float(built.LossyImageCompressionRatio) == 8
            assert built.LossyImageCompressionMethod == "ISO_10918_1"


def test_rle_holds_the_same_picture(headers):
    finding = make_finding(headers)

    plain = of_role(build(finding, headers), "overlay")[0]
    small = of_role(build(finding, headers, is_rle=True), "overlay")[0]

    assert small.file_meta.TransferSyntaxUID == RLELossless
    assert len(small.PixelData) < len(plain.PixelData) / 2
    assert np.array_equal(small.pixel_array, plain.pixel_array)


def test_key_objects_name_slices_and_overlays(headers):
    objects = build(make_finding(headers), headers)

    (keys,) = of_role(objects, "ko")

    title = keys.ConceptNameCodeSequence[0]
    assert (title.CodeValue, title.CodingSchemeDesignator) == ("113000", "DCM")
    assert keys.ContinuityOfContent == "SEPARATE"
    images = [item for item in keys.ContentSequence if item.ValueType == "IMAGE"]
    assert all("ConceptNameCodeSequence" not in item for item in images)
    referred = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in images]
    overlays = [o.sop_instance_uid for o in objects if o.role == "overlay"]
    assert referred == [headers[i].SOPInstanceUID for i in (1, 2, 3)] + overlays


def test_a_quiet_slice_is_painted_less_than_the_loudest_one(headers):
    finding = make_finding(headers)
    maps = make_maps(finding)
    maps[0] = maps[0] * 0.3  # under a quarter of the study's scale everywhere

    overlays = of_role(build(finding, headers, maps=maps), "overlay")

    def colourfulness(built: Dataset) -> float:
        pixels = built.pixel_array.astype(int)[24:-24]
        return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())

    assert colourfulness(overlays[0]) == 0
    assert colourfulness(overlays[1]) > colourfulness(overlays[2]) > 0


def test_opacity_goes_from_threshold_to_certainty():
    at = [
        paint.opacity(label_result("any", p, top=0, threshold=0.4)) for p in (0.1, 0.4, 0.7, 0.97)
    ]

    assert at[0] == at[1] == paint.OPACITY_AT_THRESHOLD
    assert at[1] < at[2] < at[3] <= paint.OPACITY_MOST
    exploratory = label_result("any", 0.9, top=0, exploratory=True)
    assert exploratory.status is LabelStatus.EXPLORATORY
    assert paint.opacity(exploratory) == paint.OPACITY_AT_THRESHOLD


def test_the_display_window_is_linear_exact():
    values = np.array([[-1000, 0, 40, 80, 3000]], np.float32)

    assert paint.grey_levels(values, 40, 80).tolist() == [[0, 0, 128, 255, 255]]
    turned = paint.grey_levels(values, 40, 80, is_inverted=True)
    assert turned.tolist() == [[255, 255, 128, 0, 0]]


def test_words_stay_in_the_first_and_last_rows_of_an_overlay(headers):
    finding = make_finding(headers, is_partial=True)
    plain = make_finding(headers, output=silent(finding.output))

    with_words = of_role(build(finding, headers), "overlay")[0].pixel_array
    without = of_role(build(plain, headers), "overlay")[0].pixel_array

    edge = round(256 * 24 / 512)
    assert np.array_equal(with_words[edge:-edge], without[edge:-edge])
    assert not np.array_equal(with_words[:edge], without[:edge])
    assert not np.array_equal(with_words[-edge:], without[-edge:])


def silent(output: OutputSpec) -> OutputSpec:
    return dataclasses.replace(output, attention_words=" ", algorithm=" ")


@pytest.mark.parametrize(
    "change",
    [
        {"is_partial": True},
        {"notes": ("One slice is missing at 45 mm",)},
    ],
)
def test_the_summary_shows_what_a_reader_must_know(headers, change):
    whole = of_role(build(make_finding(headers), headers), "summary")[0]
    changed = of_role(build(make_finding(headers, **change), headers), "summary")[0]

    notices = slice(216, 244)
    assert not np.array_equal(whole.pixel_array[notices], changed.pixel_array[notices])


def test_a_revision_counts_on_in_numbers_and_words(headers):
    finding = make_finding(headers)

    (first,) = of_role(build(finding, headers), "summary")
    again = replace(CONTEXT, result_no=2)
    (second,) = of_role(
        build(finding, headers, again, earlier_result=finding.started_at), "summary"
    )
    (alone,) = of_role(build(finding, headers, again), "summary")  # this peer has nothing older

    assert (first.SeriesNumber, second.SeriesNumber) == (9901, 9911)
    assert not np.array_equal(first.pixel_array[216:244], second.pixel_array[216:244])
    assert np.array_equal(first.pixel_array[216:244], alone.pixel_array[216:244])


def test_another_kind_of_image_needs_nothing_else(headers):
    """A chest radiograph: no geometry, MONOCHROME1, one label, one image."""
    (film,) = synthetic_headers(
        1, Modality="DX", PhotometricInterpretation="MONOCHROME1", SliceThickness=None,
        SliceLocation=None, ImageOrientationPatient=None, FrameOfReferenceUID=None,
        PositionReferenceIndicator=None, PixelSpacing=None, PatientOrientation=["L", "F"],
        SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1",
    )  # fmt: skip
    finding = make_finding([film], keys=(0,), exploratory=())
    output = replace(finding.output, body_part="CHEST", image_word="image", laterality="")
    finding = replace(finding, output=output, labels=finding.labels[:1])
    del film.ImagePositionPatient

    objects = build(finding, [film])

    (overlay,) = of_role(objects, "overlay")
    assert overlay.PatientOrientation == ["L", "F"]
    assert "FrameOfReferenceUID" not in overlay
    assert overlay.BodyPartExamined == "CHEST"
    assert overlay.pixel_array[30, 30].tolist() == [255, 255, 255]  # air is white in MONOCHROME1
    (report,) = of_role(objects, "sr")
    assert report.Modality == "SR"


def test_air_round_the_patient_is_never_coloured(headers):
    """Attention on the background says nothing of the patient."""
    finding = make_finding(headers)
    everywhere = {i: np.full((256, 256), finding.map_scale, np.float32) for i in range(3)}

    overlays = of_role(build(finding, headers, maps=everywhere), "overlay")

    distance = np.hypot(*(np.mgrid[:256, :256] - 128.0))
    rows = np.arange(256)[:, None]
    clear_of_words = np.broadcast_to((rows > 14) & (rows < 241), (256, 256))
    air = (distance > 0.38 * 256 + 2) & clear_of_words
    body = distance < 0.38 * 256 - 3
    for overlay in overlays:
        is_coloured = np.ptp(overlay.pixel_array.astype(int), axis=2) > 0
        assert not is_coloured[air].any()
        assert is_coloured[body].all()


def test_air_inside_the_patient_may_be_coloured():
    values = np.full((64, 64), -1000.0, np.float32)
    values[8:56, 8:56] = 40.0
    values[28:36, 28:36] = -1000.0  # a sinus
    values[60:62, 4:60] = 300.0  # the table
    cam = np.ones((64, 64), np.float32)

    kept = paint.inside(cam, values, "CT")

    assert kept[32, 32] == 1.0
    assert kept[61, 30] == kept[2, 2] == 0.0


def test_only_ct_values_say_what_is_air():
    cam = np.ones((8, 8), np.float32)

    assert paint.inside(cam, np.full((8, 8), -1000.0, np.float32), "DX") is cam
