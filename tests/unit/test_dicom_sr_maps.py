"""The raw heat maps as a Parametric Map: what it says, where it lies, and that it arrives."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from config.tenants import Destination, SendFlags, Tenant
from db.result import Finding
from dicom_sr.association import Peer
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.plan import Context, Variant
from dicom_sr.push import Outcome, Parcel, push
from tests.findings import (
    by_index,
    head_ct,
    make_finding,
    make_maps,
    make_pixels,
    synthetic_headers,
)
from tests.peers import Pacs
from tests.validators import dciodvfy

EVERYTHING = Variant(roles=("summary", "overlay", "pm", "sr", "ko"))
#: No multiple of anything, so that no rounding in between goes unnoticed.
SCALE = 3.14159265358979


def build(
    finding: Finding, headers: list[Dataset], variant=EVERYTHING, *, result_no=1, maps=None
) -> list[BuiltObject]:
    context = Context("north", result_no, "0.1.0", "vigil-1")
    sources, pixels = by_index(headers), make_pixels(finding)
    return build_objects(finding, sources, pixels, maps or make_maps(finding), context, variant)


def map_of(objects: list[BuiltObject]) -> Dataset:
    (built,) = [one for one in objects if one.role == "pm"]
    return pydicom.dcmread(io.BytesIO(built.data))


def numbers(values) -> list[float]:
    return [float(value) for value in values]


@pytest.fixture(scope="module")
def headers() -> list[Dataset]:
    return synthetic_headers()


@pytest.fixture(scope="module")
def finding(headers) -> Finding:
    return make_finding(headers, map_scale=SCALE)


@pytest.fixture(scope="module")
def built(finding, headers) -> Dataset:
    return map_of(build(finding, headers))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"SliceThickness": None, "StudyID": None, "PatientSex": None, "StudyDate": None},
        {"LossyImageCompression": "01", "LossyImageCompressionRatio": 8.0},
        {"ImageOrientationPatient": [1, 0, 0, 0, 0.95106, -0.30902]},  # a tilted gantry
    ],
)
@pytest.mark.parametrize("keys", [(2,), (1, 3, 5), (0, 1, 5)])
def test_dciodvfy_finds_no_error(tmp_path, changes, keys):
    headers = synthetic_headers(**changes)
    built = map_of(build(make_finding(headers, keys=keys, map_scale=SCALE), headers))
    built.save_as(tmp_path / "pm.dcm")

    assert dciodvfy(tmp_path / "pm.dcm", iod="ParametricMap") == []


def test_a_real_source_gives_a_clean_map_in_its_geometry(tmp_path):
    headers = head_ct()
    keys = (12, 14, 16)

    built = map_of(build(make_finding(headers, keys=keys), headers))

    built.save_as(tmp_path / "pm.dcm")
    assert dciodvfy(tmp_path / "pm.dcm", iod="ParametricMap") == []
    assert {float(headers[key].SliceThickness) for key in keys} == {4.0, 7.0}
    assert_geometry(built, [headers[key] for key in keys])


def test_frames_lie_where_their_images_do(built, finding, headers):
    assert_geometry(built, [headers[key.image] for key in finding.key_images])


def assert_geometry(built: Dataset, sources: list[Dataset]) -> None:
    shared = built.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert int(built.NumberOfFrames) == len(built.PerFrameFunctionalGroupsSequence) == len(sources)
    assert "DimensionOrganizationType" not in built
    for item, source in zip(built.PerFrameFunctionalGroupsSequence, sources, strict=True):
        position = item.PlanePositionSequence[0].ImagePositionPatient
        (measures,) = item.get("PixelMeasuresSequence") or shared.PixelMeasuresSequence
        assert "SpacingBetweenSlices" not in measures
        assert numbers(position) == numbers(source.ImagePositionPatient)
        assert numbers(orientation) == numbers(source.ImageOrientationPatient)
        assert numbers(measures.PixelSpacing) == numbers(source.PixelSpacing)
        assert float(measures.SliceThickness) == float(source.SliceThickness)
        assert built.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert (built.Rows, built.Columns) == (source.Rows, source.Columns)


def test_the_values_are_the_raw_ones(built, finding):
    maps = make_maps(finding)

    frames = built.pixel_array

    assert frames.dtype == np.float32
    assert np.array_equal(frames, np.stack([maps[i] for i in range(3)]))


def test_the_values_say_what_they_are(built):
    (shared,) = built.SharedFunctionalGroupsSequence
    (mapping,) = shared.RealWorldValueMappingSequence
    (quantity,) = mapping.QuantityDefinitionSequence
    code = quantity.ConceptCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning) == (
        "130403", "DCM", "Gradient-weighted class activation",
    )  # fmt: skip
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1.0, 0.0)
    assert mapping.DoubleFloatRealWorldValueFirstValueMapped == 0.0
    assert mapping.DoubleFloatRealWorldValueLastValueMapped == SCALE
    assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "1"


def test_the_map_says_how_it_was_made(finding, headers):
    other = replace(finding, output=replace(finding.output, map_word="HiResCAM"))

    for one, word in ((finding, "Grad-CAM"), (other, "HiResCAM")):
        made = map_of(build(one, headers))
        assert made.ContentDescription == f"{word} values; not for primary diagnosis"


def test_each_frame_names_its_source_and_label(built, finding):
    for item, key in zip(built.PerFrameFunctionalGroupsSequence, finding.key_images, strict=True):
        (source,) = item.DerivationImageSequence[0].SourceImageSequence
        image = finding.images[key.image]
        assert source.ReferencedSOPInstanceUID == image.sop_instance_uid
        assert source.ReferencedSOPClassUID == image.sop_class_uid
        assert source.SpatialLocationsPreserved == "YES"
        assert item.FrameContentSequence[0].FrameLabel == "Any intracranial hemorrhage"
    named = [item.ReferencedSOPInstanceUID for item in built.SourceImageSequence]
    assert named == [finding.images[key.image].sop_instance_uid for key in finding.key_images]
    assert {item.ReferencedSOPClassUID for item in built.SourceImageSequence} == {
        finding.images[0].sop_class_uid
    }


def test_frames_of_a_multi_frame_source_are_named(headers):
    finding = make_finding(headers)
    frames = tuple(replace(one, frame=i + 1) for i, one in enumerate(finding.images))
    finding = replace(finding, images=frames)

    built = map_of(build(finding, headers))

    named = [
        item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        for item in built.PerFrameFunctionalGroupsSequence
    ]
    assert named == [2, 3, 4]


def test_it_is_of_the_same_patient_and_of_our_equipment(built, headers):
    source = headers[0]
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber", "StudyDate"):
        assert built[keyword].value == source[keyword].value
    assert (built.Modality, built.SeriesNumber) == ("OT", 9905)
    assert built.SeriesDescription == "AI ICH Grad-CAM map"
    assert (built.Manufacturer, built.BodyPartExamined) == ("Vigil", "HEAD")
    assert (built.ContentDate, built.ContentTime) == ("20260301", "130509")


def test_building_twice_gives_the_same_bytes(finding, headers):
    assert build(finding, headers) == build(finding, headers)


def test_a_revision_has_other_identifiers_and_its_own_number(built, finding, headers):
    second = map_of(build(finding, headers, result_no=2))
    assert second.SeriesNumber == 9915

    again = replace(finding, result_uuid="aa1f7f8e-7b53-4d61-9d2e-6f6a6d1c7a10")
    other = map_of(build(again, headers))
    for name in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert other[name].value != built[name].value
    assert organization(other) != organization(built)


def organization(built: Dataset) -> str:
    (uid,) = {
        item.DimensionOrganizationUID
        for item in (*built.DimensionOrganizationSequence, *built.DimensionIndexSequence)
    }
    return str(uid)


def test_k_limits_the_frames(finding, headers):
    built = map_of(build(finding, headers, replace(EVERYTHING, k=2)))

    assert built.NumberOfFrames == 2
    maps = make_maps(finding)
    assert np.array_equal(built.pixel_array, np.stack([maps[0], maps[1]]))  # 1.5, 2.0, (1.5)


def test_what_is_no_number_is_nothing(finding, headers):
    maps = make_maps(finding)
    maps[0][0, :2] = np.nan, np.inf

    built = build(finding, headers, maps=maps)

    assert map_of(built).pixel_array[0, 0, :2].tolist() == [0.0, np.float32(SCALE)]


def test_another_reader_finds_every_frame_at_its_place(tmp_path, finding, built, headers):
    built.save_as(tmp_path / "pm.dcm")

    volume = hd.imread(tmp_path / "pm.dcm").get_volume()

    maps = {i + 1: map_ for i, map_ in make_maps(finding).items()}  # of images 1, 2, 3
    for plane, values in enumerate(volume.array):
        position = volume.get_plane_position(plane)[0].ImagePositionPatient
        (image,) = [i for i in maps if numbers(headers[i].ImagePositionPatient) == position]
        assert np.allclose(values, maps[image])


@pytest.mark.parametrize(
    "changes",
    [
        {"FrameOfReferenceUID": None},
        {"ImageOrientationPatient": None},
        {"ImagePositionPatient": [0, 0, 0]},  # all in one place: two series in one
        {"PixelSpacing": None},
    ],
)
def test_without_a_place_there_is_no_map_and_all_the_rest(changes):
    finding = make_finding(synthetic_headers())

    objects = build(finding, synthetic_headers(**changes))

    assert [one.role for one in objects] == ["summary", *3 * ["overlay"], "sr", "ko"]


def test_planes_of_two_kinds_give_no_map(finding):
    headers = synthetic_headers()
    headers[2].PixelSpacing = [0.5, 0.5]
    assert "pm" not in [one.role for one in build(finding, headers)]


def test_a_plane_is_taken_as_the_source_states_it(finding):
    headers = synthetic_headers(ImageOrientationPatient=[0.999, 0.01, 0, 0, 0.998, 0])  # no units
    headers[2].ImageOrientationPatient = [0.999, 0.01001, 0, 0, 0.998, 0]  # nor quite alike

    (shared,) = map_of(build(finding, headers)).SharedFunctionalGroupsSequence

    stated = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert numbers(stated) == [0.999, 0.01, 0, 0, 0.998, 0]


def test_nothing_found_gives_no_map(headers):
    negative = make_finding(headers, positive=False)

    assert [one.role for one in build(negative, headers)] == ["summary", "sr"]


def test_a_destination_gets_it_only_on_demand():
    tenant = Tenant(id="north", ae_titles=("NORTH_AI",))
    plain = Destination(name="pacs", ae_title="PACS", host="h", port=104)
    asking = plain.model_copy(update={"send": SendFlags(pm=True)})

    assert "pm" not in Variant.of(plain, tenant, "ich").roles
    assert "pm" in Variant.of(asking, tenant, "ich").roles


def test_it_arrives_between_overlays_and_report(tmp_path, finding, headers):
    objects = build(finding, headers)
    parcels = [parcel(tmp_path, one) for one in objects]

    with Pacs() as pacs:
        peer = Peer(host="127.0.0.1", port=pacs.port, ae_title="PACS", calling_ae="NORTH_AI")
        delivery = push(peer, parcels)

    assert {answer.outcome for answer in delivery.answers.values()} == {Outcome.ACCEPTED}
    assert [one.role for one in objects] == ["summary", *3 * ["overlay"], "pm", "sr", "ko"]
    received = {str(one.SOPInstanceUID): one for one in pacs.received}
    assert list(received) == [one.sop_instance_uid for one in objects]
    arrived = received[objects[4].sop_instance_uid]
    assert np.array_equal(arrived.pixel_array, map_of(objects).pixel_array)


def parcel(folder: Path, one: BuiltObject) -> Parcel:
    path = folder / f"{one.sop_instance_uid}.dcm"
    path.write_bytes(one.data)
    uids = (one.sop_class_uid, one.sop_instance_uid, one.transfer_syntax_uid)
    return Parcel(one.role, *uids, path, hashlib.sha256(one.data).hexdigest())
