"""A node's stages run by hand: reception without a network, intake, readiness, inference."""

import datetime as dt
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian
from sqlalchemy import Engine, func, update
from sqlalchemy.orm import Session

from config.settings import InferenceSettings, Settings
from config.tenants import Tenant
from db.intake import Intake
from db.meta import Provenance
from db.sandbox import Sandbox
from db.spool import Spool
from db.tables import AnalysisRow, StudyRow
from inference.device import Device
from inference.fleet import Fleet
from inference.readiness import Readiness
from inference.scheduler import Scheduler


def encoded(dataset: Dataset) -> bytes:
    """The data set alone, as it travels in a C-STORE."""
    syntax = dataset.file_meta.TransferSyntaxUID
    body = DicomBytesIO()
    body.is_little_endian = syntax != ExplicitVRBigEndian
    body.is_implicit_VR = syntax == ImplicitVRLittleEndian
    write_dataset(body, dataset)
    return body.getvalue()


class Stages:
    """Spool, intake, readiness and scheduler over one database; each step when the test says so."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        bundle: Path,
        *,
        neighbours: tuple[Tenant, ...] = (),
        inference: Mapping[str, Any] = MappingProxyType({}),
        **tenant: object,
    ) -> None:
        name = bundle.name
        tenant = {"quiet_period_s": 60.0, **tenant}
        owner = Tenant(id="north", ae_titles=("NORTH_AI",), models=(name,), **tenant)
        self.settings = settings.model_copy(
            update={
                "tenants": (owner, *neighbours),
                "inference": InferenceSettings(
                    models=(str(bundle),), **{"loaders": 1, **inference}
                ),
            }
        )
        self.engine = engine
        device = Device(torch.device("cpu"), 8)
        self.fleet = Fleet(engine, self.settings, device)
        self.fleet.refresh()
        assert not self.fleet.refused, self.fleet.refused
        self.sandbox = Sandbox(size=1)
        self.intake = Intake(engine, self.settings, self.sandbox, readers=1)
        self.spool = Spool(self.settings.node.data_dir, "test")
        self.readiness = Readiness(engine, self.settings, self.fleet)
        self.scheduler = Scheduler(
            engine, self.settings, self.fleet, device, "test", threading.Event()
        )

    def receive(
        self,
        datasets: Iterable[Dataset],
        *,
        lost_bytes: int = 0,
        uid: str | None = None,
        tenant: str = "north",
    ) -> None:
        """Spool and take in, as if a scanner had sent them, each without its last bytes.

        uid : the SOP Instance UID of the command, where that is not the data set's
        """
        bodies = ((dataset, encoded(dataset)) for dataset in datasets)
        cut = ((dataset, body[: len(body) - lost_bytes]) for dataset, body in bodies)
        self.receive_bytes(cut, uid=uid, tenant=tenant)

    def receive_bytes(
        self,
        received: Iterable[tuple[Dataset, bytes]],
        *,
        uid: str | None = None,
        tenant: str = "north",
    ) -> None:
        """As `receive`: whatever bytes come behind a command of the data set's UIDs and syntax."""
        for dataset, body in received:
            source = Provenance(
                tenant=tenant,
                calling_ae="CT1",
                called_ae=f"{tenant.upper()}_AI",
                received_at="2026-01-01T00:00:00+00:00",
                sop_class_uid=dataset.SOPClassUID,
                sop_instance_uid=dataset.SOPInstanceUID if uid is None else uid,
                transfer_syntax_uid=dataset.file_meta.TransferSyntaxUID,
            )
            self.spool.keep(source, body)
        folder = self.settings.node.data_dir / "spool" / "test"
        while self.intake.take(folder):
            pass

    def pass_max_wait(self) -> None:
        """As if nothing had arrived for ten minutes, which the tenant waits by default."""
        with Session(self.engine) as session, session.begin():
            long_ago = func.now() - dt.timedelta(seconds=601)
            session.execute(update(StudyRow).values(last_instance_at=long_ago))

    def pass_quiet_period(self) -> None:
        """As if nothing had arrived for long enough."""
        with Session(self.engine) as session, session.begin():
            session.execute(
                update(AnalysisRow)
                .where(AnalysisRow.judge_at.is_not(None))
                .values(judge_at=func.now())
            )

    def judge_once(self) -> None:
        self.pass_quiet_period()
        assert self.readiness.sweep_once()

    def judge(self) -> None:
        self.pass_quiet_period()
        while self.readiness.sweep_once():
            pass

    def infer(self, deadline_steps: int = 400) -> None:
        """Until nothing is left to do."""
        for _ in range(deadline_steps):
            if not self.scheduler.step():
                if not self.scheduler.is_busy:
                    return
                self.scheduler.wait()
        raise AssertionError("inference did not come to an end")

    def close(self) -> None:
        self.scheduler.close()
        self.intake.close()
        self.sandbox.close()
        self.spool.close()
