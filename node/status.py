"""`vigil status`: how the node is, in numbers an operator asks for."""

import datetime as dt
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from config.settings import Settings
from db import notices, queue
from db.heartbeat import GONE_S
from db.job import JobState, Lane
from db.outbox import OPEN
from db.study import AnalysisState
from db.tables import (
    AnalysisRow,
    DeliveryRow,
    DestinationRow,
    EventRow,
    JobRow,
    ProcessRow,
    QuarantineRow,
    ResultRow,
    ReturnedRow,
    SenderRow,
    StudyRow,
)

ALARMS_SINCE = dt.timedelta(hours=24)
#: So long after its end a process is still worth a line; then only its absence says anything.
RECENTLY = dt.timedelta(minutes=5)
#: Without them a study stops on its way; what each does, in words.
STAGES = {"scp": "takes studies in", "inference": "judges them", "deliver": "sends results"}


def status(session: Session, settings: Settings) -> dict[str, Any]:
    """One JSON document; ages in seconds, by the database's clock."""
    return {
        "tenants": _tenants(session, settings),
        "queue": _queue(session),
        "deliveries": _deliveries(session),
        "quarantine_open": session.scalar(
            select(func.count()).where(QuarantineRow.state == "OPEN").select_from(QuarantineRow)
        ),
        "own_objects_returned": session.scalar(select(func.coalesce(func.sum(ReturnedRow.n), 0))),
        "alarms_24h": _alarms(session),
        "senders": _senders(session),
        "processes": (processes := _processes(session)),
        "stages_missing": sorted(
            STAGES.keys() - {one["stage"] for one in processes if one["is_alive"]}
        ),
        "disk": _disk(settings.node.data_dir, settings.node.min_free_mb),
        "spooled_files": _spooled(settings.node.data_dir),
    }


def show(value: dict[str, Any], console: Console) -> None:
    """The same, for a terminal."""
    table = Table("tenant", "studies", "analyses", "results", "positive", title="Studies")
    for name, tenant in value["tenants"].items():
        table.add_row(
            name,
            _counts(tenant["studies"]),
            _counts(tenant["analyses"]),
            str(tenant["results"]),
            str(tenant["positive"]),
        )
    console.print(table)
    jobs = value["queue"]
    console.print(
        f"Queue        {jobs['waiting']} waiting, {jobs['running']} running, "
        f"oldest {_age(jobs['oldest_s'])}"
        + (f"; {jobs['held']} held until a person decides" if jobs["held"] else "")
    )
    for delivery in value["deliveries"]:
        words = f"{delivery['waiting']} waiting, oldest {_age(delivery['oldest_s'])}"
        trouble = ""
        if delivery["failures"]:
            again = _age(delivery["retry_s"])
            trouble = f"  [red]{delivery['last_error']}[/], asked again within {again}"
        elif delivery["errors"]:
            again = _age(delivery["next_s"])
            codes = ", ".join(delivery["errors"])
            trouble = f"  [red]{codes}[/], next try within {again}, `vigil resend` at once"
        console.print(
            f"Deliveries   {delivery['tenant']}/{delivery['destination']}: {words}{trouble}"
        )
    for sender in value["senders"]:
        console.print(
            f"Sender       {sender['tenant']}/{sender['ae_title']}: "
            f"{sender['instances']} instances, last {_age(sender['last_s'])} ago"
        )
    for process in value["processes"]:
        gone = "" if process["is_alive"] else "  [red]gone[/]"
        console.print(f"Process      {process['name']}: seen {_age(process['seen_s'])} ago{gone}")
    for stage in value["stages_missing"]:
        console.print(f"Process      [red]none of `{stage}` runs: nothing {STAGES[stage]}[/]")
    disk = value["disk"]
    colour = "red" if disk["is_low"] else "default"
    low = ", below `node.min_free_mb`: nothing is taken in (0xA700)" if disk["is_low"] else ""
    console.print(
        f"Disk         [{colour}]{disk['free_mb']:,} MB free of {disk['total_mb']:,} MB{low}[/]"
    )
    console.print(f"Spool        {value['spooled_files']} files waiting for intake")
    console.print(f"Quarantine   {value['quarantine_open']} open")
    if value["own_objects_returned"]:
        console.print(f"Returned     {value['own_objects_returned']} of our own objects came back")
    for alarm in value["alarms_24h"]:
        console.print(
            f"[red]Alarm[/]        {alarm['kind']}: {alarm['n']} in 24 h ({alarm['tenant']})"
        )


def _tenants(session: Session, settings: Settings) -> dict[str, Any]:
    # A tenant that has left the configuration still has studies.
    names = dict.fromkeys(tenant.id for tenant in settings.tenants)
    names.update(dict.fromkeys(session.scalars(select(StudyRow.tenant).distinct())))
    found: dict[str, Any] = {
        name: {"studies": {}, "analyses": {}, "results": 0, "positive": 0} for name in names
    }
    # What a shadow bundle says is compared with results, never counted as one.
    serves = AnalysisRow.is_shadow.is_(False)
    studies = select(StudyRow.tenant, StudyRow.state, func.count())
    analyses = select(AnalysisRow.tenant, AnalysisRow.state, func.count()).where(serves)
    for what, counted in (
        ("studies", studies.group_by(StudyRow.tenant, StudyRow.state)),
        ("analyses", analyses.group_by(AnalysisRow.tenant, AnalysisRow.state)),
    ):
        for tenant, state, n in session.execute(counted):
            found[tenant][what][state] = n
    results = (
        select(ResultRow.tenant, func.count(), func.count().filter(ResultRow.is_positive))
        .join(AnalysisRow, AnalysisRow.id == ResultRow.analysis_id)
        .where(serves, AnalysisRow.state != AnalysisState.WITHDRAWN)
        .group_by(ResultRow.tenant)
    )
    for tenant, n, positive in session.execute(results):
        found[tenant]["results"], found[tenant]["positive"] = n, positive
    return found


def _queue(session: Session) -> dict[str, Any]:
    is_open, is_held = JobRow.state.in_((JobState.TODO, JobState.DOING)), queue.is_held()
    rows = session.execute(
        select(
            JobRow.state,
            JobRow.lane,
            func.count(),
            func.max(func.extract("epoch", func.now() - notices.due_since())),
        )
        .where(is_open, ~notices.is_put_off(), ~is_held)
        .group_by(JobRow.state, JobRow.lane)
    ).all()
    held = session.scalar(select(func.count()).select_from(JobRow).where(is_open, is_held))
    lanes: dict[str, int] = {}
    for state, lane, n, _ in rows:
        if state == JobState.TODO:
            lanes[Lane(lane).name.lower()] = lanes.get(Lane(lane).name.lower(), 0) + n
    return {
        "waiting": sum(lanes.values()),
        "running": sum(n for state, _, n, _ in rows if state == JobState.DOING),
        "waiting_by_lane": lanes,
        "held": held,
        "oldest_s": max((_seconds(age) or 0.0 for _, _, _, age in rows), default=None),
    }


def _deliveries(session: Session) -> list[dict[str, Any]]:
    rows = session.execute(
        select(
            DestinationRow.tenant,
            DestinationRow.name,
            DestinationRow.failures,
            DestinationRow.last_error,
            func.extract("epoch", func.greatest(DestinationRow.retry_at, func.now()) - func.now()),
            func.count(DeliveryRow.id),
            func.max(func.extract("epoch", func.now() - DeliveryRow.created_at)),
            func.array_agg(DeliveryRow.error_code.distinct()).filter(DeliveryRow.error_code != ""),
            func.extract(
                "epoch", func.greatest(func.min(DeliveryRow.run_after), func.now()) - func.now()
            ),
        )
        .outerjoin(
            DeliveryRow,
            (DeliveryRow.tenant == DestinationRow.tenant)
            & (DeliveryRow.destination == DestinationRow.name)
            & DeliveryRow.state.in_(OPEN),
        )
        .group_by(DestinationRow.tenant, DestinationRow.name)
        .order_by(DestinationRow.tenant, DestinationRow.name)
    )
    return [
        {
            "tenant": tenant,
            "destination": name,
            "waiting": n,
            "oldest_s": _seconds(age),
            "failures": failures,
            "last_error": error,
            "retry_s": _seconds(retry),
            "errors": sorted(errors or ()),
            "next_s": _seconds(next_s),
        }
        for tenant, name, failures, error, retry, n, age, errors, next_s in rows
    ]


def _alarms(session: Session) -> list[dict[str, Any]]:
    rows = session.execute(
        select(EventRow.kind, EventRow.tenant, func.count())
        .where(EventRow.is_alarm, EventRow.at > func.now() - ALARMS_SINCE)
        .group_by(EventRow.kind, EventRow.tenant)
        .order_by(EventRow.tenant, EventRow.kind)
    )
    return [{"kind": kind, "tenant": tenant, "n": n} for kind, tenant, n in rows]


def _senders(session: Session) -> list[dict[str, Any]]:
    age = func.extract("epoch", func.now() - SenderRow.last_seen_at)
    rows = session.execute(
        select(SenderRow.tenant, SenderRow.ae_title, SenderRow.n_instances, age).order_by(
            SenderRow.tenant, SenderRow.ae_title
        )
    )
    return [
        {"tenant": tenant, "ae_title": title, "instances": n, "last_s": _seconds(last)}
        for tenant, title, n, last in rows
    ]


def _processes(session: Session) -> list[dict[str, Any]]:
    """Those that live, and those that died a moment ago: they could not sign off."""
    age = func.extract("epoch", func.now() - ProcessRow.seen_at)
    rows = session.execute(
        select(ProcessRow.name, ProcessRow.stage, age)
        .where(ProcessRow.seen_at > func.now() - RECENTLY)
        .order_by(ProcessRow.name)
    )
    return [
        {"name": name, "stage": stage, "is_alive": float(seen) < GONE_S, "seen_s": _seconds(seen)}
        for name, stage, seen in rows
    ]


def _disk(data_dir: Path, min_free_mb: int) -> dict[str, Any]:
    usage = shutil.disk_usage(data_dir if data_dir.exists() else data_dir.resolve().parent)
    free_mb = usage.free // 2**20
    return {
        "free_mb": free_mb,
        "total_mb": usage.total // 2**20,
        "is_low": free_mb < min_free_mb,
    }


def _spooled(data_dir: Path) -> int:
    """Files received but not yet in the database."""
    return sum(1 for _ in (data_dir / "spool").glob("*/*/*.dcm"))


def _seconds(value: Any) -> float | None:
    return None if value is None else round(float(value), 1)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{n} {state.lower()}" for state, n in sorted(states.items())) or "none"
