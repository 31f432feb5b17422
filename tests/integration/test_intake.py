"""Intake against a real database: whose instance it is, and that nothing doubles or is dropped."""

import random
import re
import uuid
import zlib

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from config.tenants import Sender, Tenant
from db import cut_off, operator
from db import intake as intake_module
from db.committing import Committing
from db.drain import Drain
from db.intake import Intake
from db.refusals import Refused, note
from db.sandbox import Sandbox
from db.spool import Spool, read_provenance, scan
from db.tables import (
    AnalysisRow,
    AuditRow,
    EventRow,
    InstanceRow,
    ObjectRow,
    QuarantineRow,
    ResultRow,
    ReturnedRow,
    SenderRow,
    StudyRow,
)
from tests.builders import changed, compressed, ct_image, ct_series, other_patient, other_pixels
from tests.reception import Reception, encoded

DEFLATED = "1.2.840.10008.1.2.1.99"
NORTH = Tenant(
    id="north",
    ae_titles=("NORTH_AI",),
    senders=(Sender(ae_title="CT1"), Sender(ae_title="ER", lane="stat")),
    shadow=(),
)
SOUTH = Tenant(id="south", ae_titles=("SOUTH_AI",))
OLD = Tenant(id="old", ae_titles=("OLD_AI",), max_study_age_days=30)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2, memory_mb=768, cpu_s=10) as box:
        yield box


@pytest.fixture
def node(settings, engine, sandbox):
    settings = settings.model_copy(update={"tenants": (NORTH, SOUTH, OLD)})
    found = Reception(settings, engine, sandbox)
    yield found
    found.box.close()
    found.intake.close()


def test_a_series_becomes_a_study_with_its_files(node):
    images = ct_series(slices=5)

    ids = node.file(*images)

    study = node.one(StudyRow)
    assert (study.tenant, study.origin, study.n_instances, study.inputs_version) == (
        "north", "dicom", 5, 5,
    )  # fmt: skip
    assert study.study_instance_uid == images[0].StudyInstanceUID
    assert study.patient_id == images[0].PatientID
    assert study.patient_name == str(images[0].PatientName)
    rows = {row.id: row for row in node.all(InstanceRow)}
    assert set(rows) == set(ids)
    assert all(row.stored_at is not None for row in rows.values())
    for key, image in zip(ids, images, strict=True):
        assert rows[key].sop_instance_uid == image.SOPInstanceUID
        assert rows[key].header["instance_number"] == image.InstanceNumber
        path = node.data_dir / "store" / "north" / str(study.id) / f"{key}.dcm"
        assert dcmread(path) == image
    assert node.events()[:2] == ["study_opened", "instances_received"]
    assert node.one(SenderRow).n_instances == 5
    analysis = node.one(AnalysisRow)
    assert (analysis.bundle, analysis.state) == ("ich", "WAITING")


def test_h1_the_same_instance_again_changes_nothing(node):
    image = ct_image()
    node.file(image)
    before = node.one(StudyRow), node.events()

    node.file(image)
    node.file(image, calling_ae="OTHER", association="another")

    after = node.one(StudyRow)
    assert (after.inputs_version, after.row_version) == (
        before[0].inputs_version,
        before[0].row_version,
    )
    assert node.events() == before[1]
    assert len(node.files("store")) == 1
    assert node.all(QuarantineRow) == []


def test_h1_the_same_instance_twice_in_one_batch_is_one_instance(node):
    image = ct_image()

    node.file(image, image, image)

    assert node.one(StudyRow).n_instances == 1
    assert len(node.files("store")) == 1
    assert node.all(QuarantineRow) == []


@pytest.mark.parametrize(
    "change",
    [
        {"Rows": 32},
        {"ImagePositionPatient": [0, 0, 77.0]},
        {"PixelSpacing": [0.9, 0.9]},
        {"RescaleIntercept": -1000},
        {"SeriesInstanceUID": generate_uid()},
        {"StudyInstanceUID": generate_uid()},
        {"PatientID": "SOMEBODY-ELSE"},
        {"PatientName": "Somebody^Else"},
        {"PatientBirthDate": "19010101"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_h2_h3_h6_the_same_uid_for_something_else_holds_the_study(node, change):
    image = ct_image()
    (first,) = node.file(image)

    (second,) = node.file(*changed([image], **change))

    held = node.one(QuarantineRow)
    assert (held.id, held.code, held.is_conflict, held.state) == (
        second, "identity_conflict", True, "OPEN",
    )  # fmt: skip
    study = node.one(StudyRow)
    assert (study.is_held, study.state, study.n_instances) == (True, "HELD", 1)
    assert held.study_id == study.id
    assert [path.stem for path in node.files("store")] == [str(first)]
    assert [path.stem for path in node.files("quarantine")] == [str(second)]
    (alarm,) = [event for event in node.all(EventRow) if event.is_alarm]
    assert alarm.kind == "instance_quarantined"
    assert "SOMEBODY" not in held.reason.upper()


def test_h2_other_pixels_under_the_same_uid_are_a_conflict(node):
    image = ct_image()
    node.file(image)

    node.file(other_pixels(image))

    assert "pixel data" in node.one(QuarantineRow).reason
    assert node.one(StudyRow).is_held


def big_endian(image):
    (again,) = changed([image])
    again.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    again.PixelData = bytes(bytearray(image.PixelData[i ^ 1] for i in range(len(image.PixelData))))
    return again, encoded(again)


def implicit(image):
    (again,) = changed([image])
    again.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return again, encoded(again)


def deflated(image):
    (again,) = changed([image])
    again.file_meta.TransferSyntaxUID = DEFLATED
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    body = squeeze.compress(encoded(image)) + squeeze.flush()
    return again, body + b"\0" * (len(body) % 2)


def private_tag(image):
    (again,) = changed([image])
    again.private_block(0x0099, "SOMEONE", create=True).add_new(1, "LO", "hello")
    return again, encoded(again)


def rle(image):
    again = compressed(image)
    return again, encoded(again)


@pytest.mark.parametrize("variant", [big_endian, implicit, deflated, private_tag, rle])
def test_h2_h12_another_encoding_or_private_tag_is_a_variant(node, variant):
    image = ct_image()
    node.file(image)

    node.keep(*variant(image))
    node.drain()

    assert node.all(QuarantineRow) == []
    assert not node.one(StudyRow).is_held
    assert node.one(StudyRow).inputs_version == 1
    assert node.events()[-1] == "variant_dropped"
    assert dcmread(node.files("store")[0]) == image


@pytest.mark.parametrize("variant", [big_endian, implicit, deflated])
def test_h2_other_pixels_in_another_uncompressed_syntax_are_still_a_conflict(node, variant):
    image = ct_image()
    node.file(image)

    node.keep(*variant(other_pixels(image)))
    node.drain()

    assert node.one(QuarantineRow).code == "identity_conflict"


@pytest.mark.parametrize("variant", [big_endian, implicit, deflated, rle])
def test_h12_every_encoding_is_filed_with_its_pixels(node, variant):
    node.keep(*variant(ct_image()))
    node.drain()

    row = node.one(InstanceRow)
    assert row.header["rows"] == 64
    assert len(row.pixel_sha256) == 64


def test_h4_two_tenants_with_one_study_uid_are_two_studies(node):
    images = ct_series(slices=2)

    node.file(*images, tenant="north")
    node.file(*other_patient(images), tenant="south")

    studies = {study.tenant: study for study in node.all(StudyRow)}
    assert set(studies) == {"north", "south"}
    assert studies["north"].patient_id != studies["south"].patient_id
    assert node.all(QuarantineRow) == []


def test_an_upload_never_meets_what_a_scanner_sent(node):
    image = ct_image()

    node.file(image)
    node.file(*other_patient([image]), origin="user:7", calling_ae="", user="u")

    assert {study.origin for study in node.all(StudyRow)} == {"dicom", "user:7"}
    assert node.all(QuarantineRow) == []


def test_h5_a_second_patient_in_a_study_is_set_aside(node):
    one, two, three = ct_series(slices=3)
    node.file(one)

    node.file(*changed([two], PatientID="OTHER"))
    node.file(three)

    held = node.one(QuarantineRow)
    assert (held.code, held.is_conflict) == ("second_patient", True)
    study = node.one(StudyRow)
    assert (study.n_instances, study.is_held) == (2, True)


def test_h5_two_patients_in_one_batch_do_not_mix(node):
    one, two, three = ct_series(slices=3)

    node.file(one, *changed([two], PatientID="OTHER"), three)

    assert node.one(StudyRow).n_instances == 2
    assert node.one(QuarantineRow).code == "second_patient"


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ({"PatientID": " P1 "}, {"PatientID": "P1"}, True),
        ({"IssuerOfPatientID": "A"}, {"IssuerOfPatientID": "A"}, True),
        ({"IssuerOfPatientID": "A"}, {"IssuerOfPatientID": None}, True),
        ({"IssuerOfPatientID": "A"}, {"IssuerOfPatientID": "B"}, False),
        ({"PatientID": ""}, {"PatientID": ""}, True),
        ({"PatientID": "", "PatientName": ""}, {"PatientID": "", "PatientName": ""}, True),
        ({"PatientID": "", "PatientName": ""}, {"PatientID": "", "PatientName": "A"}, False),
        ({"PatientID": "", "PatientName": ""}, {"PatientID": "P1", "PatientName": ""}, False),
        ({"PatientID": "", "PatientName": "A"}, {"PatientID": "", "PatientName": "B"}, False),
        ({"PatientID": ""}, {"PatientID": "P1"}, False),
        ({"PatientID": None}, {"PatientID": "P1"}, False),
        ({"PatientName": "A^B"}, {"PatientName": "A^B^^"}, True),
    ],
)
def test_h7_what_makes_two_instances_one_patients(node, first, second, is_same):
    one, two = ct_series(slices=2)

    node.file(*changed([one], **first))
    node.file(*changed([two], **second))

    assert len(node.all(QuarantineRow)) == (0 if is_same else 1)
    assert node.one(StudyRow).n_instances == (2 if is_same else 1)


def test_h7_a_late_issuer_counts_from_then_on(node):
    one, two, three = ct_series(slices=3)

    node.file(one)
    node.file(*changed([two], IssuerOfPatientID="A"))
    node.file(*changed([three], IssuerOfPatientID="B"))

    assert node.one(QuarantineRow).code == "second_patient"


@pytest.mark.parametrize(
    ("more", "change", "code"),
    [
        ({"sop_instance_uid": "1.2.3"}, {}, "uid_mismatch"),
        ({"sop_instance_uid": ""}, {}, "uid_mismatch"),
        ({"sop_class_uid": "1.2.840.10008.5.1.4.1.1.4"}, {}, "uid_mismatch"),
        ({}, {"StudyInstanceUID": ""}, "missing_uid"),
        ({}, {"SeriesInstanceUID": None}, "missing_uid"),
        ({}, {"StudyInstanceUID": "../../etc/passwd"}, "bad_uid"),
        ({}, {"StudyInstanceUID": "1." * 40 + "1"}, "bad_uid"),
        ({}, {"StudyInstanceUID": "1.2.abc"}, "bad_uid"),
        ({}, {"StudyInstanceUID": "1.2\\1.3"}, "bad_uid"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI", "ignore:The value length")
def test_h6_h10_uids_that_disagree_or_cannot_be_are_set_aside(node, more, change, code):
    image = ct_image()

    node.file(*changed([image], **change), **more)

    assert node.one(QuarantineRow).code == code
    assert node.all(StudyRow) == []
    (path,) = node.files("quarantine")
    assert re.fullmatch(r"[0-9a-f-]{36}\.dcm", path.name)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_h10_nul_padding_and_leading_zeros_are_taken(node):
    image = ct_image()
    (odd,) = changed([image], StudyInstanceUID="1.2.003.4")

    node.file(odd)

    assert node.one(StudyRow).study_instance_uid == "1.2.003.4"


NO_DATA_SET = {
    "text": b"hello, this is no DICOM at all\n" * 20,
    "zeros": b"\0" * 1000,
    "ones": b"\xff" * 1000,
    "random": random.Random(5).randbytes(100_000),
    "one byte": b"x",
}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("body", NO_DATA_SET.values(), ids=NO_DATA_SET)
def test_h20_what_is_no_data_set_ends_in_quarantine_under_its_commands_uid(node, body, syntax):
    image = ct_image()

    node.keep(image, body, transfer_syntax_uid=syntax)
    node.drain()

    row = node.one(QuarantineRow)
    assert (row.code, row.sop_instance_uid, row.sender, row.is_conflict) == (
        "not_dicom", image.SOPInstanceUID, "CT1", False,
    )  # fmt: skip
    assert row.reason == (
        "It cannot be read: it holds no UID and no patient, so it is no DICOM data set."
    )
    (path,) = node.files("quarantine")
    assert path.read_bytes().endswith(body)
    assert node.all(StudyRow) == []


@pytest.mark.parametrize(
    ("share", "part"), [(0.1, "data set"), (0.3, "pixel data"), (0.999, "pixel data")]
)
def test_h20_a_cut_off_data_set_ends_in_quarantine_and_the_whole_one_is_accepted(node, share, part):
    image = ct_image()
    body = encoded(image)

    node.keep(image, body[: int(len(body) * share)])
    node.drain()

    row = node.one(QuarantineRow)
    assert (row.code, row.sop_instance_uid) == ("cut_off", image.SOPInstanceUID)
    assert row.reason == f"It cannot be read: the {part} is cut off."
    assert node.all(StudyRow) == []
    node.file(image)
    assert node.one(InstanceRow).sop_instance_uid == image.SOPInstanceUID
    assert not node.one(StudyRow).is_held


def test_h20_a_cut_off_image_is_named_beside_its_study_and_holds_nothing(node):
    first, cut, strange = ct_series(slices=3)
    (other,) = other_patient([strange])

    node.receive(first)
    for image in (cut, other):
        node.keep(image, encoded(image)[:-100])
    node.drain()

    study = node.one(StudyRow)
    rows = {row.sop_instance_uid: row for row in node.all(QuarantineRow)}
    assert {row.code for row in rows.values()} == {"cut_off"}
    assert rows[cut.SOPInstanceUID].study_id == study.id
    assert rows[other.SOPInstanceUID].study_id is None  # not this patient's
    assert (study.n_instances, study.is_held) == (1, False)
    events = [row for row in node.all(EventRow) if row.kind == "instance_quarantined"]
    assert [row.study_id for row in events].count(study.id) == 1


def cut(node, image, **more):
    key = node.keep(image, encoded(image)[:-100], **more)
    node.drain()
    return key


def linked(node):
    return {row.id: row.study_id is not None for row in node.all(QuarantineRow)}


def test_h20_a_cut_off_image_finds_its_study_once_that_is_there(node):
    first, lost, strange, mistaken, other_tenants = ct_series(slices=5)
    its = cut(node, lost)
    others = {
        cut(node, *other_patient([strange])),
        cut(node, mistaken, sop_instance_uid="1.2.3"),
        cut(node, other_tenants, tenant="south"),
        cut(node, other_tenants, origin="user:1"),
    }
    assert not any(linked(node).values())

    another = {"StudyInstanceUID": generate_uid(), "SOPInstanceUID": generate_uid()}
    node.file(*changed([first], **another))
    assert not any(linked(node).values())
    node.file(first)

    assert linked(node) == {its: True} | dict.fromkeys(others, False)
    assert node.all(StudyRow)[1].n_instances == 1


def test_h20_a_cut_off_image_finds_its_study_after_a_restart_and_when_its_file_comes_late(node):
    first, lost = ct_series(slices=2)
    its = cut(node, lost)
    (path,) = node.files("quarantine")
    path.rename(path.with_suffix(".away"))  # another intake has not linked it yet
    node.file(first)
    assert linked(node) == {its: False}
    path.with_suffix(".away").rename(path)
    with Session(node.engine) as session, session.begin():
        session.scalars(select(AnalysisRow)).one().judge_at = None

    again = Intake(node.engine, node.settings, node.sandbox)
    node.receive(first)  # a duplicate
    again.take(node.box.folder)
    again.close()

    assert linked(node) == {its: True}
    assert node.one(AnalysisRow).judge_at is not None


def test_h20_a_cut_off_image_that_was_discarded_finds_no_study(node):
    first, lost = ct_series(slices=2)
    its = cut(node, lost)
    with Session(node.engine) as session, session.begin():
        operator.discard(session, its, actor="test")

    node.file(first)

    assert linked(node) == {its: False}


def test_h20_one_strange_cut_off_file_is_read_no_more_than_once_for_a_study(node, monkeypatch):
    first, lost, *more = ct_series(slices=4)
    cut(node, *other_patient([lost]))
    read = []
    monkeypatch.setattr(
        cut_off, "read_provenance", lambda path: read.append(path) or read_provenance(path)
    )

    for image in (first, *more):
        node.file(image)

    assert len(read) == 1


def test_h20_a_cut_off_image_has_its_study_judged_again_unless_that_is_too_old(node):
    first, lost = ct_series(slices=2)
    aged = changed(ct_series(slices=2), StudyDate="20200101", StudyInstanceUID=generate_uid())
    node.file(first)
    node.file(aged[0], tenant="old")
    with Session(node.engine) as session, session.begin():
        session.execute(AnalysisRow.__table__.update().values(judge_at=None))

    cut(node, lost)
    cut(node, aged[1], tenant="old")

    looks = {row.tenant: row.judge_at is not None for row in node.all(AnalysisRow)}
    assert looks == {"north": True, "old": False}


def test_h10_h20_a_malformed_uid_of_a_command_is_not_repeated_in_the_quarantine(node):
    node.keep(ct_image(), b"x", sop_instance_uid="../../etc/passwd\0x")
    node.drain()

    assert node.one(QuarantineRow).sop_instance_uid == ""


def test_h20_a_small_file_that_inflates_to_gigabytes_is_quarantined_unread(node):
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(squeeze.compress(bytes(2**24)) for _ in range(128)) + squeeze.flush()
    healthy = ct_image()

    node.keep(healthy, bomb, transfer_syntax_uid=DEFLATED)
    node.receive(healthy)
    node.drain()

    assert node.one(QuarantineRow).code == "kills_reader"
    assert node.one(StudyRow).n_instances == 1


def test_h20_deep_sequences_and_wrong_vrs_end_in_a_stated_outcome(node):
    deep = ct_image()
    inner = Dataset()
    for _ in range(200):
        outer = Dataset()
        outer.ReferencedSeriesSequence = Sequence([inner])
        inner = outer
    deep.ReferencedStudySequence = Sequence([inner])
    odd = ct_series(slices=2)[1]
    body = encoded(odd).replace(b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x10\x00UL\x02\x00")

    node.receive(deep)
    node.keep(odd, body)
    node.drain()

    assert len(node.all(InstanceRow)) + len(node.all(QuarantineRow)) == 2


def test_h25_our_own_object_is_kept_apart_and_counted(node):
    image = ct_image()
    node.file(image)
    (ours,) = changed([image], SOPInstanceUID=generate_uid(), Manufacturer="Vigil")
    item = Dataset()
    item.Manufacturer, item.DeviceUID = "Vigil", "2.25.123"
    ours.ContributingEquipmentSequence = Sequence([item])

    node.file(ours)
    node.file(ours)

    returned = node.one(ReturnedRow)
    assert (returned.sop_instance_uid, returned.n) == (ours.SOPInstanceUID, 2)
    assert node.one(StudyRow).inputs_version == 1
    assert len(node.files("returned")) == 1


def test_h25_an_object_we_know_by_its_uid_is_ours_whatever_it_says(node, engine):
    image = ct_image()
    node.file(image)
    issued(engine, node.one(StudyRow), node.one(AnalysisRow), "1.2.3.4")

    node.file(*changed([image], SOPInstanceUID="1.2.3.4"))

    assert node.one(ReturnedRow).sop_instance_uid == "1.2.3.4"
    assert node.one(StudyRow).n_instances == 1


def issued(engine, study, analysis, sop_instance_uid):
    result = uuid.uuid4()
    common = {"study_id": study.id, "tenant": study.tenant, "origin": study.origin}
    with Session(engine) as session, session.begin():
        session.add(
            ResultRow(
                id=result,
                analysis_id=analysis.id,
                bundle="ich",
                result_no=1,
                finding={},
                is_positive=False,
                urgency="ROUTINE",
                **common,
            )
        )
        session.flush()
        session.add(
            ObjectRow(
                id=uuid.uuid4(),
                result_id=result,
                analysis_id=analysis.id,
                variant="",
                role="sr",
                seq=1,
                sop_class_uid="1.2",
                sop_instance_uid=sop_instance_uid,
                series_instance_uid="1.3",
                transfer_syntax_uid="1.4",
                sha256="",
                size_bytes=1,
                **common,
            )
        )


def test_another_vendors_secondary_image_is_stored(node):
    (other,) = changed([ct_image()], ImageType=["DERIVED", "SECONDARY", "AXIAL"])

    node.file(other)

    assert node.one(StudyRow).n_instances == 1


def test_h21_late_slices_raise_the_inputs_version(node):
    one, two = ct_series(slices=2)
    node.file(one)
    judged = node.one(AnalysisRow).judge_at

    node.file(two)

    assert node.one(StudyRow).inputs_version == 2
    assert node.one(AnalysisRow).judge_at > judged


def test_the_senders_lane_is_the_studys_and_the_more_urgent_one_wins(node):
    one, two = ct_series(slices=2)

    node.file(one)
    assert node.one(StudyRow).lane == 1
    node.file(two, calling_ae="ER")

    assert node.one(StudyRow).lane == 0


def test_h24_a_migrated_archive_is_stored_but_not_analysed(node):
    one, two = changed(ct_series(slices=2), StudyDate="20010101")

    node.file(one, tenant="old")
    node.file(two, tenant="old")

    assert node.one(StudyRow).n_instances == 2
    analysis = node.one(AnalysisRow)
    assert (analysis.state, analysis.reason_code) == ("NOT_ANALYSED", "study_too_old")
    assert analysis.judge_at is None
    assert node.one(StudyRow).state == "DONE"


def test_a_study_without_a_date_is_not_too_old(node):
    node.file(*changed([ct_image()], StudyDate=""), tenant="old")

    assert node.one(AnalysisRow).state == "WAITING"


def test_a_tenant_that_left_the_configuration_loses_nothing(node):
    node.file(ct_image(), tenant="gone")

    assert node.one(StudyRow).n_instances == 1
    assert node.all(AnalysisRow) == []


@pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:The value length")
def test_h20_texts_that_a_database_cannot_hold_do_not_stop_the_rest(node):
    one, two = ct_series(slices=2)
    odd = changed(
        [one], AccessionNumber="A\0B" + "Ä" * 3000, PatientName="\x00\x01", StudyDescription="\x00"
    )

    node.file(*odd, *changed([two], StudyInstanceUID=generate_uid()))

    assert len(node.all(InstanceRow)) == 2


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 192", "Müller^Jörg"),
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    ],
)
def test_h9_names_keep_their_characters(node, charset, name):
    image = ct_image()
    image.SpecificCharacterSet = charset
    image.PatientName = name

    node.file(image)

    assert node.one(StudyRow).patient_name == name


def test_h38_rows_without_their_file_are_finished(node, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    ids = node.receive(*ct_series(slices=3))
    with monkeypatch.context() as patch:
        patch.setattr(intake_module, "link_all", die)
        with pytest.raises(KeyboardInterrupt):
            node.intake.take(node.box.folder)

    node.drain()

    assert node.one(StudyRow).inputs_version == 3
    assert {row.id for row in node.all(InstanceRow) if row.stored_at} == set(ids)
    assert {path.stem for path in node.files("store")} == {str(key) for key in ids}


def test_a_duplicate_waits_until_its_original_is_stored(node):
    image = ct_image()
    node.file(image)
    with Session(node.engine) as session, session.begin():
        session.execute(InstanceRow.__table__.update().values(stored_at=None))
    node.receive(image)

    assert node.intake.take(node.box.folder) == 0

    with Session(node.engine) as session, session.begin():
        session.execute(InstanceRow.__table__.update().values(stored_at=func.now()))
    node.drain()
    assert node.one(StudyRow).n_instances == 1


def test_two_intakes_of_one_study_file_each_instance_once(node):
    images = ct_series(slices=6)
    second_box = Spool(node.data_dir, "scp-1")
    second = Intake(node.engine, node.settings, node.sandbox)
    node.receive(*images[:4])
    first_box, node.box = node.box, second_box
    node.receive(*images[2:])

    for _ in range(20):
        for intake, box in ((node.intake, first_box), (second, second_box)):
            intake._later.clear()
            intake.take(box.folder)

    assert node.one(StudyRow).n_instances == 6
    assert scan(first_box.folder) == scan(second_box.folder) == []
    assert node.all(QuarantineRow) == []
    first_box.close()
    second.close()


def test_h40_a_database_that_is_away_loses_nothing(node, database_url):
    from sqlalchemy import create_engine

    away = create_engine(database_url.set(database="nowhere"))
    waiting = Intake(away, node.settings, node.sandbox)
    node.receive(ct_image())

    with pytest.raises(OperationalError):
        waiting.take(node.box.folder)

    waiting.close()
    node.drain()
    assert node.one(StudyRow).n_instances == 1


def drain_of(node):
    committing = Committing(node.engine, node.settings, node.sandbox)
    return Drain(node.engine, node.settings, "scp-0", node.intake, committing)


def test_folders_of_receivers_that_are_no_more_are_adopted(node):
    old = Spool(node.data_dir, "scp-7")
    web = Spool(node.data_dir, "web")
    keep, node.box = node.box, old
    node.receive(ct_image())
    half = old.folder / "north" / f"{uuid.uuid4()}.part"
    half.touch()
    old.close()
    drain = drain_of(node)

    drain.step()

    assert node.one(StudyRow).n_instances == 1
    assert not half.exists()
    drain.close()
    node.box = keep
    web.close()


def test_h17_refusals_reach_the_audit_trail_and_alarm_when_repeated(node):
    refused = Refused(code="calling_ae", address="10.0.0.9", calling_ae="EVIL", tenant="north")
    drain = drain_of(node)
    for _ in range(4):
        note(node.box.folder, refused)
    drain.step()
    assert not any(event.is_alarm for event in node.all(EventRow))

    note(node.box.folder, refused)
    drain._look_at = 0.0
    drain.step()

    assert [row.detail["n"] for row in node.all(AuditRow)] == [4, 1]
    assert [event.is_alarm for event in node.all(EventRow)] == [False, True]
    drain.close()


def test_a_real_head_is_filed(node, data_root):
    paths = sorted((data_root / "head-ct-ge").glob("*.dcm"))
    if not paths:
        pytest.skip("no head-ct-ge")

    node.file(*[dcmread(path) for path in paths])

    study = node.one(StudyRow)
    assert study.n_instances == len(paths) == 28
    header = node.all(InstanceRow)[0].header
    assert (header["gantry_tilt"], header["kernel"], header["body_part"]) == (18.5, "STD+", "HEAD")


def test_no_patient_data_in_the_logs(node, capsys):
    image = ct_image()
    node.file(image)
    node.file(*other_patient([image]))

    said = capsys.readouterr().out

    assert "instance_quarantined" in said
    for dataset in (image, *other_patient([image])):
        assert str(dataset.PatientID) not in said
        assert str(dataset.PatientName) not in said
