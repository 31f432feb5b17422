"""The technologist's correction, end to end: a wrong result is out, and the right one follows."""

import hashlib
import uuid
from collections.abc import Iterator

import pytest
from pydicom import Dataset
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from config.tenants import Destination
from db import operator, withdrawals
from db.release import Release
from db.sandbox import Sandbox
from db.study import WithdrawalReason
from db.tables import AnalysisRow, DeliveryRow, DestinationRow, EventRow, JobRow, StudyRow
from dicom_sr.deliver import Deliverer
from tests.builders import other_patient, other_pixels
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series
from tests.peers import Pacs
from tests.stage import Stages


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=1, memory_mb=4096, cpu_s=60) as pool:
        yield pool


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    with Pacs() as peer:
        yield peer


@pytest.fixture
def stages(engine, settings, tmp_path, pacs) -> Iterator[Stages]:
    to = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=pacs.port)
    made = Stages(engine, settings, make_bundle(tmp_path / "head"), destinations=(to,))
    yield made
    made.close()


def scan() -> list[Dataset]:
    """A head of one made-up patient, every instance with a UID of its own."""
    images = head_series()
    for image in images:
        text = str(image.ImagePositionPatient)
        number = int(hashlib.sha256(text.encode()).hexdigest()[:20], 16)
        image.PatientID, image.PatientName, image.PatientBirthDate = "P1", "DOE^JANE", "19700101"
        image.SOPInstanceUID = f"2.25.{number}"
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    return images


def run(stages: Stages, sandbox: Sandbox) -> None:
    stages.judge()
    stages.infer()
    deliver(stages, sandbox)


def deliver(stages: Stages, sandbox: Sandbox) -> None:
    Deliverer(stages.engine, stages.settings, sandbox, worker="test", version="0.1.0").run_once()


def study(stages: Stages) -> StudyRow:
    with Session(stages.engine) as session:
        return session.scalars(select(StudyRow)).one()


def analysis(stages: Stages) -> AnalysisRow:
    with Session(stages.engine) as session:
        return session.scalars(select(AnalysisRow)).one()


def withdraw(stages: Stages) -> None:
    with Session(stages.engine) as session, session.begin():
        withdrawals.withdraw(
            session, analysis(stages).id, actor="admin", reason=WithdrawalReason.PATIENT_SAFETY
        )


def test_h3_a_corrected_study_is_withdrawn_released_and_judged_again(stages, sandbox, pacs):
    images = scan()
    stages.receive(images)
    run(stages, sandbox)
    wrong = list(pacs.received)
    assert {str(one.PatientID) for one in wrong} == {"P1"}

    stages.receive(other_patient(images))
    assert study(stages).state == "HELD"
    with Session(stages.engine) as session:
        alarm = session.scalars(
            select(EventRow).where(EventRow.is_alarm).order_by(EventRow.id)
        ).all()[-1]
    assert alarm.detail["do"] == f"vigil withdraw {study(stages).public_id}"
    assert alarm.detail["delivered_to"][0].startswith("pacs: result ")
    withdraw(stages)
    deliver(stages, sandbox)
    (note,) = pacs.received[len(wrong) :]
    assert (note.Modality, note.PatientID) == ("KO", "P1")
    Release(stages.engine, stages.settings, sandbox, "admin").study(study(stages).id)
    run(stages, sandbox)

    right = pacs.received[len(wrong) + 1 :]
    assert {str(one.PatientID) for one in right} == {"OTHER-1"}
    assert {one.StudyInstanceUID for one in right} == {images[0].StudyInstanceUID}
    (report,) = [one for one in right if one.Modality == "SR"]
    assert "PredecessorDocumentsSequence" not in report
    assert (study(stages).state, analysis(stages).state) == ("DONE", "DELIVERED")


def test_h8_a_result_of_an_image_that_was_replaced_is_not_sent(stages, sandbox, pacs):
    """Part of it had gone; the rest rests on what an operator has declared wrong."""
    images = scan()
    stages.receive(images)
    stages.judge()
    stages.infer()
    pacs.aborts_after = 1
    deliver(stages, sandbox)
    n = len(pacs.received)
    stages.receive([other_pixels(images[3])])
    with Session(stages.engine) as session:
        entry = session.scalars(
            select(EventRow).where(EventRow.kind == "instance_quarantined")
        ).one()
    key = entry.detail["instance_id"]
    pacs.aborts_after = None

    Release(stages.engine, stages.settings, sandbox, "admin").one(uuid.UUID(key))
    make_due(stages)
    deliver(stages, sandbox)

    assert len(pacs.received) == n
    with Session(stages.engine) as session:
        withheld = session.scalars(
            select(EventRow).where(EventRow.kind == "delivery_withheld")
        ).one()
    assert withheld.detail["reason_code"] == "inputs_replaced"
    run(stages, sandbox)
    assert analysis(stages).state == "DELIVERED"
    assert any(one.Modality == "SR" for one in pacs.received[n:])


def test_a_late_slice_does_not_bring_back_what_was_withdrawn(stages, sandbox, pacs):
    *most, last = scan()
    stages.receive(most)
    run(stages, sandbox)
    withdraw(stages)

    stages.receive([last])
    run(stages, sandbox)
    assert analysis(stages).state == "WITHDRAWN"
    with Session(stages.engine) as session, session.begin():
        operator.rerun(session, analysis(stages).id, actor="admin")
    run(stages, sandbox)

    assert analysis(stages).state == "DELIVERED"


def make_due(stages: Stages) -> None:
    with Session(stages.engine) as session, session.begin():
        session.execute(update(DestinationRow).values(retry_at=func.now()))
        session.execute(update(DeliveryRow).values(run_after=func.now()))
        session.execute(update(JobRow).values(run_after=func.now()))
