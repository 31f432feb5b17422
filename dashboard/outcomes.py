"""What the AI says of each study on a list."""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from dashboard import words
from db import wording
from db.result import CalibratedProbability, percent
from db.study import AnalysisState
from db.tables import AnalysisRow, DeliveryRow, ResultRow, StudyRow

OutcomeKind = Literal[
    "positive", "negative", "pending", "not_analysed", "not_applicable", "failed", "withdrawn"
]
CURRENT = (
    ResultRow.analysis_id == AnalysisRow.id,
    ResultRow.result_no == AnalysisRow.result_no,
)
#: States in which the newest result is the word on the study; before and beside them it is not.
TELLS = (
    AnalysisState.FOUND,
    AnalysisState.BUILT,
    AnalysisState.DELIVERED,
    AnalysisState.DELIVERED_IN_PART,
)
#: What nobody has judged, or nobody was told of, comes before what was judged and is quiet.
NEEDS_PERSON = (AnalysisState.FAILED, AnalysisState.DELIVERED_IN_PART)
# The first label is the primary one; a finding may hold thousands of scores, which stay there.
_PRIMARY = ResultRow.finding["labels"][0]


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
    prevalence: str = ""  # "at 8 % prevalence": a percent never stands without it
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
    state_words: str
    needs_person: bool  # held, failed, or not delivered everywhere
    lane: int
    n_instances: int
    received_at: dt.datetime
    urgency: str
    outcomes: tuple[Outcome, ...] = field(default=())


def of_study(session: Session, study_id: int) -> tuple[Outcome, ...]:
    return read(session, [study_id]).get(study_id, ())


def read(session: Session, study_ids: Sequence[int]) -> dict[int, tuple[Outcome, ...]]:
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
        .outerjoin(ResultRow, (CURRENT[0]) & (CURRENT[1]))
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
        words=_plain_words(row.short_name, analysis.bundle, words.ANALYSIS_STATES[state]),
        state=analysis.state,
        result_no=analysis.result_no,
        reason=analysis.reason,
        sent=sent,
    )
    if state is AnalysisState.FAILED:
        return replace(plain, kind="failed")
    if state is AnalysisState.WITHDRAWN:
        return replace(plain, kind="withdrawn")
    if state is AnalysisState.NOT_ANALYSED and analysis.is_applicable:
        return replace(plain, kind="not_analysed")
    if state is AnalysisState.NOT_ANALYSED:
        return replace(
            plain, kind="not_applicable", words=_plain_words("", analysis.bundle, "not applicable")
        )
    if row.is_positive is None or state not in TELLS:
        return plain
    shown = CalibratedProbability(**row.probability) if row.probability else None
    verdict = wording.verdict(is_positive=row.is_positive, is_partial=analysis.is_partial)
    return replace(
        plain,
        kind="positive" if row.is_positive else "negative",
        words=f"{row.short_name}: {verdict}",
        probability=percent(shown) if shown else "",
        prevalence=wording.at_prevalence(shown.prevalence) if shown else "",
        label=row.label,
        urgency=row.urgency,
        is_partial=analysis.is_partial,
    )


def _plain_words(short_name: str | None, bundle: str, state: str) -> str:
    """`ICH AI: being analysed`; before its first result a bundle has only its id."""
    return f"{short_name}: {state}" if short_name else f"{state.capitalize()} ({bundle})"


def line_of(row: StudyRow, outcomes: Sequence[Outcome]) -> Line:
    ranks = {"STAT": 0, "URGENT": 1, "ROUTINE": 2}
    states = {outcome.state for outcome in outcomes}
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
        state_words=words.study_words(row.state, states),
        needs_person=row.is_held or not states.isdisjoint(NEEDS_PERSON),
        lane=row.lane,
        n_instances=row.n_instances,
        received_at=row.last_instance_at,
        urgency=min(urgencies, key=lambda name: ranks.get(name, 3), default=""),
        outcomes=tuple(outcomes),
    )
