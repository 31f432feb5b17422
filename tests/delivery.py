"""A node with everything but the receiver and the model: from a stored finding to a PACS."""

import io
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from config.settings import Settings
from config.tenants import Destination, Tenant
from db import claims, outbox, queue, results, studies
from db.claims import ClaimedDelivery
from db.files import result_folder, store_path, write_durably
from db.job import JobKind
from db.notices import Notice
from db.result import Finding
from db.sandbox import Sandbox
from db.study import AnalysisEvent, AnalysisState
from db.tables import (
    AnalysisRow,
    DeliveryRow,
    DestinationRow,
    EventRow,
    NoticeRow,
    ObjectRow,
    StudyRow,
)
from dicom_sr.deliver import Deliverer
from tests.builders import ct_series
from tests.findings import make_finding, make_maps


def destination(port: int, name: str = "pacs", **changes: object) -> Destination:
    fields = {"name": name, "ae_title": "PACS", "host": "127.0.0.1", "port": port, **changes}
    return Destination(**fields)  # type: ignore[arg-type]


def analysed(finding: Finding) -> list[str]:
    return [image.instance_id for image in finding.images]


@dataclass
class Node:
    """A node with everything but the receiver and the model."""

    engine: Engine
    settings: Settings
    sandbox: Sandbox
    salts: dict[int, str] = field(default_factory=dict)  # analysis -> that of its images

    def sends_to(self, *destinations: Destination) -> "Node":
        tenant = Tenant(id="north", ae_titles=("NORTH_AI",), destinations=destinations)
        self.settings = self.settings.model_copy(update={"tenants": (tenant,)})
        return self

    @property
    def deliverer(self) -> Deliverer:
        return Deliverer(self.engine, self.settings, self.sandbox, worker="test", version="0.1.0")

    def config_file(self, path: Path) -> Path:
        """The same node for a process of its own."""
        url = self.settings.node.database_url.get_secret_value()
        (tenant,) = self.settings.tenants
        lines = [
            "[node]", f'data_dir = "{self.data_dir}"', f'database_url = "{url}"', "min_free_mb = 0",
            "[[tenants]]", f'id = "{tenant.id}"', f"ae_titles = {list(tenant.ae_titles)}",
        ]  # fmt: skip
        for one in tenant.destinations:
            lines += [
                "[[tenants.destinations]]", f'name = "{one.name}"', f'ae_title = "{one.ae_title}"',
                f'host = "{one.host}"', f"port = {one.port}",
            ]  # fmt: skip
        path.write_text("\n".join(lines))
        return path

    def study(self, *, origin: str = "dicom", salt: str = "", **changes: object) -> int:
        """A received study, of each salt another: row, files in the store; its analysis."""
        series = sorted(ct_series(salt=salt), key=lambda d: float(d.ImagePositionPatient[2]))
        first = series[0]
        with Session(self.engine) as session, session.begin():
            study = StudyRow(
                tenant="north",
                origin=origin,
                study_instance_uid=str(first.StudyInstanceUID),
                patient_id=str(first.PatientID),
                patient_name=str(first.PatientName),
                **changes,
            )
            session.add(study)
            session.flush()
            studies.ensure_analyses(session, study, self.settings.tenants[0])
            mine = select(AnalysisRow.id).where(AnalysisRow.study_id == study.id)
            analysis_id = session.scalars(mine).one()
            study_id = study.id
        self.salts[analysis_id] = salt
        finding = make_finding(series)
        for image, dataset in zip(finding.images, series, strict=True):
            data = io.BytesIO()
            pydicom.dcmwrite(data, dataset, enforce_file_format=True)
            path = store_path(self.data_dir, "north", study_id, uuid.UUID(image.instance_id))
            write_durably(path, data.getvalue())
        self.move(analysis_id, AnalysisEvent.SERIES_READY)
        return analysis_id

    def found(self, analysis_id: int, *, positive: bool = True, **changes: object) -> uuid.UUID:
        """The numbers of a result, stored as inference stores them."""
        images = ct_series(salt=self.salts.get(analysis_id, ""))
        series = sorted(images, key=lambda d: float(d.ImagePositionPatient[2]))
        finding = make_finding(
            series, positive=positive, **{"result_uuid": str(uuid.uuid4()), **changes}
        )
        self.keep_maps(finding)
        with Session(self.engine) as session, session.begin():
            job = queue.claim(session, [JobKind.INFER], "infer")
            assert job is not None
            assert job.analysis_id == analysis_id
            results.store_finding(session, job, finding, analysed(finding))
        return uuid.UUID(finding.result_uuid)

    def revised(self, analysis_id: int) -> uuid.UUID:
        """A newer result of the same analysis."""
        self.move(analysis_id, AnalysisEvent.RERUN)
        return self.found(analysis_id)

    def builds(self) -> None:
        builder = self.deliverer._builder
        while builder.build_once():
            pass

    def given_up(self, analysis_id: int, *destinations: Destination) -> uuid.UUID:
        """A run that failed, and its notice, owed but without an object."""
        if self.state(analysis_id) != AnalysisState.QUEUED:
            self.move(analysis_id, AnalysisEvent.RERUN)
        self.move(analysis_id, AnalysisEvent.GAVE_UP)
        finding = make_finding(ct_series())
        notice = Notice(
            notice_uuid=str(uuid.uuid4()), ended_at="2026-01-01T00:00:00+00:00",
            model=finding.model, output=finding.output, source=finding.images[0],
            is_failure=True, code="gave_up", reason="made up",
        )  # fmt: skip
        with Session(self.engine) as session, session.begin():
            analysis = studies.load(session, analysis_id)
            row = NoticeRow(
                id=uuid.UUID(notice.notice_uuid), analysis_id=analysis_id,
                study_id=analysis.study_id, tenant="north", origin="dicom", bundle=analysis.bundle,
                result_no=results.next_no(session, analysis), notice=notice.to_json(),
                analysis_version=analysis.row_version,
            )  # fmt: skip
            session.add(row)
            session.flush()
            outbox.enqueue(session, analysis, row.id, [(one, "") for one in destinations])
        return uuid.UUID(notice.notice_uuid)

    def claim(self, name: str = "pacs", worker: str = "w") -> ClaimedDelivery | None:
        with Session(self.engine) as session, session.begin():
            return claims.claim_due(session, "north", name, worker)

    def keep_maps(self, finding: Finding) -> None:
        file = io.BytesIO()
        maps = make_maps(finding)
        np.savez_compressed(file, **{f"cam_{i}": one for i, one in maps.items()})
        folder = result_folder(self.data_dir, "north", uuid.UUID(finding.result_uuid))
        write_durably(folder / "maps.npz", file.getvalue())

    def move(self, analysis_id: int, event: AnalysisEvent) -> None:
        with Session(self.engine) as session, session.begin():
            studies.move(session, studies.load(session, analysis_id), event)

    def state(self, analysis_id: int) -> str:
        with Session(self.engine) as session:
            return session.get_one(AnalysisRow, analysis_id).state

    def delivery(self, result_id: uuid.UUID, name: str = "pacs") -> DeliveryRow:
        with Session(self.engine) as session:
            return session.scalars(
                select(DeliveryRow).where(
                    DeliveryRow.result_id == result_id, DeliveryRow.destination == name
                )
            ).one()

    def forget_waiting(self) -> None:
        """As if every back-off were over."""
        with Session(self.engine) as session, session.begin():
            session.execute(update(DestinationRow).values(retry_at=func.now()))
            session.execute(update(DeliveryRow).values(run_after=func.now()))

    def events(self) -> list[str]:
        with Session(self.engine) as session:
            return list(session.scalars(select(EventRow.kind).order_by(EventRow.id)))

    def objects(self) -> list[ObjectRow]:
        with Session(self.engine) as session:
            return list(session.scalars(select(ObjectRow).order_by(ObjectRow.seq)))

    @property
    def data_dir(self) -> Path:
        return self.settings.node.data_dir


@contextmanager
def running(deliverer: Deliverer) -> Iterator[threading.Event]:
    """The stage as `vigil deliver` runs it, in a thread of the test; what tells it to stop."""
    stop = threading.Event()
    thread = threading.Thread(target=deliverer.run, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
