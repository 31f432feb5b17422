"""The overview's figures, as far as the session's viewer may see."""

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Date, Select, cast, func, select, union_all
from sqlalchemy.orm import InstrumentedAttribute, Session

from dashboard import figures
from dashboard.figures import CURRENT, TREND_DAYS, Totals, Turnaround, midnight, seconds
from db import notices
from db import queue as jobs
from db.job import JobState
from db.outbox import OPEN
from db.tables import AnalysisRow, DeliveryRow, EventRow, JobRow, ResultRow, StudyRow

ALARM_DAYS = 7
MAX_ALARMS = 20
_OPEN_JOBS = (JobState.TODO, JobState.DOING)
NONE_YET = Turnaround(0, None, None)


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
    tenants = figures.of_tenants(session)
    turnarounds = figures.turnarounds(session)
    lines = tuple(
        TenantLine(tenant, one.totals, turnarounds.get(tenant, NONE_YET), one.last_received_at)
        for tenant, one in sorted(tenants.items())
    )
    return Overview(
        totals=figures.sum_of(one.totals for one in tenants.values()),
        turnaround=turnarounds[figures.ALL],
        queue=queue(session),
        days=_days(session),
        tenants=lines if by_tenant else (),
        alarms=alarms(session),
    )


def queue(session: Session) -> Queue:
    """What waits or runs now."""
    # One by one: each state has its own small index, and jobs that are done are many.
    open_jobs = union_all(
        *(
            select(notices.due_since().label("since")).where(
                JobRow.state == one, ~notices.is_put_off(), ~jobs.is_held()
            )
            for one in _OPEN_JOBS
        )
    ).subquery()
    n_jobs, oldest_job = session.execute(
        select(func.count(), func.extract("epoch", func.now() - func.min(open_jobs.c.since)))
    ).one()
    n_sends, oldest_send = session.execute(
        select(
            func.count(), func.extract("epoch", func.now() - func.min(DeliveryRow.created_at))
        ).where(DeliveryRow.state.in_(OPEN))
    ).one()
    return Queue(n_jobs, seconds(oldest_job), n_sends, seconds(oldest_send))


def _days(session: Session) -> tuple[Day, ...]:
    """The last TREND_DAYS days of this machine's calendar, those without studies included."""
    today = midnight()
    first = today - dt.timedelta(days=TREND_DAYS - 1)
    received = _per_day(session, StudyRow.created_at, first, select(func.count()))
    results = select(
        func.count().filter(ResultRow.is_positive), func.count().filter(~ResultRow.is_positive)
    ).join_from(ResultRow, AnalysisRow, CURRENT)
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
