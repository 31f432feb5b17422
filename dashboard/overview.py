"""The overview's figures, as far as the session's viewer may see."""

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Date, Select, and_, cast, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.job import JobState
from db.outbox import OPEN, DeliveryState
from db.study import AnalysisState, StudyState
from db.tables import (
    AnalysisRow,
    DeliveryRow,
    EventRow,
    JobRow,
    QuarantineRow,
    ResultRow,
    StudyRow,
)

TREND_DAYS = 30
ALARM_DAYS = 7
MAX_ALARMS = 20

Limits = list[ColumnElement[bool]]

_CURRENT = and_(
    AnalysisRow.id == ResultRow.analysis_id,
    AnalysisRow.result_no == ResultRow.result_no,
    AnalysisRow.is_shadow.is_(False),
)


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of one tenant, or of all that the viewer sees."""

    n_studies: int
    n_today: int
    n_results: int  # the newest of each analysis
    n_positive: int
    n_not_analysed: int
    n_failed: int
    n_held: int
    n_quarantined: int
    mean_confidence: float | None  # mean of max(p, 1 - p) of the primary label

    @property
    def positivity(self) -> float | None:
        return self.n_positive / self.n_results if self.n_results else None


@dataclass(frozen=True, slots=True)
class Turnaround:
    """Seconds from the last slice to the last object in the PACS, over TREND_DAYS."""

    n: int
    p50_s: float | None
    p95_s: float | None


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits: analysis and building as jobs, sending as deliveries."""

    n_jobs: int
    oldest_job_s: float | None
    n_deliveries: int
    oldest_delivery_s: float | None


@dataclass(frozen=True, slots=True)
class Day:
    day: dt.date
    n_received: int
    n_positive: int
    n_negative: int


@dataclass(frozen=True, slots=True)
class TenantLine:
    tenant: str
    totals: Totals
    turnaround: Turnaround
    last_received_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class Alarm:
    at: dt.datetime
    tenant: str
    kind: str
    study_id: uuid.UUID | None  # public
    reason: str


@dataclass(frozen=True, slots=True)
class Overview:
    totals: Totals
    turnaround: Turnaround
    queue: Queue
    days: tuple[Day, ...]
    tenants: tuple[TenantLine, ...]  # for those who see more than one
    alarms: tuple[Alarm, ...]


def read(session: Session, *, by_tenant: bool) -> Overview:
    tenants = session.scalars(select(StudyRow.tenant).distinct()).all() if by_tenant else []
    return Overview(
        totals=_totals(session),
        turnaround=turnaround(session),
        queue=queue(session),
        days=_days(session),
        tenants=tuple(_tenant_line(session, tenant) for tenant in sorted(tenants)),
        alarms=alarms(session),
    )


def _tenant_line(session: Session, tenant: str) -> TenantLine:
    return TenantLine(
        tenant,
        _totals(session, tenant),
        turnaround(session, tenant),
        session.scalar(
            select(func.max(StudyRow.last_instance_at)).where(StudyRow.tenant == tenant)
        ),
    )


def _of(table: type[StudyRow | AnalysisRow | ResultRow | QuarantineRow], tenant: str) -> Limits:
    return [table.tenant == tenant] if tenant else []


def _totals(session: Session, tenant: str = "") -> Totals:
    n_studies, n_today, n_held = session.execute(
        select(
            func.count(),
            func.count().filter(StudyRow.created_at >= _midnight()),
            func.count().filter(StudyRow.state == StudyState.HELD),
        ).where(*_of(StudyRow, tenant))
    ).one()
    is_refused = and_(AnalysisRow.state == AnalysisState.NOT_ANALYSED, AnalysisRow.is_applicable)
    n_not_analysed, n_failed = session.execute(
        select(
            func.count().filter(is_refused),
            func.count().filter(AnalysisRow.state == AnalysisState.FAILED),
        ).where(AnalysisRow.is_shadow.is_(False), *_of(AnalysisRow, tenant))
    ).one()
    confidence = func.greatest(ResultRow.probability, 1 - ResultRow.probability)
    n_results, n_positive, mean = session.execute(
        select(func.count(), func.count().filter(ResultRow.is_positive), func.avg(confidence))
        .join(AnalysisRow, _CURRENT)
        .where(*_of(ResultRow, tenant))
    ).one()
    n_quarantined = session.scalar(
        select(func.count()).where(QuarantineRow.state == "OPEN", *_of(QuarantineRow, tenant))
    )
    return Totals(
        n_studies=n_studies,
        n_today=n_today,
        n_results=n_results,
        n_positive=n_positive,
        n_not_analysed=n_not_analysed,
        n_failed=n_failed,
        n_held=n_held,
        n_quarantined=n_quarantined or 0,
        mean_confidence=mean,
    )


def turnaround(session: Session, tenant: str = "") -> Turnaround:
    last = func.max(DeliveryRow.finished_at)
    done = (
        select(StudyRow.last_instance_at.label("received"), last.label("delivered"))
        .join(ResultRow, ResultRow.id == DeliveryRow.result_id)
        .join(StudyRow, StudyRow.id == DeliveryRow.study_id)
        .where(
            DeliveryRow.state == DeliveryState.DELIVERED,
            DeliveryRow.finished_at > func.now() - dt.timedelta(days=TREND_DAYS),
            # What an operator sends again long afterwards says nothing of the node's speed.
            DeliveryRow.created_at < ResultRow.at + dt.timedelta(hours=1),
            *_of(StudyRow, tenant),
        )
        .group_by(ResultRow.id, StudyRow.id)
        .having(last > StudyRow.last_instance_at)
        .subquery()
    )
    seconds = func.extract("epoch", done.c.delivered - done.c.received)
    n, p50, p95 = session.execute(
        select(
            func.count(),
            func.percentile_cont(0.5).within_group(seconds),
            func.percentile_cont(0.95).within_group(seconds),
        ).select_from(done)
    ).one()
    return Turnaround(n, _seconds(p50), _seconds(p95))


def queue(session: Session) -> Queue:
    """What waits or runs now."""
    n_jobs, oldest_job = session.execute(
        select(func.count(), func.extract("epoch", func.now() - func.min(JobRow.created_at))).where(
            JobRow.state.in_([JobState.TODO, JobState.DOING])
        )
    ).one()
    n_sends, oldest_send = session.execute(
        select(
            func.count(), func.extract("epoch", func.now() - func.min(DeliveryRow.created_at))
        ).where(DeliveryRow.state.in_(OPEN))
    ).one()
    return Queue(n_jobs, _seconds(oldest_job), n_sends, _seconds(oldest_send))


def _days(session: Session) -> tuple[Day, ...]:
    """The last TREND_DAYS days of this machine's calendar, those without studies included."""
    today = _midnight()
    first = today - dt.timedelta(days=TREND_DAYS - 1)
    received = _per_day(session, StudyRow.created_at, first, select(func.count()))
    results = select(
        func.count().filter(ResultRow.is_positive), func.count().filter(~ResultRow.is_positive)
    ).join_from(ResultRow, AnalysisRow, _CURRENT)
    judged = _per_day(session, ResultRow.at, first, results)
    days = [(first + dt.timedelta(days=n)).date() for n in range(TREND_DAYS)]
    return tuple(Day(day, received.get(day, (0,))[0], *judged.get(day, (0, 0))[:2]) for day in days)


def _per_day(
    session: Session,
    at: InstrumentedAttribute[dt.datetime],
    first: dt.datetime,
    counts: Select[*tuple[Any, ...]],
) -> dict[dt.date, tuple[int, ...]]:
    # The offset of now stands for the whole month: a day's edge is off by an hour around DST.
    offset = first.utcoffset() or dt.timedelta(0)
    day = cast(func.timezone("UTC", at) + offset, Date)
    rows = session.execute(counts.add_columns(day.label("day")).where(at >= first).group_by(day))
    return {row[-1]: tuple(row[:-1]) for row in rows}


def alarms(session: Session) -> tuple[Alarm, ...]:
    """The newest alarms of the last ALARM_DAYS days."""
    rows = session.execute(
        select(EventRow, StudyRow.public_id)
        .outerjoin(StudyRow, StudyRow.id == EventRow.study_id)
        .where(EventRow.is_alarm, EventRow.at > func.now() - dt.timedelta(days=ALARM_DAYS))
        .order_by(EventRow.id.desc())
        .limit(MAX_ALARMS)
    )
    return tuple(
        Alarm(
            event.at,
            event.tenant,
            event.kind,
            study_id,
            str(event.detail.get("reason_code") or event.detail.get("reason") or ""),
        )
        for event, study_id in rows
    )


def _midnight() -> dt.datetime:
    return dt.datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)


def _seconds(value: object) -> float | None:
    """PostgreSQL's numeric as a float."""
    return None if value is None else float(str(value))
