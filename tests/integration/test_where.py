"""Where a study is, and who is alive: what an operator asks of a node that receives for real."""

import datetime as dt
import io

import pytest
from pydicom import dcmwrite
from rich.console import Console
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from config.tenants import Tenant
from db.files import quarantine_path
from db.intake import Intake
from db.meta import Provenance
from db.sandbox import Sandbox
from db.spool import Spool, scan
from db.tables import ProcessRow, QuarantineRow, StudyRow
from node import set_aside
from node.status import show as show_status
from node.status import status
from node.where import UnknownStudy, search, show
from tests.builders import changed, ct_series, other_patient

NORTH = Tenant(id="north", ae_titles=("NORTH_AI",))
SOUTH = Tenant(id="south", ae_titles=("SOUTH_AI",))


@pytest.fixture
def here(settings):
    return settings.model_copy(update={"tenants": (NORTH, SOUTH)})


@pytest.fixture
def receive(here, engine):
    """Spool and take in, as the receiver and its intake do; bytes go as they are."""
    with Sandbox(1) as sandbox:
        intake, spool = Intake(engine, here, sandbox), Spool(here.node.data_dir, "scp-0")

        def run(*datasets, tenant="north", uid=None, lost_bytes=0):
            for dataset in datasets:
                body = io.BytesIO()
                dcmwrite(body, dataset, implicit_vr=False, little_endian=True)
                source = Provenance(
                    tenant=tenant,
                    calling_ae="CT1",
                    received_at=dt.datetime.now(dt.UTC).isoformat(),
                    sop_class_uid=dataset.SOPClassUID,
                    sop_instance_uid=uid or dataset.SOPInstanceUID,
                    transfer_syntax_uid="1.2.840.10008.1.2.1",
                )
                whole = _data_set(body.getvalue())
                spool.keep(source, whole[: len(whole) - lost_bytes])
            while scan(spool.folder):
                intake.take(spool.folder)

        yield run
        spool.close()
        intake.close()


def _data_set(whole: bytes) -> bytes:
    if whole[128:132] != b"DICM":
        return whole
    return whole[144 + int.from_bytes(whole[140:144], "little") :]


@pytest.fixture
def asked(engine, here):
    def ask(text, tenant=""):
        with Session(engine) as session:
            return search(session, here, text, tenant)

    return ask


def test_a_study_tells_what_was_kept_out_of_it(receive, asked):
    first = ct_series(slices=2)
    receive(*first, *changed(other_patient(first[:1]), SOPInstanceUID="1.2.3.4"))

    (story,) = asked(first[0].AccessionNumber)

    assert story["state"] == "HELD"
    assert [one["code"] for one in story["quarantine"]] == ["second_patient"]


def test_the_patient_who_was_set_aside_is_found_by_the_own_header(receive, asked):
    first = ct_series(slices=2)
    receive(*first, *changed(other_patient(first[:1]), SOPInstanceUID="1.2.3.4"))

    (story,) = asked("OTHER-1")

    (study,) = asked(first[0].PatientID)
    assert story["state"] == "QUARANTINED"
    assert story["study"] is None
    assert story["kept_out_of"] == study["study"]
    assert story["instances"] == 1
    assert story["sender"] == "CT1"


@pytest.mark.parametrize("keyword", ["AccessionNumber", "StudyInstanceUID", "SOPInstanceUID"])
def test_what_joined_no_study_is_found_by_whatever_its_header_holds(receive, asked, keyword):
    (image,) = ct_series(slices=1)
    receive(image, uid="1.2.3.999")  # sent under another UID than it has

    (story,) = asked(image[keyword].value)

    assert story["quarantine"][0]["code"] == "uid_mismatch"
    assert story["accession_number"] == image.AccessionNumber


@pytest.mark.parametrize("keyword", ["AccessionNumber", "PatientID", "StudyInstanceUID"])
def test_what_came_cut_off_is_found_by_the_header_that_is_left_of_it(receive, asked, keyword):
    (image,) = ct_series(slices=1)
    receive(image, lost_bytes=100)

    (story,) = asked(image[keyword].value)

    assert story["quarantine"][0]["code"] == "cut_off"
    assert (story["patient_id"], story["state"]) == (image.PatientID, "QUARANTINED")


def test_a_decided_entry_is_found_by_its_record(receive, asked, engine, here):
    (image,) = ct_series(slices=1)
    receive(image, uid="1.2.3.999")
    with Session(engine) as session, session.begin():
        row = session.scalars(select(QuarantineRow)).one()
        row.state, entry = "DISCARDED", str(row.id)
        quarantine_path(here.node.data_dir, "north", row.id).unlink()

    by_id, by_uid = asked(entry), asked(image.SOPInstanceUID)

    assert by_id == by_uid
    assert by_id[0]["quarantine"][0]["state"] == "DISCARDED"
    with pytest.raises(UnknownStudy):
        asked(image.PatientID)


def test_another_tenants_quarantine_is_not_searched(receive, asked):
    (image,) = ct_series(slices=1)
    receive(image, uid="1.2.3.999", tenant="south")

    assert len(asked(image.PatientID, "south")) == 1
    with pytest.raises(UnknownStudy):
        asked(image.PatientID, "north")


def test_a_file_that_cannot_be_read_stops_no_search(receive, asked, here, engine):
    series = ct_series(slices=2)
    receive(series[0], uid="1.2.3.999")
    receive(series[1], uid="1.2.3.998")
    with Session(engine) as session:
        first = session.scalars(select(QuarantineRow).order_by(QuarantineRow.at)).first()
    quarantine_path(here.node.data_dir, "north", first.id).write_bytes(b"nonsense")

    (story,) = asked(series[1].PatientID)

    assert story["instances"] == 1


def test_the_story_of_what_was_set_aside_reads_for_a_person(receive, asked):
    (image,) = ct_series(slices=1)
    receive(image, uid="1.2.3.999")
    console = Console(record=True, width=120)

    show(asked(image.AccessionNumber), console)

    text = console.export_text()
    assert "QUARANTINED" in text
    assert "not the one it was sent under" in text
    assert "vigil quarantine list" in text


def test_no_child_is_started_where_nothing_was_set_aside(asked, engine, monkeypatch):
    with Session(engine) as session, session.begin():
        session.add(StudyRow(tenant="north", origin="dicom", study_instance_uid="1.2"))
    monkeypatch.setattr(set_aside, "Sandbox", None)  # would fail if it were called

    assert asked("1.2")[0]["quarantine"] == []


def test_status_lists_the_living_and_marks_the_lately_dead(engine, here):
    with Session(engine) as session, session.begin():
        for name, seconds in (("lives", 1), ("died", 100), ("long-dead", 3600)):
            seen = func.now() - dt.timedelta(seconds=seconds)
            session.add(ProcessRow(name=name, stage="scp", seen_at=seen))
    console = Console(record=True, width=120)

    with Session(engine) as session:
        value = status(session, here)
    show_status(value, console)

    alive = {one["name"]: one["is_alive"] for one in value["processes"]}
    assert alive == {"lives": True, "died": False}
    marked = [line for line in console.export_text().splitlines() if "gone" in line]
    assert len(marked) == 1
    assert "died" in marked[0]
