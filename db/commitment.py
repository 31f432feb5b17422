"""What destinations are asked to vouch for: storage commitment turns "sent" into "committed".

    WANTED --the destination takes the request--> ASKED --its report--> COMMITTED
       |                                             |--its report--> FAILED: sent again
       '--it will not be asked--> REFUSED            '--none comes--> WANTED, at last UNANSWERED

Of a delivery one row is open at a time. A report is heard whatever has become of its row, as long
as nothing was sent since.
"""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, exists, func, select, update
from sqlalchemy.orm import Session

from db import reach, studies, transaction, withdrawals
from db.answers import is_delivered, to_send_again
from db.claims import REFUSAL_WAIT, ClaimedDelivery
from db.clock import is_past
from db.outbox import OPEN, DeliveryState, settle
from db.study import AnalysisEvent, AnalysisState
from db.tables import (
    CommitmentRow,
    DeliveryRow,
    DestinationRow,
    ObjectRow,
    ResultRow,
)
from db.transaction import Item, Transaction

#: An archive may answer a C-STORE before it has filed the instance.
ASK_AFTER = dt.timedelta(seconds=30)
#: Some vouch once an instance is on tape, which is written by night.
PATIENCE = dt.timedelta(hours=24)
#: So often it is asked where no report comes.
MAX_REQUESTS = 3
#: So often it is sent again; as with refusals, five tries in a day.
MAX_FAILURES = 5
#: While it cannot be asked; longer than any outage that a delivery survives.
ASKED_FOR_AT_MOST = dt.timedelta(days=10)
#: For a request that is under way: should its worker die, another asks again.
_LEASE = dt.timedelta(minutes=2)
_LONGEST_WAIT = dt.timedelta(seconds=reach.MAX_BACKOFF_S)
NOT_COMMITTED = "not_committed"


class CommitmentState(StrEnum):
    WANTED = "WANTED"  # the destination is to be asked
    ASKED = "ASKED"  # it has taken the request; its report is to come
    COMMITTED = "COMMITTED"
    FAILED = "FAILED"  # it does not vouch for some of it
    REFUSED = "REFUSED"  # it does not want to be asked
    UNANSWERED = "UNANSWERED"  # no report came, however often it was asked
    OVERTAKEN = "OVERTAKEN"  # the delivery was sent again, or taken back, meanwhile


_S = CommitmentState
COMMITMENT_WORDS: Mapping[str, str] = {
    _S.WANTED: "storage commitment to be asked for",
    _S.ASKED: "storage commitment asked for",
    _S.COMMITTED: "committed",
    _S.FAILED: "storage commitment failed",
    _S.REFUSED: "storage commitment not given",
    _S.UNANSWERED: "storage commitment not answered",
    _S.OVERTAKEN: "storage commitment overtaken",
}
_OPEN = (_S.WANTED, _S.ASKED)
#: What a report can still change.
_MAY_BE_SETTLED = (_S.WANTED, _S.ASKED, _S.UNANSWERED, _S.REFUSED)


@dataclass(frozen=True, slots=True)
class ClaimedCommitment:
    """A request that this worker is about to make."""

    id: int
    transaction: Transaction


def want(session: Session, delivery: ClaimedDelivery) -> None:
    """From now on the destination of an ended delivery is to vouch for what it accepted.

    Safe to call twice: the newer row takes the older one's place.
    """
    row = session.get_one(DeliveryRow, delivery.id, populate_existing=True)
    had = [uid for uid, code in row.statuses.items() if is_delivered(code)]
    if row.state not in (DeliveryState.DELIVERED, DeliveryState.REFUSED) or not had:
        return
    _overtake(session, row.id)
    objects = session.execute(
        select(ObjectRow.sop_instance_uid, ObjectRow.sop_class_uid).where(
            ObjectRow.result_id == row.result_id, ObjectRow.sop_instance_uid.in_(had)
        )
    )
    session.add(
        CommitmentRow(
            delivery_id=row.id,
            study_id=row.study_id,
            tenant=row.tenant,
            origin=row.origin,
            destination=row.destination,
            items={uid: sop_class for uid, sop_class in objects},
            run_after=func.now() + ASK_AFTER,
        )
    )


def _overtake(session: Session, delivery_id: int) -> None:
    session.execute(
        update(CommitmentRow)
        .where(CommitmentRow.delivery_id == delivery_id, CommitmentRow.state.in_(_OPEN))
        .values(state=_S.OVERTAKEN, finished_at=func.now())
    )


def claim_due(session: Session, tenant: str, destination: str) -> ClaimedCommitment | None:
    """The next request to make of a destination, under a transaction UID of its own.

    Commit before asking: the report may be faster than the answer to the request.
    """
    row = session.scalar(
        select(CommitmentRow)
        .join(
            DestinationRow,
            (DestinationRow.tenant == CommitmentRow.tenant)
            & (DestinationRow.name == CommitmentRow.destination),
        )
        .where(
            CommitmentRow.tenant == tenant,
            CommitmentRow.destination == destination,
            CommitmentRow.state == _S.WANTED,
            is_past(CommitmentRow.run_after, dt.timedelta(seconds=reach.MAX_BACKOFF_S)),
            is_past(DestinationRow.retry_at, dt.timedelta(seconds=reach.MAX_BACKOFF_S)),
        )
        .order_by(CommitmentRow.run_after, CommitmentRow.id)
        .limit(1)
        .with_for_update(of=CommitmentRow, skip_locked=True)
    )
    if row is None or _is_taken_back(session, row):
        return None
    row.transaction_uid = transaction.new_uid()
    row.attempts += 1
    row.run_after = func.now() + _LEASE
    session.flush()
    items = tuple(Item(sop_class, uid) for uid, sop_class in row.items.items())
    return ClaimedCommitment(row.id, Transaction(row.transaction_uid, items))


def _is_taken_back(session: Session, row: CommitmentRow) -> bool:
    """End the request where its delivery was taken back; whether it was."""
    delivery = session.get_one(DeliveryRow, row.delivery_id)
    if not withdrawals.is_withdrawn(session, delivery.analysis_id, delivery.result_id):
        return False
    row.state, row.finished_at = _S.OVERTAKEN, func.now()
    return True


def note_asked(session: Session, claimed: ClaimedCommitment, error_code: str = "") -> None:
    """The destination has taken the request, or may have; the report may have been faster.

    error_code : why that is not known: it may report though it never answered
    """
    row = _lock(session, claimed)
    if row is None:
        return
    row.state, row.asked_at, row.error_code = _S.ASKED, func.now(), error_code
    row.run_after = func.now() + PATIENCE
    if not error_code:
        reach.answered(session, row.tenant, row.destination)


def put_off(session: Session, claimed: ClaimedCommitment, error_code: str) -> None:
    """It could not be asked now; no try is counted, for it has not heard of it.

    The longer it has been so, the longer it waits.
    """
    row = _lock(session, claimed)
    if row is None:
        return
    age = session.scalars(select(func.now())).one() - row.created_at
    if age > ASKED_FOR_AT_MOST:
        _end(session, row, _S.UNANSWERED, error_code)
        return
    row.attempts -= 1
    row.error_code = error_code
    row.run_after = func.now() + min(max(age / 4, ASK_AFTER), _LONGEST_WAIT)
    if reach.is_unreachable(error_code):
        reach.back_off(session, row.tenant, row.destination, error_code)
    else:
        reach.pause(session, row.tenant, row.destination)


def note_refused(session: Session, claimed: ClaimedCommitment, error_code: str) -> None:
    """The destination does not give storage commitment: what it accepted stays "sent"."""
    row = _lock(session, claimed)
    if row is not None:
        _end(session, row, _S.REFUSED, error_code)


def _lock(session: Session, claimed: ClaimedCommitment) -> CommitmentRow | None:
    return session.scalar(
        select(CommitmentRow)
        .where(
            CommitmentRow.id == claimed.id,
            CommitmentRow.state == _S.WANTED,
            CommitmentRow.transaction_uid == claimed.transaction.uid,
        )
        .with_for_update()
    )


def follow_up(session: Session) -> bool:
    """Ask once more where no report came in time, and at last give up; False where there is none.

    A destination that has left the configuration is not asked: its row waits, and then ends.
    """
    row = session.scalar(
        select(CommitmentRow)
        .where(
            CommitmentRow.state.in_(_OPEN),
            (CommitmentRow.state == _S.ASKED) & is_past(CommitmentRow.run_after, PATIENCE)
            | (CommitmentRow.created_at < func.now() - ASKED_FOR_AT_MOST - PATIENCE),
        )
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if row is None:
        return False
    if _is_taken_back(session, row):
        return True
    if row.state == _S.ASKED and row.attempts < MAX_REQUESTS:
        row.state, row.run_after = _S.WANTED, func.now()
    else:
        _end(session, row, _S.UNANSWERED, row.error_code or "no_report")
    return True


def take_report(
    session: Session, tenant: str, destinations: tuple[str, ...], report: Transaction
) -> bool:
    """What a destination says; whether it was asked.

    destinations : the names of those that the reporting peer can be
    """
    found = session.scalar(
        select(CommitmentRow.study_id).where(*_is_of(tenant, destinations, report))
    )
    if found is None:
        return False
    studies.lock(session, found)
    row = session.scalar(
        select(CommitmentRow).where(*_is_of(tenant, destinations, report)).with_for_update()
    )
    if row is None or row.state not in _MAY_BE_SETTLED:
        return True  # it said so before, or the delivery was sent again since
    if _is_overtaken(session, row):
        return True
    # Whoever passes over an instance does not vouch for it.
    reasons = {
        uid: report.failed.get(uid, transaction.PROCESSING_FAILURE)
        for uid in row.items
        if uid not in report.kept
    }
    row.failed = {uid: f"0x{reason:04X}" for uid, reason in sorted(reasons.items())}
    if not reasons:
        _end(session, row, _S.COMMITTED, "")
        return True
    delivery = session.get_one(DeliveryRow, row.delivery_id, with_for_update=True)
    _end(session, row, _S.FAILED, next(iter(row.failed.values())))
    if _is_to_come_again(session, delivery):
        _send_again(session, delivery, reasons)
    return True


def _is_of(
    tenant: str, destinations: tuple[str, ...], report: Transaction
) -> tuple[ColumnElement[bool], ...]:
    return (
        CommitmentRow.transaction_uid == report.uid,
        CommitmentRow.tenant == tenant,
        CommitmentRow.destination.in_(destinations),
    )


def _is_overtaken(session: Session, row: CommitmentRow) -> bool:
    """Whether the same delivery ended once more since: this report is about what was before."""
    newer = select(CommitmentRow.id).where(
        CommitmentRow.delivery_id == row.delivery_id, CommitmentRow.id > row.id
    )
    return session.scalar(newer.limit(1)) is not None


def _is_to_come_again(session: Session, delivery: DeliveryRow) -> bool:
    """Not what was taken back, nor what a newer one of the same analysis has replaced there."""
    if withdrawals.is_withdrawn(session, delivery.analysis_id, delivery.result_id):
        return False
    newer = (
        exists()
        .where(
            DeliveryRow.analysis_id == delivery.analysis_id,
            DeliveryRow.destination == delivery.destination,
            DeliveryRow.id > delivery.id,
            DeliveryRow.state.in_((*OPEN, DeliveryState.DELIVERED)),
        )
        .select()
    )
    return delivery.state not in OPEN and not session.scalar(newer)


def _send_again(session: Session, delivery: DeliveryRow, uids: Mapping[str, int]) -> None:
    """The same bytes of what it does not vouch for; not for ever."""
    n_failed = session.scalar(
        select(func.count()).where(
            CommitmentRow.delivery_id == delivery.id, CommitmentRow.state == _S.FAILED
        )
    )
    analysis = studies.load(session, delivery.analysis_id)
    is_settled = analysis.state in (AnalysisState.DELIVERED, AnalysisState.DELIVERED_IN_PART)
    if is_settled and _is_newest(session, analysis, delivery):
        studies.move(
            session,
            analysis,
            AnalysisEvent.NOT_COMMITTED,
            detail={"destination": delivery.destination},
        )
    if (n_failed or 0) >= MAX_FAILURES:
        delivery.state, delivery.error_code = DeliveryState.REFUSED, NOT_COMMITTED
        session.flush()
        _record(session, delivery, "delivery_refused", reason_code=NOT_COMMITTED)
        settle(session, delivery.analysis_id)
        return
    again = to_send_again({uid: delivery.statuses[uid] for uid in uids})
    delivery.statuses = {**delivery.statuses, **again}
    delivery.state = DeliveryState.WAITING
    delivery.run_after = func.now() + (dt.timedelta(0) if n_failed == 1 else REFUSAL_WAIT)
    delivery.expires_at = func.greatest(delivery.expires_at, func.now() + dt.timedelta(days=1))
    delivery.finished_at = None
    delivery.error_code = NOT_COMMITTED
    delivery.refusals = (n_failed or 1) - 1  # from the second time on it waits as a refusal does
    session.flush()
    studies.notify(session)


def _is_newest(session: Session, analysis: studies.Analysis, delivery: DeliveryRow) -> bool:
    row = session.get(ResultRow, delivery.result_id)
    return row is not None and row.result_no == analysis.result_no


_EVENTS: Mapping[CommitmentState, str] = {
    _S.COMMITTED: "result_committed",
    _S.FAILED: "commitment_failed",
    _S.REFUSED: "commitment_refused",
    _S.UNANSWERED: "commitment_unanswered",
}


def _end(session: Session, row: CommitmentRow, state: CommitmentState, error_code: str) -> None:
    row.state, row.error_code, row.finished_at = state, error_code, func.now()
    session.flush()
    delivery = session.get_one(DeliveryRow, row.delivery_id)
    _record(
        session,
        delivery,
        _EVENTS[state],
        n_objects=len(row.failed) or len(row.items),
        reason_code=error_code,
    )


def _record(session: Session, delivery: DeliveryRow, kind: str, **detail: object) -> None:
    studies.record(
        session,
        kind,
        tenant=delivery.tenant,
        origin=delivery.origin,
        study_id=delivery.study_id,
        analysis_id=delivery.analysis_id,
        is_alarm=kind != _EVENTS[_S.COMMITTED],
        destination=delivery.destination,
        **{key: value for key, value in detail.items() if value != ""},
    )
