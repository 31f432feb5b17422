"""Orthanc as the hospital's PACS: what a radiologist would find there beside the source study."""

import hashlib
import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from PIL import Image
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from config.settings import Settings
from db import operator, withdrawals
from db.job import Lane
from db.sandbox import Sandbox
from db.study import AnalysisState, WithdrawalReason
from db.tables import DeliveryRow
from node.orthanc import OrthancPacs
from tests.builders import ct_series
from tests.delivery import Node, destination, free_port
from tests.validators import need


class Archive:
    """A running Orthanc and its REST interface."""

    def __init__(self, folder: Path) -> None:
        self._http_port = free_port()
        self._pacs = OrthancPacs(folder, free_port(), self._http_port)
        self.port, self.close = self._pacs.port, self._pacs.close

    def ask(self, path: str, body: bytes | None = None, method: str | None = None) -> bytes:
        url = f"http://127.0.0.1:{self._http_port}{path}"
        request = urllib.request.Request(url, data=body, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())

    def find(self, level: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.ask(f"/{level}?expand"))
        return found

    def digests(self) -> dict[str, str]:
        """MD5 of each stored file, by SOP Instance UID."""
        return {
            one["MainDicomTags"]["SOPInstanceUID"]: self.ask(
                f"/instances/{one['ID']}/attachments/dicom/md5"
            ).decode()
            for one in self.find("instances")
        }

    def instance(self, sop_instance_uid: str) -> str:
        (found,) = json.loads(self.ask("/tools/lookup", sop_instance_uid.encode()))
        return str(found["Path"])


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=1, memory_mb=4096, cpu_s=60) as pool:
        yield pool


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    need("Orthanc")
    running = Archive(tmp_path_factory.mktemp("orthanc") / "pacs")
    yield running
    running.close()


@pytest.fixture
def archive(orthanc: Archive) -> Iterator[Archive]:
    """Holds the source study, as the scanner sent it there, and nothing else."""
    for dataset in ct_series():
        file = BytesIO()
        pydicom.dcmwrite(file, dataset, enforce_file_format=True)
        orthanc.ask("/instances", file.getvalue())
    yield orthanc
    for patient in orthanc.find("patients"):
        orthanc.ask(f"/patients/{patient['ID']}", method="DELETE")


@pytest.fixture
def node(engine: Engine, settings: Settings, sandbox: Sandbox, archive: Archive) -> Node:
    return Node(engine, settings, sandbox).sends_to(destination(archive.port))


@pytest.fixture
def analysis_id(node: Node) -> int:
    """A positive result that Orthanc has."""
    found = node.study()
    node.found(found)
    node.deliverer.run_once()
    assert node.state(found) == AnalysisState.DELIVERED
    return found


def data_set(file: bytes) -> bytes:
    """What follows the file meta information, which an archive may write anew."""
    start = 144 + int.from_bytes(file[140:144], "little")
    return file[start:]


def test_a_result_stands_beside_its_source_in_one_study_of_one_patient(archive, analysis_id):
    (patient,), (study,) = archive.find("patients"), archive.find("studies")

    source = ct_series()[0]
    assert patient["MainDicomTags"]["PatientID"] == source.PatientID
    assert patient["MainDicomTags"]["PatientName"] == str(source.PatientName)
    assert study["MainDicomTags"]["StudyInstanceUID"] == source.StudyInstanceUID
    assert study["MainDicomTags"]["StudyDate"] == source.StudyDate


def test_each_series_has_its_number_and_words_and_instances(archive, node, analysis_id):
    built = [pydicom.dcmread(path) for path in stored(node).values()]
    source = Counter((d.Modality, d.SeriesNumber, d.get("SeriesDescription")) for d in ct_series())
    sent = [d for d in built if str(d.SOPInstanceUID) in archive.digests()]
    expected = source + Counter((d.Modality, d.SeriesNumber, d.SeriesDescription) for d in sent)

    found = {
        (tags["Modality"], int(tags["SeriesNumber"]), tags.get("SeriesDescription")): len(ids)
        for tags, ids in ((s["MainDicomTags"], s["Instances"]) for s in archive.find("series"))
    }

    assert found == expected
    assert sorted(number for _, number, _ in found if number >= 9900) == [9901, 9902, 9903, 9904]
    assert Counter(modality for modality, *_ in found) == {"CT": 1, "OT": 2, "SR": 1, "KO": 1}
    assert sum(found.values()) == 6 + 6


def stored(node: Node) -> dict[str, Path]:
    """What was built, by SOP Instance UID."""
    return {path.stem: path for path in (node.data_dir / "results").rglob("*.dcm")}


def test_it_has_the_bytes_that_were_built_and_a_resend_changes_nothing(archive, node, analysis_id):
    before = archive.digests()
    ours = {uid: path for uid, path in stored(node).items() if uid in before}
    assert len(ours) == 6
    for uid, path in ours.items():
        kept = archive.ask(f"{archive.instance(uid)}/file")
        assert data_set(kept) == data_set(path.read_bytes())
        assert hashlib.md5(kept).hexdigest() == before[uid]

    with Session(node.engine) as session, session.begin():
        operator.resend(session, analysis_id, actor="admin")
    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert archive.digests() == before


def test_its_previews_show_the_pages(archive, node, analysis_id):
    pages = [row for row in node.objects() if row.role in ("summary", "overlay")]
    assert len(pages) == 4

    for row in pages:
        built = pydicom.dcmread(stored(node)[row.sop_instance_uid])
        preview = Image.open(
            BytesIO(archive.ask(f"{archive.instance(row.sop_instance_uid)}/preview"))
        )
        assert preview.size == (built.Columns, built.Rows)
        # What it draws is what we built, pixel by pixel.
        shown = preview.convert("RGB").tobytes()
        assert shown == built.pixel_array.tobytes()


def test_a_rejection_note_stands_beside_what_it_rejects_and_comes_once(archive, node, analysis_id):
    before = archive.digests()
    with Session(node.engine) as session, session.begin():
        withdrawals.withdraw(
            session, analysis_id, actor="admin", reason=WithdrawalReason.PATIENT_SAFETY
        )

    node.deliverer.run_once()
    first = archive.digests()
    with Session(node.engine) as session, session.begin():  # as if its answer had been lost
        session.execute(
            update(DeliveryRow)
            .where(DeliveryRow.lane == Lane.STAT)
            .values(state="WAITING", statuses={}, finished_at=None)
        )
    node.deliverer.run_once()

    assert len(archive.find("studies")) == len(archive.find("patients")) == 1
    (uid,) = set(first) - set(before)
    note = pydicom.dcmread(BytesIO(archive.ask(f"{archive.instance(uid)}/file")))
    (study,) = note.CurrentRequestedProcedureEvidenceSequence
    named = {
        str(one.ReferencedSOPInstanceUID)
        for series in study.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }
    ours = {path.stem for path in stored(node).values()} & before.keys()
    assert named == ours
    assert len(ours) == 6
    assert archive.digests() == first
    assert node.state(analysis_id) == AnalysisState.WITHDRAWN
