"""One study as its page shows it: images, numbers, timeline, deliveries."""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from dashboard.outcomes import Line, Outcome, line_of, of_study
from db.commitment import COMMITMENT_WORDS
from db.result import Finding
from db.study import TRANSITIONS, AnalysisEvent, AnalysisState
from db.tables import (
    AnalysisRow,
    CommitmentRow,
    DeliveryRow,
    EventRow,
    NoticeRow,
    RequestRow,
    ResultRow,
    StudyRow,
    WithdrawalRow,
)

MAX_EVENTS = 500


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no result: the rule that refused, what it found, its limit."""

    rule: str
    value: str
    limit: str
    reason: str


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    at: dt.datetime
    kind: str
    detail: dict[str, Any]
    is_alarm: bool


@dataclass(frozen=True, slots=True)
class DeliveryLine:
    destination: str
    result_no: int
    state: str
    attempts: int
    run_after: dt.datetime
    expires_at: dt.datetime
    finished_at: dt.datetime | None
    error_code: str
    what: str  # where it is no result: what it is, in words
    commitment: str  # whether the destination vouches for it, in words; empty: never asked


@dataclass(frozen=True, slots=True)
class Analysis:
    """One bundle's view of the study; `finding` is its newest result, whatever came after."""

    id: int
    bundle: str
    outcome: Outcome
    state: AnalysisState
    result_no: int
    result_id: uuid.UUID | None
    finding: Finding | None
    refusal: Refusal | None
    updated_at: dt.datetime

    @property
    def is_current(self) -> bool:
        """Whether the newest result is still the word on this study."""
        return self.finding is not None and self.outcome.kind in ("positive", "negative")

    def may(self, action: AnalysisEvent) -> bool:
        return (self.state, action) in TRANSITIONS


@dataclass(frozen=True, slots=True)
class StudyView:
    line: Line
    birth_date: str
    sex: str
    study_time: str
    is_held: bool
    first_received_at: dt.datetime
    analyses: tuple[Analysis, ...]
    timeline: tuple[TimelineEntry, ...]
    deliveries: tuple[DeliveryLine, ...]
    open_requests: tuple[str, ...]

    def chosen(self, bundle: str) -> Analysis | None:
        """The analysis asked for, or the first that has something to say."""
        named = [a for a in self.analyses if a.bundle == bundle]
        telling = [a for a in self.analyses if a.finding] or [
            a for a in self.analyses if a.outcome.kind != "not_applicable"
        ]
        return next(iter([*named, *telling, *self.analyses]), None)


def find(session: Session, public_id: uuid.UUID) -> StudyRow | None:
    """The study, if the session's viewer may see it: not yours and not there are the same."""
    return session.scalar(select(StudyRow).where(StudyRow.public_id == public_id))


def read(session: Session, study: StudyRow) -> StudyView:
    outcomes = of_study(session, study.id)
    return StudyView(
        line=line_of(study, outcomes),
        birth_date=study.patient_birth_date,
        sex=study.patient_sex,
        study_time=study.study_time,
        is_held=study.is_held,
        first_received_at=study.created_at,
        analyses=_analyses(session, study, outcomes),
        timeline=_timeline(session, study),
        deliveries=_deliveries(session, study),
        open_requests=_open_requests(session, study),
    )


def _analyses(
    session: Session, study: StudyRow, outcomes: Sequence[Outcome]
) -> tuple[Analysis, ...]:
    rows = session.execute(
        select(AnalysisRow, ResultRow)
        .outerjoin(
            ResultRow,
            (ResultRow.analysis_id == AnalysisRow.id)
            & (ResultRow.result_no == AnalysisRow.result_no),
        )
        .where(AnalysisRow.study_id == study.id, AnalysisRow.is_shadow.is_(False))
        .order_by(AnalysisRow.id)
    ).all()
    by_bundle = {outcome.bundle: outcome for outcome in outcomes}
    return tuple(
        Analysis(
            id=row.id,
            bundle=row.bundle,
            outcome=by_bundle[row.bundle],
            state=AnalysisState(row.state),
            result_no=row.result_no,
            result_id=result.id if result else None,
            finding=Finding.from_json(result.finding) if result else None,
            refusal=_refusal(session, row),
            updated_at=row.updated_at,
        )
        for row, result in rows
    )


def _refusal(session: Session, analysis: AnalysisRow) -> Refusal | None:
    if analysis.state not in (AnalysisState.NOT_ANALYSED, AnalysisState.FAILED):
        return None
    # The rule's value and limit stand in the event of the move, beside the reason in the row.
    detail = session.scalar(
        select(EventRow.detail)
        .where(
            EventRow.analysis_id == analysis.id,
            EventRow.kind.in_([AnalysisEvent.NOT_ELIGIBLE.lower(), AnalysisEvent.GAVE_UP.lower()]),
        )
        .order_by(EventRow.id.desc())
        .limit(1)
    )
    found = detail or {}
    return Refusal(
        rule=str(found.get("rule") or analysis.reason_code),
        value=str(found.get("value", "")),
        limit=str(found.get("limit", "")),
        reason=analysis.reason,
    )


def _timeline(session: Session, study: StudyRow) -> tuple[TimelineEntry, ...]:
    rows = session.scalars(
        select(EventRow)
        .outerjoin(AnalysisRow, AnalysisRow.id == EventRow.analysis_id)
        # A shadow's run is nobody's result.
        .where(EventRow.study_id == study.id, AnalysisRow.is_shadow.is_not(True))
        .order_by(EventRow.id.desc())
        .limit(MAX_EVENTS)
    )
    return tuple(TimelineEntry(row.at, row.kind, row.detail, row.is_alarm) for row in rows)


def _deliveries(session: Session, study: StudyRow) -> tuple[DeliveryLine, ...]:
    number = func.coalesce(ResultRow.result_no, NoticeRow.result_no, WithdrawalRow.result_no)
    what = case(
        (NoticeRow.id.is_not(None), "notice: not processed"),
        (WithdrawalRow.id.is_not(None), "rejection note"),
        else_="",
    )
    newest = (
        select(CommitmentRow.state)
        .where(CommitmentRow.delivery_id == DeliveryRow.id)
        .order_by(CommitmentRow.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    rows = session.execute(
        select(DeliveryRow, number, what, newest)
        .outerjoin(ResultRow, ResultRow.id == DeliveryRow.result_id)
        .outerjoin(NoticeRow, NoticeRow.id == DeliveryRow.result_id)
        .outerjoin(WithdrawalRow, WithdrawalRow.id == DeliveryRow.result_id)
        .where(DeliveryRow.study_id == study.id, number.is_not(None))
        .order_by(number.desc(), DeliveryRow.destination)
    )
    return tuple(
        DeliveryLine(
            row.destination,
            result_no,
            row.state,
            row.attempts,
            row.run_after,
            row.expires_at,
            row.finished_at,
            row.error_code,
            what,
            COMMITMENT_WORDS.get(commitment or "", ""),
        )
        for row, result_no, what, commitment in rows
    )


def _open_requests(session: Session, study: StudyRow) -> tuple[str, ...]:
    return tuple(
        session.scalars(
            select(RequestRow.action)
            .join(AnalysisRow, AnalysisRow.id == RequestRow.analysis_id)
            .where(AnalysisRow.study_id == study.id, RequestRow.done_at.is_(None))
            .distinct()
        )
    )
