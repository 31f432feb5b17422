"""The worklist: studies by urgency and age, each with what the AI says of it."""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import ColumnElement, Select, case, exists, func, or_, select
from sqlalchemy.orm import Session

from dashboard import words
from db.result import CalibratedProbability, percent
from db.study import AnalysisState, StudyState
from db.tables import AnalysisRow, DeliveryRow, ResultRow, StudyRow

PAGE_SIZE = 50
OutcomeKind = Literal["positive", "negative", "pending", "not_analysed", "not_applicable", "failed"]
Period = Literal["day", "week", "month", "all"]
PERIODS: Mapping[str, dt.timedelta | None] = {
    "day": dt.timedelta(days=1),
    "week": dt.timedelta(days=7),
    "month": dt.timedelta(days=30),
    "all": None,
}


class Filters(BaseModel):
    """What the page's filters ask for; empty means everything."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: StudyState | None = None
    outcome: OutcomeKind | None = None
    tenant: str = Field(default="", max_length=32)
    period: Period = "day"
    page: int = Field(default=1, ge=1, le=10_000)

    @field_validator("state", "outcome", mode="before")
    @classmethod
    def _empty_is_any(cls, value: object) -> object:
        return value or None

    @field_validator("tenant", "q", check_fields=False)
    @classmethod
    def _printable(cls, value: str) -> str:
        # PostgreSQL's text holds no NUL; nobody searches for the other invisible ones.
        return "".join(char for char in value if char.isprintable()).strip()


class Query(Filters):
    """With a search for a patient, which never travels in an address."""

    q: str = Field(default="", max_length=64)  # accession number, patient ID or name


@dataclass(frozen=True, slots=True)
class Sent:
    destination: str
    state: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one bundle says of a study."""

    bundle: str
    kind: OutcomeKind
    words: str
    state: str
    probability: str = ""  # "87 %"; empty where there is none to show
    label: str = ""  # the primary label in words
    urgency: str = ""
    is_partial: bool = False
    result_no: int = 0
    reason: str = ""
    sent: tuple[Sent, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """A study on the worklist."""

    id: uuid.UUID  # public
    tenant: str
    is_upload: bool
    patient_name: str
    patient_id: str
    accession_number: str
    study_description: str
    study_date: str
    sender: str
    state: str
    lane: int
    n_instances: int
    received_at: dt.datetime
    urgency: str
    outcomes: tuple[Outcome, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Page:
    lines: tuple[Line, ...]
    page: int
    has_more: bool


_RANK = case((ResultRow.urgency == "STAT", 0), (ResultRow.urgency == "URGENT", 1), else_=2)
_SERVES = (AnalysisRow.study_id == StudyRow.id, AnalysisRow.is_shadow.is_(False))
_CURRENT = (
    ResultRow.analysis_id == AnalysisRow.id,
    ResultRow.result_no == AnalysisRow.result_no,
)
#: States in which the newest result is the word on the study; before and beside them it is not.
_TELLS = (
    AnalysisState.FOUND,
    AnalysisState.BUILT,
    AnalysisState.DELIVERED,
    AnalysisState.DELIVERED_IN_PART,
)
# The first label is the primary one; a finding may hold thousands of scores, which stay there.
_PRIMARY = ResultRow.finding["labels"][0]


def find(session: Session, query: Query) -> Page:
    """One page of the worklist, as far as the session's viewer may see."""
    rows = session.scalars(_page_query(query)).all()
    shown = rows[:PAGE_SIZE]
    outcomes = _outcomes(session, [row.id for row in shown])
    lines = tuple(line_of(row, outcomes.get(row.id, ())) for row in shown)
    return Page(lines, query.page, has_more=len(rows) > PAGE_SIZE)


def outcomes_of(session: Session, study_id: int) -> tuple[Outcome, ...]:
    return _outcomes(session, [study_id]).get(study_id, ())


def _page_query(query: Query) -> Select[StudyRow]:
    rank = (
        select(func.min(_RANK))
        .select_from(AnalysisRow)
        .join(ResultRow, ResultRow.analysis_id == AnalysisRow.id)
        .where(*_SERVES, *_CURRENT)
        .correlate(StudyRow)
        .scalar_subquery()
    )
    return (
        select(StudyRow)
        .where(*_conditions(query))
        .order_by(func.coalesce(rank, 2), StudyRow.last_instance_at.desc(), StudyRow.id.desc())
        .limit(PAGE_SIZE + 1)
        .offset((query.page - 1) * PAGE_SIZE)
    )


def _conditions(query: Query) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    period = PERIODS[query.period]
    if query.q:
        found.append(_matches(query.q))  # a search looks at everything: "where is my study?"
    elif period is not None:
        found.append(StudyRow.last_instance_at > func.now() - period)
    if query.state:
        found.append(StudyRow.state == query.state)
    if query.tenant:
        found.append(StudyRow.tenant == query.tenant)
    if query.outcome:
        found.append(_has_outcome(query.outcome))
    return found


def _matches(text: str) -> ColumnElement[bool]:
    name = "%".join(_literal(part) for part in text.replace(",", " ").replace("^", " ").split())
    start = _literal(text.strip()) + "%"
    return or_(
        StudyRow.accession_number.ilike(start, escape="\\"),
        StudyRow.patient_id.ilike(start, escape="\\"),
        StudyRow.patient_name.ilike(f"%{name}%", escape="\\"),
    )


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _has_outcome(kind: OutcomeKind) -> ColumnElement[bool]:
    if kind in ("positive", "negative"):
        return (
            exists()
            .where(*_SERVES, *_CURRENT, ResultRow.is_positive.is_(kind == "positive"))
            .where(AnalysisRow.state.in_(_TELLS))
            .correlate(StudyRow)
        )
    states = {
        "pending": [AnalysisState.WAITING, AnalysisState.QUEUED],
        "failed": [AnalysisState.FAILED],
    }.get(kind, [AnalysisState.NOT_ANALYSED])
    conditions = [*_SERVES, AnalysisRow.state.in_(states)]
    if kind in ("not_analysed", "not_applicable"):
        conditions.append(AnalysisRow.is_applicable.is_(kind == "not_analysed"))
    return exists().where(*conditions).correlate(StudyRow)


def _outcomes(session: Session, study_ids: Sequence[int]) -> dict[int, tuple[Outcome, ...]]:
    if not study_ids:
        return {}
    output = ResultRow.finding["output"]
    rows = session.execute(
        select(
            AnalysisRow,
            ResultRow.id,
            ResultRow.is_positive,
            ResultRow.urgency,
            output["short_name"].astext.label("short_name"),
            _PRIMARY["words"].astext.label("label"),
            _PRIMARY["probability"].label("probability"),
        )
        .outerjoin(ResultRow, (_CURRENT[0]) & (_CURRENT[1]))
        .where(AnalysisRow.study_id.in_(study_ids), AnalysisRow.is_shadow.is_(False))
        .order_by(AnalysisRow.study_id, AnalysisRow.id)
    ).all()
    sent = _sent(session, [row[1] for row in rows if row[1] is not None])
    found: dict[int, list[Outcome]] = {}
    for row in rows:
        outcome = _outcome(row, tuple(sent.get(row[1], ())))
        found.setdefault(row[0].study_id, []).append(outcome)
    return {study_id: tuple(items) for study_id, items in found.items()}


def _sent(session: Session, result_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[Sent]]:
    found: dict[uuid.UUID, list[Sent]] = {}
    if not result_ids:
        return found
    for result_id, destination, state in session.execute(
        select(DeliveryRow.result_id, DeliveryRow.destination, DeliveryRow.state)
        .where(DeliveryRow.result_id.in_(result_ids))
        .order_by(DeliveryRow.destination)
    ):
        found.setdefault(result_id, []).append(Sent(destination, state))
    return found


def _outcome(row: Any, sent: tuple[Sent, ...]) -> Outcome:
    analysis: AnalysisRow = row[0]
    state = AnalysisState(analysis.state)
    plain = Outcome(
        bundle=analysis.bundle,
        kind="pending",
        words=f"{row.short_name or analysis.bundle}: {words.ANALYSIS_STATES[state]}",
        state=analysis.state,
        result_no=analysis.result_no,
        reason=analysis.reason,
        sent=sent,
    )
    if state is AnalysisState.FAILED:
        return replace(plain, kind="failed")
    if state is AnalysisState.NOT_ANALYSED and analysis.is_applicable:
        return replace(plain, kind="not_analysed")
    if state is AnalysisState.NOT_ANALYSED:
        return replace(plain, kind="not_applicable", words=f"{analysis.bundle}: not applicable")
    if row.is_positive is None or state not in _TELLS:
        return plain
    shown = CalibratedProbability(**row.probability) if row.probability else None
    verdict = "SUSPECTED" if row.is_positive else "NOT DETECTED"
    return replace(
        plain,
        kind="positive" if row.is_positive else "negative",
        words=f"{row.short_name}: {verdict}",
        probability=percent(shown) if shown else "",
        label=row.label,
        urgency=row.urgency,
        is_partial=analysis.is_partial,
    )


def line_of(row: StudyRow, outcomes: Sequence[Outcome]) -> Line:
    ranks = {"STAT": 0, "URGENT": 1, "ROUTINE": 2}
    urgencies = [outcome.urgency for outcome in outcomes if outcome.urgency]
    return Line(
        id=row.public_id,
        tenant=row.tenant,
        is_upload=row.origin != "dicom",
        patient_name=row.patient_name,
        patient_id=row.patient_id,
        accession_number=row.accession_number,
        study_description=row.study_description,
        study_date=row.study_date,
        sender=row.sender,
        state=row.state,
        lane=row.lane,
        n_instances=row.n_instances,
        received_at=row.last_instance_at,
        urgency=min(urgencies, key=lambda name: ranks.get(name, 3), default=""),
        outcomes=tuple(outcomes),
    )
