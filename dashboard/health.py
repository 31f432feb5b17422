"""Whether the node is well: database, spool, model, disk, processes, queue, destinations."""

import datetime as dt
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from config.settings import Settings
from dashboard import overview
from dashboard.tenancy import NOBODY, acting_as
from db.outbox import OPEN
from db.tables import DeliveryRow, DestinationRow, ProcessRow, SenderRow

#: A process that has not reported for this long is not counted on.
ALIVE_S = 30.0


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    is_ok: bool
    words: str


@dataclass(frozen=True, slots=True)
class Process:
    name: str
    stage: str
    is_alive: bool
    started_at: dt.datetime
    seen_at: dt.datetime
    detail: dict[str, object]


@dataclass(frozen=True, slots=True)
class DestinationHealth:
    tenant: str
    name: str
    n_waiting: int
    failures: int
    retry_at: dt.datetime
    last_success_at: dt.datetime | None
    last_error: str


@dataclass(frozen=True, slots=True)
class SenderHealth:
    tenant: str
    ae_title: str
    n_instances: int
    last_seen_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Disk:
    path: str
    free_mb: int
    total_mb: int
    is_ok: bool


@dataclass(frozen=True, slots=True)
class Health:
    checks: tuple[Check, ...]
    processes: tuple[Process, ...]
    queue: overview.Queue
    destinations: tuple[DestinationHealth, ...]
    senders: tuple[SenderHealth, ...]
    disk: Disk
    database_bytes: int
    database_version: str

    @property
    def is_well(self) -> bool:
        return (
            self.disk.is_ok
            and all(check.is_ok for check in self.checks)
            and all(one.is_alive for one in self.processes)
            and not any(one.failures for one in self.destinations)
        )


def readiness(engine: Engine, settings: Settings) -> tuple[Check, ...]:
    """What must hold before studies are sent here; asks as nobody, answers with no row."""
    spool = _spool(settings)
    try:
        with acting_as(engine, NOBODY) as session:
            return (Check("database", True, "answers"), spool, _model(session))
    except SQLAlchemyError as error:
        words = f"does not answer ({type(error).__name__})"
        unknown = Check("model", False, "not known without the database")
        return (Check("database", False, words), spool, unknown)


def read(session: Session, settings: Settings) -> Health:
    """The health page, as far as the session's viewer may see."""
    size, version = session.execute(
        select(
            func.pg_database_size(func.current_database()), func.current_setting("server_version")
        )
    ).one()
    checks = (Check("database", True, "answers"), _spool(settings), _model(session))
    return Health(
        checks=checks,
        processes=processes(session),
        queue=overview.queue(session),
        destinations=_destinations(session),
        senders=_senders(session),
        disk=disk(settings),
        database_bytes=size,
        database_version=version,
    )


def processes(session: Session) -> tuple[Process, ...]:
    now = session.scalar(select(func.now())) or dt.datetime.now(dt.UTC)
    rows = session.scalars(select(ProcessRow).order_by(ProcessRow.stage, ProcessRow.name))
    return tuple(
        Process(
            row.name,
            row.stage,
            (now - row.seen_at).total_seconds() < ALIVE_S,
            row.started_at,
            row.seen_at,
            row.detail,
        )
        for row in rows
        if now - row.seen_at < dt.timedelta(days=1)  # older ones are history
    )


def disk(settings: Settings) -> Disk:
    folder = _existing(settings.node.data_dir)
    usage = shutil.disk_usage(folder)
    free_mb = usage.free // 2**20
    is_ok = free_mb >= settings.node.min_free_mb
    return Disk(str(settings.node.data_dir), free_mb, usage.total // 2**20, is_ok)


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return folder if folder.exists() else _existing(folder.parent)


def _model(session: Session) -> Check:
    alive = [one for one in processes(session) if one.stage == "inference" and one.is_alive]
    loaded = {name for one in alive for name in _names(one.detail, "models")}
    refused = {name for one in alive for name in _names(one.detail, "refused")}
    if refused:  # the studies of whoever has it active wait
        return Check("model", False, f"cannot be loaded: {', '.join(sorted(refused))}")
    if not loaded:
        return Check("model", False, "no inference process has reported a loaded model lately")
    return Check("model", True, f"loaded: {', '.join(sorted(loaded))}")


def _names(detail: dict[str, object], key: str) -> list[str]:
    named = detail.get(key)
    return [str(name) for name in named] if isinstance(named, dict) else []


def _spool(settings: Settings) -> Check:
    spool = settings.node.data_dir / "spool"
    if not spool.is_dir():
        return Check("spool", False, "there is no spool folder: is the receiver running?")
    if not os.access(spool, os.W_OK | os.X_OK):
        return Check("spool", False, "cannot be written")
    found = disk(settings)
    words = f"{found.free_mb} MB free"
    if not found.is_ok:
        words += f", below the watermark of {settings.node.min_free_mb} MB"
    return Check("spool", found.is_ok, words)


def _destinations(session: Session) -> tuple[DestinationHealth, ...]:
    waiting = (
        select(func.count())
        .where(
            DeliveryRow.tenant == DestinationRow.tenant,
            DeliveryRow.destination == DestinationRow.name,
            DeliveryRow.state.in_(OPEN),
        )
        .correlate(DestinationRow)
        .scalar_subquery()
    )
    rows = session.execute(
        select(DestinationRow, waiting).order_by(DestinationRow.tenant, DestinationRow.name)
    )
    return tuple(
        DestinationHealth(
            row.tenant, row.name, n, row.failures, row.retry_at, row.last_success_at, row.last_error
        )
        for row, n in rows
    )


def _senders(session: Session) -> tuple[SenderHealth, ...]:
    rows = session.scalars(select(SenderRow).order_by(SenderRow.tenant, SenderRow.ae_title))
    return tuple(
        SenderHealth(row.tenant, row.ae_title, row.n_instances, row.last_seen_at) for row in rows
    )
