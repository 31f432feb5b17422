"""Counts and times of each tenant, in one pass over each table, as far as the viewer may see."""

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from db.outbox import DeliveryState
from db.study import AnalysisState, StudyState
from db.tables import AnalysisRow, DeliveryRow, QuarantineRow, ResultRow, StudyRow

TREND_DAYS = 30
#: The key of what holds for all tenants together; no tenant has it.
ALL = ""

CURRENT = and_(
    AnalysisRow.id == ResultRow.analysis_id,
    AnalysisRow.result_no == ResultRow.result_no,
    AnalysisRow.is_shadow.is_(False),
)


@dataclass(frozen=True, slots=True)
class Mean:
    """Of the `n` results that have a probability; None without any."""

    value: float | None
    n: int


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
    # A mean over both would mean nothing: the primary label's probability, 0..1, apart by outcome.
    confidence_positive: Mean
    confidence_negative: Mean

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
class Tenant:
    totals: Totals
    last_received_at: dt.datetime | None


def of_tenants(session: Session) -> dict[str, Tenant]:
    """Of each tenant that has a study, or something in the quarantine."""
    received = _received(session)
    outcomes = _outcomes(session)
    ends = _ends(session)
    quarantined = _quarantined(session)
    found = {}
    for tenant in {*received, *quarantined}:
        n_studies, n_today, n_held, last = received.get(tenant, (0, 0, 0, None))
        n_positive, of_positive = outcomes.get((tenant, True), _NONE)
        n_negative, of_negative = outcomes.get((tenant, False), _NONE)
        n_not_analysed, n_failed = ends.get(tenant, (0, 0))
        totals = Totals(
            n_studies=n_studies,
            n_today=n_today,
            n_results=n_positive + n_negative,
            n_positive=n_positive,
            n_not_analysed=n_not_analysed,
            n_failed=n_failed,
            n_held=n_held,
            n_quarantined=quarantined.get(tenant, 0),
            confidence_positive=of_positive,
            confidence_negative=of_negative,
        )
        found[tenant] = Tenant(totals, last)
    return found


def _received(session: Session) -> Mapping[str, tuple[int, int, int, dt.datetime | None]]:
    """Studies, those of today, those held, and when the last image came."""
    rows = session.execute(
        select(
            StudyRow.tenant,
            func.count(),
            func.count().filter(StudyRow.created_at >= midnight()),
            func.count().filter(StudyRow.state == StudyState.HELD),
            func.max(StudyRow.last_instance_at),
        ).group_by(StudyRow.tenant)
    )
    return {row[0]: (row[1], row[2], row[3], row[4]) for row in rows}


_NONE = (0, Mean(None, 0))


def _outcomes(session: Session) -> Mapping[tuple[str, bool], tuple[int, Mean]]:
    """How many current results each tenant has of each outcome, and their mean probability."""
    rows = session.execute(
        select(
            ResultRow.tenant,
            ResultRow.is_positive,
            func.count(),
            func.count(ResultRow.probability),
            func.avg(ResultRow.probability),
        )
        .join(AnalysisRow, CURRENT)
        .group_by(ResultRow.tenant, ResultRow.is_positive)
    )
    return {(row[0], row[1]): (row[2], Mean(row[4], row[3])) for row in rows}


def _ends(session: Session) -> Mapping[str, tuple[int, int]]:
    """How many analyses of each tenant could not be made, and how many failed."""
    is_refused = and_(AnalysisRow.state == AnalysisState.NOT_ANALYSED, AnalysisRow.is_applicable)
    is_failed = AnalysisRow.state == AnalysisState.FAILED
    rows = session.execute(
        select(AnalysisRow.tenant, func.count().filter(is_refused), func.count().filter(is_failed))
        .where(AnalysisRow.is_shadow.is_(False), is_refused | is_failed)
        .group_by(AnalysisRow.tenant)
    )
    return {row[0]: (row[1], row[2]) for row in rows}


def _quarantined(session: Session) -> Mapping[str, int]:
    rows = session.execute(
        select(QuarantineRow.tenant, func.count())
        .where(QuarantineRow.state == "OPEN")
        .group_by(QuarantineRow.tenant)
    )
    return {row[0]: row[1] for row in rows}


def sum_of(parts: Iterable[Totals]) -> Totals:
    """Of all tenants together."""
    every = list(parts)

    def count(name: str) -> int:
        return sum(getattr(one, name) for one in every)

    return Totals(
        n_studies=count("n_studies"),
        n_today=count("n_today"),
        n_results=count("n_results"),
        n_positive=count("n_positive"),
        n_not_analysed=count("n_not_analysed"),
        n_failed=count("n_failed"),
        n_held=count("n_held"),
        n_quarantined=count("n_quarantined"),
        confidence_positive=_mean_of([one.confidence_positive for one in every]),
        confidence_negative=_mean_of([one.confidence_negative for one in every]),
    )


def _mean_of(means: Iterable[Mean]) -> Mean:
    known = [(one.value, one.n) for one in means if one.value is not None]
    n = sum(weight for _, weight in known)
    return Mean(sum(value * weight for value, weight in known) / n if n else None, n)


def turnarounds(session: Session) -> dict[str, Turnaround]:
    """Of each tenant with a delivery, and of all together under ALL."""
    last = func.max(DeliveryRow.finished_at)
    done = (
        select(
            StudyRow.tenant,
            StudyRow.last_instance_at.label("received"),
            last.label("delivered"),
        )
        .join(ResultRow, ResultRow.id == DeliveryRow.result_id)
        .join(StudyRow, StudyRow.id == DeliveryRow.study_id)
        .where(
            DeliveryRow.state == DeliveryState.DELIVERED,
            DeliveryRow.finished_at > func.now() - dt.timedelta(days=TREND_DAYS),
            # What an operator sends again long afterwards says nothing of the node's speed.
            DeliveryRow.created_at < ResultRow.at + dt.timedelta(hours=1),
        )
        .group_by(ResultRow.id, StudyRow.id)
        .having(last > StudyRow.last_instance_at)
        .subquery()
    )
    taken_s = func.extract("epoch", done.c.delivered - done.c.received)
    rows = session.execute(
        select(
            done.c.tenant,
            func.count(),
            func.percentile_cont(0.5).within_group(taken_s),
            func.percentile_cont(0.95).within_group(taken_s),
        ).group_by(func.rollup(done.c.tenant))
    )
    return {
        ALL if tenant is None else tenant: Turnaround(n, seconds(p50), seconds(p95))
        for tenant, n, p50, p95 in rows
    }


def midnight() -> dt.datetime:
    """The last one, of this machine's calendar."""
    return dt.datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)


def seconds(value: object) -> float | None:
    """PostgreSQL's numeric as a float."""
    return None if value is None else float(str(value))
