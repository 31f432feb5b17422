"""The overlays as frames of one Multi-frame Secondary Capture (`send.mfsc`)."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import RLELossless

from config.tenants import Destination, SendFlags, Tenant
from db.result import Finding
from dicom_sr.assemble import _left_out
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.plan import Context, Variant
from tests.findings import by_index, make_finding, make_maps, make_pixels, synthetic_headers
from tests.validators import dciodvfy

MFSC, SC = "1.2.840.10008.5.1.4.1.1.7.4", "1.2.840.10008.5.1.4.1.1.7"
CONTEXT = Context("north", 1, "0.1.0", "vigil-1")


def build(finding: Finding, headers: list[Dataset], **variant: object) -> list[BuiltObject]:
    chosen = Variant(**{"is_stacked": True, **variant})  # type: ignore[arg-type]
    sources, pixels = by_index(headers), make_pixels(finding)
    return build_objects(finding, sources, pixels, make_maps(finding), CONTEXT, chosen)


def of_role(objects: list[BuiltObject], role: str) -> list[Dataset]:
    return [pydicom.dcmread(io.BytesIO(one.data)) for one in objects if one.role == role]


def stack_of(objects: list[BuiltObject]) -> Dataset:
    (built,) = of_role(objects, "overlay")
    return built


def numbers(values) -> list[float]:
    return [float(value) for value in values]


@pytest.fixture(scope="module")
def headers() -> list[Dataset]:
    return synthetic_headers()


@pytest.fixture(scope="module")
def finding(headers) -> Finding:
    return make_finding(headers)


@pytest.fixture(scope="module")
def objects(finding, headers) -> list[BuiltObject]:
    return build(finding, headers)


@pytest.fixture(scope="module")
def stack(objects) -> Dataset:
    return stack_of(objects)


def test_one_object_stands_in_place_of_all_overlays(objects):
    assert [one.role for one in objects] == ["summary", "overlay", "sr", "ko"]
    assert [one.sop_class_uid for one in objects][1] == MFSC
    assert [one.seq for one in objects] == [1, 2, 3, 4]


def test_its_frames_are_the_overlays_pixel_by_pixel(finding, headers, stack):
    singly = of_role(build(finding, headers, is_stacked=False), "overlay")

    assert int(stack.NumberOfFrames) == len(singly) == 3
    for frame, one in zip(stack.pixel_array, singly, strict=True):
        assert np.array_equal(frame, one.pixel_array)


def test_frames_are_pages_in_order(stack):
    assert stack.FrameIncrementPointer == 0x00182001
    assert list(stack.PageNumberVector) == [1, 2, 3]


def test_one_frame_needs_no_order(headers):
    stack = stack_of(build(make_finding(headers, keys=(2,)), headers))

    assert (int(stack.NumberOfFrames), stack.SOPClassUID) == (1, MFSC)
    assert "FrameIncrementPointer" not in stack
    assert "PageNumberVector" not in stack


def test_frames_lie_where_their_slices_do(stack, finding, headers):
    (shared,) = stack.SharedFunctionalGroupsSequence
    sources = [headers[key.image] for key in finding.key_images]
    for item, source in zip(stack.PerFrameFunctionalGroupsSequence, sources, strict=True):
        position = item.PlanePositionSequence[0].ImagePositionPatient
        assert numbers(position) == numbers(source.ImagePositionPatient)
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    measures = shared.PixelMeasuresSequence[0]
    assert numbers(orientation) == numbers(sources[0].ImageOrientationPatient)
    assert numbers(measures.PixelSpacing) == numbers(sources[0].PixelSpacing)
    assert float(measures.SliceThickness) == 5.0
    assert stack.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    assert stack.PatientOrientation == ["L", "P"]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        assert keyword not in stack  # of a frame, never of all


def test_a_change_inside_the_series_is_said_frame_by_frame(finding):
    headers = synthetic_headers()
    headers[2].SliceThickness = 7

    stack = stack_of(build(finding, headers))

    assert "PixelMeasuresSequence" not in stack.SharedFunctionalGroupsSequence[0]
    thick = [
        float(item.PixelMeasuresSequence[0].SliceThickness)
        for item in stack.PerFrameFunctionalGroupsSequence
    ]
    assert thick == [5.0, 7.0, 5.0]


def test_without_a_place_there_are_no_groups_and_all_the_rest(finding):
    stack = stack_of(build(finding, synthetic_headers(ImagePositionPatient=None)))

    assert "PerFrameFunctionalGroupsSequence" not in stack
    assert "FrameOfReferenceUID" not in stack
    assert int(stack.NumberOfFrames) == 3


def test_the_sources_are_named_in_the_order_of_the_frames(stack, finding):
    named = [item.ReferencedSOPInstanceUID for item in stack.SourceImageSequence]
    assert named == [finding.images[key.image].sop_instance_uid for key in finding.key_images]
    assert {item.SpatialLocationsPreserved for item in stack.SourceImageSequence} == {"YES"}
    purposes = {i.PurposeOfReferenceCodeSequence[0].CodeValue for i in stack.SourceImageSequence}
    assert purposes == {"121322"}
    assert stack.DerivationCodeSequence[0].CodeValue == "130403"


def test_frames_of_a_multi_frame_source_are_named(headers, finding):
    frames = tuple(replace(one, frame=i + 1) for i, one in enumerate(finding.images))

    stack = stack_of(build(replace(finding, images=frames), headers))

    assert [item.ReferencedFrameNumber for item in stack.SourceImageSequence] == [2, 3, 4]


def test_it_says_what_single_overlays_say(stack, headers):
    assert (stack.Modality, stack.ConversionType, stack.SeriesNumber) == ("OT", "WSD", 9902)
    assert (stack.BurnedInAnnotation, stack.RecognizableVisualFeatures) == ("NO", "NO")
    assert list(stack.ImageType) == ["DERIVED", "SECONDARY", "OTHER"]
    assert (stack.BodyPartExamined, stack.LossyImageCompression) == ("HEAD", "00")
    assert stack.SeriesDescription == "AI ICH Grad-CAM overlay"
    assert (stack.Manufacturer, stack.PatientID) == ("Vigil", headers[0].PatientID)
    assert (stack.Rows, stack.Columns) == (headers[0].Rows, headers[0].Columns)
    assert stack.file_meta.MediaStorageSOPClassUID == MFSC


def test_loss_is_carried_over(finding):
    lossy = synthetic_headers(LossyImageCompression="01", LossyImageCompressionRatio=8.0)

    stack = stack_of(build(finding, lossy))

    assert (stack.LossyImageCompression, stack.LossyImageCompressionRatio) == ("01", 8.0)


def test_the_report_points_at_each_frame(objects, stack):
    (report,) = of_role(objects, "sr")
    shown = [
        item.ReferencedSOPSequence[0]
        for item in walk(report)
        if item.get("ValueType") == "IMAGE"
        and item.ConceptNameCodeSequence[0].CodeValue == "130401"
    ]
    assert [(one.ReferencedSOPClassUID, one.ReferencedFrameNumber) for one in shown] == [
        (MFSC, 1), (MFSC, 2), (MFSC, 3),
    ]  # fmt: skip
    assert {one.ReferencedSOPInstanceUID for one in shown} == {stack.SOPInstanceUID}
    assert evidence_of(report)[stack.SOPInstanceUID] == MFSC


def test_the_key_objects_point_at_each_frame(objects, stack, finding):
    (keys,) = of_role(objects, "ko")
    pointed = [
        (str(one.ReferencedSOPInstanceUID), one.get("ReferencedFrameNumber"))
        for item in keys.ContentSequence
        if item.ValueType == "IMAGE"
        for one in item.ReferencedSOPSequence
    ]
    sources = [(finding.images[k.image].sop_instance_uid, None) for k in finding.key_images]
    assert pointed == [*sources, *((str(stack.SOPInstanceUID), n) for n in (1, 2, 3))]
    assert evidence_of(keys)[stack.SOPInstanceUID] == MFSC


def walk(item: Dataset):
    yield item
    for child in item.get("ContentSequence", ()):
        yield from walk(child)


def evidence_of(document: Dataset) -> dict[str, str]:
    return {
        one.ReferencedSOPInstanceUID: one.ReferencedSOPClassUID
        for study in document.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }


def test_building_twice_gives_the_same_bytes(finding, headers, objects):
    assert build(finding, headers) == objects


def test_its_identifier_is_its_own(finding, headers, objects):
    (of_two,) = of_role(build(finding, headers, k=2), "overlay")
    uids = {one.sop_instance_uid for one in objects}

    singly = {one.sop_instance_uid for one in build(finding, headers, is_stacked=False)}

    assert not uids & singly
    assert of_two.SOPInstanceUID not in uids  # other frames are another object


def test_compressed_frames_are_the_same_pixels(finding, headers, stack):
    rle = stack_of(build(finding, headers, is_rle=True))

    assert rle.file_meta.TransferSyntaxUID == RLELossless
    assert np.array_equal(rle.pixel_array, stack.pixel_array)


def test_two_matrix_sizes_go_singly_and_it_is_said(headers, finding):
    images = tuple(
        replace(one, rows=128, columns=128) if i == 2 else one
        for i, one in enumerate(finding.images)
    )
    mixed = replace(finding, images=images)

    objects = build(mixed, headers)

    overlays = of_role(objects, "overlay")
    assert {one.SOPClassUID for one in overlays} == {SC}
    assert [one.Rows for one in overlays] == [256, 128, 256]
    assert _left_out(mixed, Variant(is_stacked=True), objects) == ["overlays_sent_singly"]
    assert _left_out(mixed, Variant(), objects) == []


def test_nothing_is_said_to_be_left_out_where_nothing_is(finding, objects):
    assert _left_out(finding, Variant(is_stacked=True), objects) == []


def test_a_destination_gets_it_only_on_demand():
    tenant = Tenant(id="north", ae_titles=("NORTH_AI",))
    plain = Destination(name="pacs", ae_title="PACS", host="h", port=104)
    asking = plain.model_copy(update={"send": SendFlags(mfsc=True)})

    assert not Variant.of(plain, tenant, "ich").is_stacked
    assert Variant.of(asking, tenant, "ich").is_stacked


@pytest.mark.parametrize("keys", [(2,), (1, 2, 3)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"SliceThickness": None, "StudyID": None, "PatientSex": None},
        {"FrameOfReferenceUID": None},
        {"LossyImageCompression": "01", "LossyImageCompressionRatio": 8.0},
    ],
)
def test_dciodvfy_finds_no_error(tmp_path: Path, keys, changes):
    headers = synthetic_headers(**changes)
    stack_of(build(make_finding(headers, keys=keys), headers)).save_as(tmp_path / "stack.dcm")

    assert dciodvfy(tmp_path / "stack.dcm", iod="MultiframeTrueColorSCImage") == []
