"""A whole node with the shipped bundle between real peers: what a hospital would try first.

One node serves all tests: `hospital` in conftest.py.
"""

import random
import subprocess
import time
from collections import Counter

import pydicom
import pytest
from pydicom.uid import ImplicitVRLittleEndian, generate_uid
from sqlalchemy import select

from db.tables import (
    AnalysisRow,
    AuditRow,
    DeliveryRow,
    DestinationRow,
    InstanceRow,
    ObjectRow,
    ReturnedRow,
    StudyRow,
)
from tests import validators
from tests.builders import changed, ctich_study, real_size_study
from tests.e2e.hospital import PEER_ENVIRONMENT, QUIET_S, Hospital, eventually, written
from tests.e2e.raw_sender import encoded

PATIENT_MODULE = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")


def small_study(kind: str, seed: int) -> list[pydicom.Dataset]:
    """Where the size of the images is not the point: localiser and 30 slices of 256 x 256."""
    return real_size_study(kind, seed=seed, matrix=256)


def test_a_real_head_ct_comes_back_as_report_and_pages_in_the_same_study(hospital, data_root):
    paths = sorted((data_root / "head-ct-ge").glob("*.dcm"))
    source = pydicom.dcmread(paths[0], stop_before_pixels=True)

    assert hospital.send(paths).returncode == 0
    assert hospital.outcome(source.StudyInstanceUID).state == "DELIVERED"

    objects = hospital.received("north", source.StudyInstanceUID)
    kinds = Counter(one.Modality for one in objects)
    (result,) = hospital.results(source.StudyInstanceUID)
    assert kinds["SR"] == 1
    assert kinds["KO"] == result.is_positive
    assert kinds["OT"] == 1 + 3 * result.is_positive
    for one in objects:
        for keyword in PATIENT_MODULE:
            # Type 2: what the source lacks is there, and empty.
            assert keyword in one
            assert (one.get(keyword) or "") == (source.get(keyword) or ""), keyword
    assert hospital.received("south", source.StudyInstanceUID) == []


def test_what_arrives_satisfies_every_validator(hospital, data_root):
    source = pydicom.dcmread(data_root / "head-ct-ge" / "01.dcm", stop_before_pixels=True)
    hospital.send(sorted((data_root / "head-ct-ge").glob("*.dcm")))
    hospital.outcome(source.StudyInstanceUID)
    names = {"SR": "Comprehensive3DSR", "KO": "KeyObjectSelectionDocument", "OT": "SCImage"}

    for path in hospital.archives["north"].folder.iterdir():
        one = pydicom.dcmread(path, stop_before_pixels=True)
        if one.StudyInstanceUID != source.StudyInstanceUID:
            continue
        assert validators.dciodvfy(path, iod=names[one.Modality]) == [], path
        if one.Modality == "SR":
            found = validators.pixelmed(
                [path], iod="Comprehensive3DSR", template="TID_1500 (MeasurementReport)"
            )
            assert found[path] == []


def test_the_same_study_sent_twice_has_one_result(hospital, tmp_path):
    study = small_study("plain", seed=21)
    paths = written(study, tmp_path)
    uid = study[0].StudyInstanceUID

    hospital.send(paths)
    first = hospital.outcome(uid)
    hospital.send(paths)
    time.sleep(QUIET_S + 3)  # nothing is to happen: there is no event to wait for

    assert hospital.outcome(uid).row_version == first.row_version
    assert len(hospital.results(uid)) == 1


def test_h25_a_whole_result_that_is_sent_back_to_us_starts_nothing(hospital, tmp_path):
    study = small_study("lesion", seed=30)
    uid = study[0].StudyInstanceUID
    hospital.send(written(study, tmp_path / "study"))
    first = hospital.outcome(uid, result_no=1)
    assert (first.state, first.reason) == ("DELIVERED", "")
    objects = hospital.received("north", uid)
    implicit = [pydicom.dcmread(one.filename) for one in objects]
    for one in implicit:
        one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    ours = {one.SOPInstanceUID for one in objects}
    assert len(ours) == 6

    assert hospital.send([one.filename for one in objects]).returncode == 0
    again = written(implicit, tmp_path / "implicit")
    assert hospital.send(again, "north", "-xi").returncode == 0  # in another transfer syntax
    assert hospital.send([one.filename for one in objects], "south").returncode == 0
    assert eventually(lambda: not hospital.spooled())
    time.sleep(QUIET_S + 3)  # nothing is to happen: there is no event to wait for

    returned = hospital.query(select(ReturnedRow).where(ReturnedRow.sop_instance_uid.in_(ours)))
    counted = Counter({(one.tenant, one.sop_instance_uid): one.n for one in returned})
    assert counted == {("north", one): 2 for one in ours} | {("south", one): 1 for one in ours}
    assert hospital.outcome(uid).row_version == first.row_version
    assert len(hospital.results(uid)) == 1
    assert hospital.stored(uid) == sorted(one.SOPInstanceUID for one in study)
    assert hospital.study_rows(AnalysisRow, uid, "south") == []
    assert len(hospital.received("north", uid)) == len(objects)


def test_two_tenants_with_one_study_uid_get_each_their_own(hospital, tmp_path):
    study = small_study("plain", seed=22)
    other = changed(study, PatientID="SOUTH-1", PatientName="SOUTH^PATIENT")
    uid = study[0].StudyInstanceUID

    hospital.send(written(study, tmp_path / "a"), "north")
    hospital.send(written(other, tmp_path / "b"), "south")
    for tenant in ("north", "south"):
        assert hospital.outcome(uid, tenant).state == "DELIVERED"

    names = {
        tenant: {one.PatientID for one in hospital.received(tenant, uid)}
        for tenant in ("north", "south")
    }
    assert names == {"north": {study[0].PatientID}, "south": {"SOUTH-1"}}


@pytest.mark.parametrize(
    ("kind", "code"),
    [("chest", "body_part"), ("localiser", "image_type"), ("contrast", "series_description")],
)
def test_what_cannot_be_judged_ends_with_a_reason_and_no_object(hospital, tmp_path, kind, code):
    study = small_study(kind, seed=23)
    uid = study[0].StudyInstanceUID

    hospital.send(written(study, tmp_path))
    analysis = hospital.outcome(uid)

    assert (analysis.state, analysis.reason_code) == ("NOT_ANALYSED", code)
    assert analysis.reason
    assert len(hospital.stored(uid)) == len(study)
    assert hospital.results(uid) == []
    assert hospital.received("north", uid) == []


def test_an_image_of_too_few_pixels_fails_its_study_and_is_named(hospital, tmp_path):
    study = small_study("plain", seed=24)
    uid = study[0].StudyInstanceUID
    study[7].PixelData = study[7].PixelData[:1000]
    before = hospital.processes()

    assert hospital.send(written(study, tmp_path)).returncode == 0
    analysis = hospital.outcome(uid)

    assert (analysis.state, analysis.reason_code) == ("FAILED", "undecodable")
    assert analysis.reason == (
        "Image 7 of 30 (series 2, instance 7): "
        "its pixel data cannot be decoded (ValueError in 1.2.840.10008.1.2.1)."
    )
    # The others are kept beside it: nothing is told of a scan of which an image was left out.
    assert hospital.stored(uid) == sorted(one.SOPInstanceUID for one in study)
    assert hospital.quarantined(study[7].SOPInstanceUID) == []
    assert hospital.results(uid) == []
    assert hospital.received("north", uid) == []
    assert hospital.processes() == before


def test_an_image_cut_off_on_its_way_is_set_aside_and_the_rest_is_partial(hospital, tmp_path):
    study = small_study("plain", seed=25)
    uid, cut = study[0].StudyInstanceUID, study[15]
    rest = [one for one in study if one is not cut]
    paths = written(rest, tmp_path / "rest")
    (whole,) = written([cut], tmp_path / "whole")
    half = tmp_path / "half.dcm"
    half.write_bytes(whole.read_bytes()[: -len(cut.PixelData) // 2])
    before = hospital.processes()

    assert hospital.send([half], "east").returncode != 0  # dcmtk sends no file that is cut off
    assert hospital.send(paths[:1], "east").returncode == 0  # the localiser opens the study
    eventually(lambda: hospital.stored(uid, "east"))
    assert hospital.store(cut, encoded(cut)[: -len(cut.PixelData) // 2], "east") == 0x0000
    assert hospital.send(paths[1:], "east").returncode == 0
    analysis = hospital.outcome(uid, "east", result_no=1)

    (entry,) = hospital.quarantined(cut.SOPInstanceUID)
    assert (entry["code"], entry["tenant"], entry["sender"]) == ("cut_off", "east", "EAST_CT")
    assert entry["reason"] == "It cannot be read: the pixel data is cut off."
    assert (entry["study_instance_uid"], entry["holds_study"]) == (uid, None)
    assert hospital.stored(uid, "east") == sorted(one.SOPInstanceUID for one in rest)
    assert (analysis.state, analysis.is_partial) == ("DELIVERED", True)
    (first,) = hospital.results(uid, "east")
    assert len(first.finding["images"]) == 29
    assert first.finding["notes"] == ["images are missing between -11.5 and -1.5 mm"]
    assert [one.CompletionFlag for one in reports(hospital, uid, "east")] == ["PARTIAL"]

    assert hospital.send([whole], "east").returncode == 0  # the sender tries again, this time well
    analysis = hospital.outcome(uid, "east", result_no=2)

    assert (analysis.state, analysis.is_partial) == ("DELIVERED", False)
    assert [len(one.finding["images"]) for one in hospital.results(uid, "east")] == [29, 30]
    flags = Counter(one.CompletionFlag for one in reports(hospital, uid, "east"))
    assert flags == {"PARTIAL": 1, "COMPLETE": 1}
    assert hospital.processes() == before


@pytest.mark.parametrize(
    "body",
    [b"not a DICOM file, but a letter to the ward\n" * 40, random.Random(27).randbytes(200_000)],
    ids=["text", "random"],
)
def test_what_is_no_data_set_is_kept_apart_and_the_node_goes_on(hospital, tmp_path, body):
    claimed, good = (changed([one])[0] for one in small_study("localiser", seed=27)[:1] * 2)
    claimed.SOPInstanceUID, good.SOPInstanceUID = generate_uid(), generate_uid()
    file = tmp_path / "letter.txt"
    file.write_bytes(body)
    before = hospital.processes()

    assert hospital.send([file]).returncode != 0  # dcmtk itself finds nothing to send in it
    assert hospital.store(claimed, body) == 0x0000
    assert hospital.store(good, encoded(good)) == 0x0000

    (entry,) = eventually(lambda: hospital.quarantined(claimed.SOPInstanceUID))
    assert (entry["code"], entry["tenant"], entry["sender"]) == ("not_dicom", "north", "NORTH_CT")
    assert entry["reason"] == (
        "It cannot be read: it holds no UID and no patient, so it is no DICOM data set."
    )
    (kept,) = (hospital.folder / "var").rglob(f"{entry['id']}.dcm")
    assert kept.read_bytes().endswith(body)
    eventually(lambda: good.SOPInstanceUID in hospital.stored(good.StudyInstanceUID))
    assert eventually(lambda: not hospital.spooled())
    assert hospital.processes() == before


@pytest.mark.parametrize(
    ("called", "calling", "words"),
    [
        ("NOBODY", "NORTH_CT", "Called AE Title Not Recognized"),
        ("NORTH_AI", "NOBODY", "Calling AE Title Not Recognized"),
        ("NORTH_AI", "SOUTH_CT", "Calling AE Title Not Recognized"),
    ],
)
def test_an_unknown_title_is_rejected_with_its_reason_and_audited(
    hospital, tmp_path, called, calling, words
):
    study = small_study("localiser", seed=28)
    paths = written(study, tmp_path)

    done = hospital.send(paths, "north", "-aec", called, "-aet", calling)

    assert done.returncode != 0
    assert words in done.stdout
    refused = select(AuditRow).where(AuditRow.action == "association", AuditRow.actor == calling)
    found = eventually(
        lambda: [x for x in hospital.query(refused) if x.detail["called_ae"] == called]
    )
    assert [(one.outcome, one.detail["n"]) for one in found] == [("refused", 1)]
    assert hospital.study_rows(InstanceRow, study[0].StudyInstanceUID) == []


def test_killed_in_the_middle_of_reception_nothing_acknowledged_is_lost(hospital, tmp_path):
    study = small_study("plain", seed=26)
    uid = study[0].StudyInstanceUID
    # From both ends inwards: whenever it stops, a hole is left, which waits for the rest.
    pairs = zip(study[1:16], reversed(study[16:]), strict=True)
    inwards = [study[0], *(one for pair in pairs for one in pair)]
    paths = written(inwards, tmp_path)

    acknowledged = killed_after(hospital, paths, len(paths) // 2)

    assert len(paths) // 2 <= acknowledged < len(paths)
    first = {one.SOPInstanceUID for one in inwards[:acknowledged]}
    eventually(lambda: first <= set(hospital.stored(uid)))
    eventually(hospital.is_listening)
    assert hospital.results(uid) == []
    assert hospital.send(paths).returncode == 0  # it sends again what was not acknowledged, and all

    analysis = hospital.outcome(uid, result_no=1)
    eventually(lambda: not hospital.spooled())
    assert (analysis.state, analysis.is_partial, analysis.result_no) == ("DELIVERED", False, 1)
    (result,) = hospital.results(uid)
    assert len(result.finding["images"]) == 30
    assert len(reports(hospital, uid)) == 1
    # Each instance once, whatever was sent twice; and nothing more is to come of it.
    assert hospital.stored(uid) == sorted(one.SOPInstanceUID for one in study)
    (row,) = hospital.query(select(StudyRow).where(StudyRow.study_instance_uid == uid))
    assert row.n_instances == row.inputs_version == len(study)
    assert hospital.outcome(uid).judge_at is None


def killed_after(hospital: Hospital, paths, n: int) -> int:
    """Send, kill reception at the `n`-th answer; how many were answered with Success."""
    success = "Received Store Response (Success)"
    sender = subprocess.Popen(
        hospital.storescu(paths, "north", "-v"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=PEER_ENVIRONMENT,
    )  # fmt: skip
    acknowledged = 0
    for line in sender.stdout:
        acknowledged += success in line
        if acknowledged == n:
            hospital.kill_stage("scp")
            break
    acknowledged += sender.stdout.read().count(success)
    sender.stdout.close()
    sender.wait()
    return acknowledged


def test_h32_a_pacs_that_is_down_gets_everything_once_when_it_is_back(hospital, tmp_path):
    study = small_study("lesion", seed=29)
    uid = study[0].StudyInstanceUID
    destination = select(DestinationRow).where(DestinationRow.tenant == "east")

    with hospital.archives["east"].down():
        assert hospital.send(written(study, tmp_path), "east").returncode == 0
        eventually(lambda: [one for one in hospital.query(destination) if one.failures >= 2])
        (owed,) = hospital.study_rows(DeliveryRow, uid, "east")
        assert (owed.state, owed.statuses) == ("WAITING", {})
        assert hospital.received("east", uid) == []
    analysis = hospital.outcome(uid, "east")

    assert (analysis.state, analysis.result_no) == ("DELIVERED", 1)
    (delivery,) = hospital.study_rows(DeliveryRow, uid, "east")
    assert delivery.state == "DELIVERED"
    sent = Counter(one.SOPInstanceUID for one in hospital.received("east", uid))
    built = {one.sop_instance_uid: one for one in hospital.study_rows(ObjectRow, uid, "east")}
    assert set(sent.values()) == {1}
    # Of the reports one; the others are for a PACS that does not take Comprehensive 3D.
    roles = Counter(built[sop_uid].role for sop_uid in sent)
    assert roles == {"summary": 1, "overlay": 3, "sr": 1, "ko": 1}


def reports(hospital: Hospital, uid: str, tenant: str = "north") -> list[pydicom.Dataset]:
    return [one for one in hospital.received(tenant, uid) if one.Modality == "SR"]


# The patient with the most bleeding slices, and a clear one: what is tested is the way from CT
# images through the network, not the model, whose figures are in its card.
@pytest.mark.parametrize(("patient", "is_positive"), [(51, True), (120, False)])
def test_a_large_lesion_is_found_and_a_clear_head_is_not(hospital, tmp_path, patient, is_positive):
    study = changed(ctich_study(patient), StudyInstanceUID=generate_uid())

    hospital.send(written(study, tmp_path))
    analysis = hospital.outcome(study[0].StudyInstanceUID)

    assert analysis.state == "DELIVERED"
    (result,) = hospital.results(study[0].StudyInstanceUID)
    assert result.is_positive == is_positive
