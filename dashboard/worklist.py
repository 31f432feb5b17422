"""The worklist: studies by urgency and age, each with what the AI says of it."""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import ColumnElement, Select, case, exists, func, or_, select
from sqlalchemy.orm import Session

from dashboard import outcomes
from dashboard.outcomes import CURRENT, NEEDS_PERSON, TELLS, Line, OutcomeKind
from db.study import AnalysisState, StudyState
from db.tables import AnalysisRow, ResultRow, StudyRow

PAGE_SIZE = 50
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
class Page:
    lines: tuple[Line, ...]
    page: int
    has_more: bool


_SERVES = (AnalysisRow.study_id == StudyRow.id, AnalysisRow.is_shadow.is_(False))
_PERSON_RANK, _QUIET_RANK = 2, 3
# By the newest result, also of a study that is open again: it must not fall down meanwhile.
_RANK = case(
    (ResultRow.urgency == "STAT", 0),
    (ResultRow.urgency == "URGENT", 1),
    (ResultRow.is_positive | AnalysisRow.state.in_(NEEDS_PERSON), _PERSON_RANK),
    else_=_QUIET_RANK,
)


def find(session: Session, query: Query) -> Page:
    """One page of the worklist, as far as the session's viewer may see."""
    rows = session.scalars(_page_query(query)).all()
    shown = rows[:PAGE_SIZE]
    found = outcomes.read(session, [row.id for row in shown])
    lines = tuple(outcomes.line_of(row, found.get(row.id, ())) for row in shown)
    return Page(lines, query.page, has_more=len(rows) > PAGE_SIZE)


def _page_query(query: Query) -> Select[StudyRow]:
    found = (
        select(func.min(_RANK))
        .select_from(AnalysisRow)
        .outerjoin(ResultRow, CURRENT[0] & CURRENT[1])
        .where(*_SERVES)
        .correlate(StudyRow)
        .scalar_subquery()
    )
    held = case((StudyRow.is_held, _PERSON_RANK), else_=_QUIET_RANK)
    rank = func.least(func.coalesce(found, _QUIET_RANK), held)
    # Who waits longest comes first; where nothing is urgent, the newest, or a study that has just
    # come in would stand on the last page.
    waiting_since = case((rank < _QUIET_RANK, StudyRow.last_instance_at))
    newest = (StudyRow.last_instance_at.desc(), StudyRow.id.desc())
    return (
        select(StudyRow)
        .where(*_conditions(query))
        .order_by(rank, waiting_since, *newest)
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
            .where(*_SERVES, *CURRENT, ResultRow.is_positive.is_(kind == "positive"))
            .where(AnalysisRow.state.in_(TELLS))
            .correlate(StudyRow)
        )
    states = {
        "pending": [AnalysisState.WAITING, AnalysisState.QUEUED],
        "failed": [AnalysisState.FAILED],
        "withdrawn": [AnalysisState.WITHDRAWN],
    }.get(kind, [AnalysisState.NOT_ANALYSED])
    conditions = [*_SERVES, AnalysisRow.state.in_(states)]
    if kind in ("not_analysed", "not_applicable"):
        conditions.append(AnalysisRow.is_applicable.is_(kind == "not_analysed"))
    return exists().where(*conditions).correlate(StudyRow)
