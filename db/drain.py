"""The intake process: empties its receiver's spool folder, and those that nobody else empties."""

import argparse
import contextlib
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from config import logs
from config.settings import Settings, load
from db import studies
from db.committing import Committing
from db.engine import engine_for, upgrade
from db.errors import NodeError, TransientError
from db.heartbeat import Heartbeat
from db.intake import Intake
from db.process import StopSignal, die_with_parent
from db.refusals import Refused, forget, noted
from db.sandbox import Sandbox
from db.spool import FolderLock, SpoolBusy, clear_parts, receivers
from db.tables import AuditRow

READERS = 2
_MEMORY_MB, _CPU_S = 2048, 60.0  # of one reader
_IDLE_S, _RETRY_S = 0.1, 1.0
_LOOK_ROUND_S = 2.0  # for folders without an intake, refusals, and storage commitment
_ALARM_AFTER = 5  # refusals of one peer in this process's life, and at each doubling
log = structlog.get_logger()


class Drain:
    """The folders this process empties, and the loop that does it."""

    def __init__(
        self, engine: Engine, settings: Settings, own: str, intake: Intake, committing: Committing
    ) -> None:
        self._engine, self._settings, self._own = engine, settings, own
        self._intake, self._committing = intake, committing
        self._locks: dict[Path, FolderLock] = {}
        self._refused: Counter[Refused] = Counter()
        self._look_at = 0.0

    def step(self) -> int:
        """One round; how many files left the spool. Raises TransientError or DBAPIError."""
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _LOOK_ROUND_S
            self._adopt()
            for folder in self._locks:
                self._record_refusals(folder)
                self._committing.take(folder)
        return sum(self._intake.take(folder) for folder in self._locks)

    def close(self) -> None:
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()

    def _adopt(self) -> None:
        """Take our receiver's folder, the uploads', and those of receivers that are no more."""
        served = {f"scp-{number}" for number in range(self._settings.scp.processes)} - {self._own}
        for folder in receivers(self._settings.node.data_dir):
            if folder.name in served or folder in self._locks:
                continue
            with contextlib.suppress(SpoolBusy):
                self._locks[folder] = FolderLock(folder, ".intake.lock")
                log.info("folder_adopted", worker=folder.name)
            if folder.name not in (self._own, "web"):
                with contextlib.suppress(SpoolBusy):
                    receiver = FolderLock(folder, ".receiver.lock")
                    clear_parts(folder)
                    receiver.close()

    def _record_refusals(self, folder: Path) -> None:
        found, n_lines = noted(folder)
        if not n_lines:
            return
        with Session(self._engine) as session, session.begin():
            for refused, n in Counter(found).items():
                self._record(session, refused, n)
        forget(folder, n_lines)

    def _record(self, session: Session, refused: Refused, n: int) -> None:
        before = self._refused[refused]
        self._refused[refused] += n
        is_alarm = before < _ALARM_AFTER <= before + n
        detail: dict[str, Any] = {"code": refused.code, "address": refused.address, "n": n}
        detail |= {"called_ae": refused.called_ae, "calling_ae": refused.calling_ae}
        session.add(
            AuditRow(
                tenant=refused.tenant,
                actor=refused.calling_ae or refused.address,
                action="association",
                outcome="refused",
                detail=detail,
            )
        )
        studies.record(
            session,
            "association_refused",
            tenant=refused.tenant,
            origin="dicom",
            is_alarm=is_alarm,
            **detail,
        )


def run(settings: Settings, own: str, stopping: StopSignal) -> None:
    """Until asked to stop: file what arrives; whatever is away meanwhile, come back to it."""
    while not stopping.is_set():
        try:
            upgrade(settings)
            break
        except (NodeError, DBAPIError) as error:
            _wait(stopping, error)
    if stopping.is_set():
        return
    engine = engine_for(settings, "node")
    heartbeat = Heartbeat(engine, "scp", lambda: {"receiver": own})
    with Sandbox(READERS, _MEMORY_MB, _CPU_S) as sandbox:
        intake = Intake(engine, settings, sandbox, READERS)
        drain = Drain(engine, settings, own, intake, Committing(engine, settings, sandbox))
        while not stopping.is_set():
            try:
                n = drain.step()
            except (TransientError, DBAPIError) as error:
                _wait(stopping, error)
            else:
                if not n:
                    stopping.wait(_IDLE_S)
        drain.close()
        intake.close()
    heartbeat.close()
    engine.dispose()


def _wait(stopping: StopSignal, error: Exception) -> None:
    # Its message holds the statement's parameters, and those a patient.
    code = error.code if isinstance(error, NodeError) else "database_away"
    log.warning("intake_waits", exc_code=code, exc_type=type(error).__name__, wait_s=_RETRY_S)
    stopping.wait(_RETRY_S)


def main() -> None:
    parser = argparse.ArgumentParser(prog="db.drain")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parent", type=int, default=os.getppid())
    given = parser.parse_args()
    die_with_parent(given.parent)
    settings = load(given.config)
    logs.set_up("intake", settings.node.log_level)
    stopping = StopSignal()
    signal.signal(signal.SIGHUP, lambda _, __: stopping.set())  # its parent starts it anew
    run(settings, given.name, stopping)


if __name__ == "__main__":
    main()
