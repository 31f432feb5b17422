"""Withdrawals: an operator takes back all that was issued of an analysis, wherever it went."""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from sqlalchemy import ColumnElement, Exists, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from db import answers, results, studies
from db.errors import IllegalMove, PermanentError
from db.job import Lane
from db.notices import output_from
from db.outbox import DeliveryState
from db.result import ModelIdentity, OutputSpec, SentObject
from db.study import AnalysisEvent, WithdrawalReason
from db.tables import (
    AuditRow,
    DeliveryRow,
    DestinationRow,
    NoticeRow,
    ObjectRow,
    ResultRow,
    WithdrawalRow,
)

MAX_WORDS = 1024  # characters


class BadWords(PermanentError):
    """The operator's words cannot be written into a rejection note."""

    code: ClassVar[str] = "bad_words"


def check_words(words: str) -> str:
    """An operator's words, if a note can hold them: they stand under the source's character set,
    which may be any, or none.

    Raises
    ------
    BadWords
    """
    if not (words.isascii() and words.isprintable() and len(words) <= MAX_WORDS):
        raise BadWords(f"printable ASCII, at most {MAX_WORDS} characters, is all it may hold")
    return words


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """What a rejection note says, whatever it rejects."""

    withdrawal_uuid: str  # uuid4
    withdrawn_at: str  # ISO 8601 UTC
    reason: WithdrawalReason
    words: str  # of the operator; ASCII, may be empty
    model: ModelIdentity  # whose newest result or notice it takes back
    output: OutputSpec

    def __post_init__(self) -> None:
        check_words(self.words)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        fields = dict(value)
        fields["reason"] = WithdrawalReason(fields["reason"])
        fields["model"] = ModelIdentity(**fields["model"])
        fields["output"] = output_from(fields["output"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Done:
    """What a withdrawal did, for whoever asked for it."""

    results: tuple[str, ...]  # ids of what is taken back: results and notices
    destinations: tuple[str, ...]  # that get a rejection note
    again: tuple[str, ...]  # that get an earlier one once more, because it did not arrive


def withdraw(
    session: Session, analysis_id: int, *, actor: str, reason: WithdrawalReason, words: str = ""
) -> Done:
    """Take back what was issued and not yet taken back: it is never sent (again), and each
    destination that may have any of it is owed a rejection note.

    What is being sent at this moment ends with the object that is on the line; the note waits for
    that, and names it. Asked for once more, notes that did not arrive are owed again.

    Raises
    ------
    IllegalMove
        If there is nothing to take back.
    BadWords
    """
    studies.lock(session, studies.load(session, analysis_id).study_id)
    analysis = studies.load(session, analysis_id)
    if analysis.is_shadow:
        raise IllegalMove("a shadow's results go nowhere")
    again = _owe_again(session, analysis)
    issued = _issued(session, analysis)
    if not (issued or again):
        raise IllegalMove(_why_nothing(session, analysis))
    owed: list[DeliveryRow] = []
    if issued:
        owed = _stop(session, issued)
        _take_back(session, analysis, issued, owed, actor=actor, reason=reason, words=words)
    names = sorted(row.destination for row in owed)
    done = Done(tuple(str(row.id) for row in issued), tuple(names), again)
    session.add(
        AuditRow(
            tenant=analysis.tenant,
            actor=actor,
            action="withdraw",
            target=f"analysis {analysis.id}",
            detail={"reason": str(reason), **asdict(done)},
        )
    )
    studies.notify(session)
    return done


def _why_nothing(session: Session, analysis: studies.Analysis) -> str:
    newest = latest(session, analysis.id)
    if newest is None:
        return f"nothing was issued yet: the analysis is {analysis.state}"
    return f"withdrawn already, {newest.at:%Y-%m-%d %H:%M} by {newest.actor}"


def latest(session: Session, analysis_id: int) -> WithdrawalRow | None:
    return session.scalar(
        select(WithdrawalRow)
        .where(WithdrawalRow.analysis_id == analysis_id)
        .order_by(WithdrawalRow.result_no.desc())
        .limit(1)
    )


def is_withdrawn(session: Session, analysis_id: int, result_id: uuid.UUID) -> bool:
    """Whether a result or notice was taken back."""
    newest = latest(session, analysis_id)
    row = session.get(ResultRow, result_id) or session.get(NoticeRow, result_id)
    return newest is not None and row is not None and row.result_no < newest.result_no


def is_rejection(delivery: type[DeliveryRow] = DeliveryRow) -> Exists:
    """Of deliveries: those of rejection notes."""
    return exists().where(WithdrawalRow.id == delivery.result_id)


def is_out() -> ColumnElement[bool]:
    """Of deliveries: those of which the destination may have anything that was not taken back."""
    number = func.coalesce(
        select(ResultRow.result_no)
        .where(ResultRow.id == DeliveryRow.result_id)
        .correlate(DeliveryRow)
        .scalar_subquery(),
        select(NoticeRow.result_no)
        .where(NoticeRow.id == DeliveryRow.result_id)
        .correlate(DeliveryRow)
        .scalar_subquery(),
    )
    taken_back = exists().where(
        WithdrawalRow.analysis_id == DeliveryRow.analysis_id, WithdrawalRow.result_no > number
    )
    return ~is_rejection() & ~taken_back & may_have()


def may_have() -> ColumnElement[bool]:
    """Of deliveries: those of which the destination has anything, or soon may."""
    return or_(
        answers.may_have_something(),
        DeliveryRow.state.in_((DeliveryState.DELIVERED, DeliveryState.SENDING)),
    )


def sent_to(session: Session, withdrawal: WithdrawalRow, destination: str) -> list[SentObject]:
    """What a rejection note to `destination` names, in the order in which it was built.

    Only what it has accepted, or may have got: an archive may refuse a note as a whole that names
    an instance it never saw.
    """
    before, after = withdrawal.result_no, _last_no(session, withdrawal)
    found: list[SentObject] = []
    for row in _between(session, withdrawal.analysis_id, after, before):
        delivery = session.scalar(
            select(DeliveryRow).where(
                DeliveryRow.result_id == row.id, DeliveryRow.destination == destination
            )
        )
        if delivery is not None:
            found += _objects(session, delivery)
    return found


def _objects(session: Session, delivery: DeliveryRow) -> list[SentObject]:
    known = {
        uid: answers.is_delivered(code)
        for uid, code in delivery.statuses.items()
        if answers.is_delivered(code) or answers.is_in_doubt(code)
    }
    rows = session.scalars(
        select(ObjectRow)
        .where(
            ObjectRow.result_id == delivery.result_id, ObjectRow.sop_instance_uid.in_(list(known))
        )
        .order_by(ObjectRow.seq, ObjectRow.sop_instance_uid)
    )
    return [
        SentObject(
            result_id=str(row.result_id),
            role=row.role,
            sop_class_uid=row.sop_class_uid,
            sop_instance_uid=row.sop_instance_uid,
            series_instance_uid=row.series_instance_uid,
            is_certain=known[row.sop_instance_uid],
        )
        for row in rows
    ]


def _last_no(session: Session, withdrawal: WithdrawalRow) -> int:
    """The number of the withdrawal before this one; 0 where there is none."""
    older = aliased(WithdrawalRow)
    query = select(func.max(older.result_no)).where(
        older.analysis_id == withdrawal.analysis_id, older.result_no < withdrawal.result_no
    )
    return session.scalar(query) or 0


def _issued(session: Session, analysis: studies.Analysis) -> list[ResultRow | NoticeRow]:
    newest = latest(session, analysis.id)
    after = newest.result_no if newest else 0
    return _between(session, analysis.id, after, results.next_no(session, analysis))


def _between(
    session: Session, analysis_id: int, after: int, before: int
) -> list[ResultRow | NoticeRow]:
    """What was issued under numbers between the two, oldest first."""
    found: list[ResultRow | NoticeRow] = []
    for table in (ResultRow, NoticeRow):
        found += session.scalars(
            select(table).where(
                table.analysis_id == analysis_id,
                table.result_no > after,
                table.result_no < before,
            )
        )
    return sorted(found, key=lambda row: row.result_no)


def _stop(session: Session, issued: Sequence[ResultRow | NoticeRow]) -> list[DeliveryRow]:
    """End what waits; returns one delivery of each destination that may have anything.

    What is on its way is left to its sender: only that knows what becomes of it.
    """
    ours = DeliveryRow.result_id.in_([row.id for row in issued])
    session.execute(
        update(DeliveryRow)
        .where(ours, DeliveryRow.state == DeliveryState.WAITING)
        .values(state=DeliveryState.WITHDRAWN, finished_at=func.now())
    )
    rows = session.scalars(select(DeliveryRow).where(ours, may_have()).order_by(DeliveryRow.id))
    return list({row.destination: row for row in rows}.values())


def _take_back(
    session: Session,
    analysis: studies.Analysis,
    issued: Sequence[ResultRow | NoticeRow],
    owed: Sequence[DeliveryRow],
    *,
    actor: str,
    reason: WithdrawalReason,
    words: str,
) -> None:
    number = results.next_no(session, analysis)
    newest = issued[-1]
    said = newest.finding if isinstance(newest, ResultRow) else newest.notice
    key = uuid.uuid4()
    withdrawal = Withdrawal(
        withdrawal_uuid=str(key),
        withdrawn_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        reason=reason,
        words=words,
        model=ModelIdentity(**said["model"]),
        output=output_from(said["output"]),
    )
    studies.move(
        session,
        analysis,
        AnalysisEvent.WITHDRAWN,
        detail={
            "by": actor,
            "reason": str(reason),
            "results": [row.result_no for row in issued],
            "destinations": [row.destination for row in owed],
        },
        reason_code=str(reason),
        reason=f"Withdrawn by an operator ({_WORDS[reason]}).",
        judge_at=None,
        result_no=0,  # no result of it stands; the next number follows from the withdrawal's
    )
    session.add(
        WithdrawalRow(
            id=key,
            analysis_id=analysis.id,
            study_id=analysis.study_id,
            tenant=analysis.tenant,
            origin=analysis.origin,
            bundle=analysis.bundle,
            result_no=number,
            withdrawal=withdrawal.to_json(),
            actor=actor,
        )
    )
    session.flush()
    for row in owed:
        session.add(
            DeliveryRow(
                result_id=key,
                analysis_id=analysis.id,
                study_id=analysis.study_id,
                tenant=analysis.tenant,
                origin=analysis.origin,
                destination=row.destination,
                lane=Lane.STAT,  # somebody may be reading it
                # As much time as what it takes back.
                expires_at=func.now() + (row.expires_at - row.created_at),
            )
        )
    session.flush()


_WORDS = {WithdrawalReason.PATIENT_SAFETY: "patient safety", WithdrawalReason.QUALITY: "quality"}


def _owe_again(session: Session, analysis: studies.Analysis) -> tuple[str, ...]:
    """Rejection notes that were refused or did not arrive in time: the same bytes once more."""
    rows = session.scalars(
        select(DeliveryRow).where(
            DeliveryRow.analysis_id == analysis.id,
            is_rejection(),
            DeliveryRow.state.in_((DeliveryState.REFUSED, DeliveryState.EXPIRED)),
        )
    ).all()
    for row in rows:
        row.state = DeliveryState.WAITING
        row.attempts = row.refusals = 0
        row.run_after = func.now()
        row.expires_at = func.now() + (row.expires_at - row.created_at)
        row.created_at = func.now()
        row.finished_at = None
        row.error_code = ""
    if rows:
        session.execute(
            update(DestinationRow)
            .where(DestinationRow.tenant == analysis.tenant)
            .values(retry_at=func.now())
        )
    return tuple(sorted({row.destination for row in rows}))
