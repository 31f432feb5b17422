"""Claiming deliveries: by one sender at a time, under a lease that it renews while it sends."""

import datetime as dt
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, case, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from db import reach, studies, withdrawals
from db.answers import merged
from db.clock import is_past
from db.errors import StaleAnalysis
from db.outbox import DeliveryState
from db.tables import DeliveryRow, DestinationRow, StudyRow, WithdrawalRow

#: As short as the time after which a silent process counts as gone (db.heartbeat), and renewed.
LEASE_S = 30.0
SENDER_DIED = "sender_died"
#: Between two tries of what a destination refuses.
REFUSAL_WAIT = dt.timedelta(hours=5)
_BACKOFF = dt.timedelta(seconds=reach.MAX_BACKOFF_S)


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    """A delivery that this worker has until its lease ends."""

    id: int
    result_id: uuid.UUID
    analysis_id: int
    study_id: int
    tenant: str
    origin: str
    destination: str
    variant: str
    attempts: int
    #: SOP Instance UID -> last answer; what was accepted is not sent again
    statuses: Mapping[str, str]
    expires_at: dt.datetime
    worker: str
    is_rejection: bool = False  # a rejection note: it goes out whatever became of the study


def claim_due(
    session: Session, tenant: str, destination: str, worker: str
) -> ClaimedDelivery | None:
    """Claim the next delivery for a destination, urgent first; commit before sending.

    Nothing is due while the destination backs off, while the study is held, or while an older
    result of the same analysis is still on its way there. A rejection note is due in a held study,
    too: that is when it is wanted most. It waits for what is being sent at this moment, and goes
    before what is newer; once it was tried in vain it holds that up no more.
    """
    _count_the_dead(session, tenant, destination)
    older, is_note = aliased(DeliveryRow), withdrawals.is_rejection()
    row = session.scalar(
        select(DeliveryRow)
        .join(StudyRow, StudyRow.id == DeliveryRow.study_id)
        .join(
            DestinationRow,
            (DestinationRow.tenant == DeliveryRow.tenant)
            & (DestinationRow.name == DeliveryRow.destination),
        )
        .where(
            DeliveryRow.tenant == tenant,
            DeliveryRow.destination == destination,
            is_past(DestinationRow.retry_at, _BACKOFF),
            or_(StudyRow.is_held.is_(False), is_note),
            DeliveryRow.state == DeliveryState.WAITING,
            is_past(DeliveryRow.run_after, _furthest()),
            ~exists().where(
                older.analysis_id == DeliveryRow.analysis_id,
                older.destination == DeliveryRow.destination,
                older.id < DeliveryRow.id,
                # What waits and is older than a note was taken back: it never goes.
                or_(
                    older.state == DeliveryState.SENDING,
                    (older.state == DeliveryState.WAITING) & ~is_note,
                ),
                ~and_(older.attempts > 0, withdrawals.is_rejection(older)),
            ),
        )
        .order_by(DeliveryRow.lane, DeliveryRow.id)
        .limit(1)
        .with_for_update(of=DeliveryRow, skip_locked=True)
    )
    return None if row is None else take(session, row, worker)


def _furthest() -> ColumnElement[dt.timedelta]:
    """How far ahead a delivery can be put: refusals wait for most of a day."""
    return case((DeliveryRow.refusals > 0, REFUSAL_WAIT), else_=_BACKOFF)


def _count_the_dead(session: Session, tenant: str, destination: str) -> None:
    """A dead worker's delivery comes back when its lease is over, as one of its tries.

    Should it be what kills them, then it neither loops hot nor goes unseen.
    """
    dead = session.scalars(
        select(DeliveryRow)
        .where(
            DeliveryRow.tenant == tenant,
            DeliveryRow.destination == destination,
            DeliveryRow.state == DeliveryState.SENDING,
            is_past(DeliveryRow.lease_until, dt.timedelta(seconds=LEASE_S)),
        )
        .with_for_update(skip_locked=True)
    ).all()
    for row in dead:
        row.attempts += 1
        if withdrawals.is_withdrawn(session, row.analysis_id, row.result_id):
            row.state, row.error_code = DeliveryState.WITHDRAWN, SENDER_DIED
            row.worker, row.lease_until, row.finished_at = "", None, func.now()
            continue
        is_second = row.error_code == SENDER_DIED
        # At first at once, whatever came before: a restart, a power cut.
        wait = reach.backoff(row.attempts if is_second else 1)
        row.state, row.error_code = DeliveryState.WAITING, SENDER_DIED
        row.worker, row.lease_until = "", None
        row.run_after = func.now() + wait
        studies.record(
            session,
            SENDER_DIED,
            tenant=row.tenant,
            origin=row.origin,
            study_id=row.study_id,
            analysis_id=row.analysis_id,
            is_alarm=is_second,
            destination=row.destination,
        )
    session.flush()


def take(session: Session, row: DeliveryRow, worker: str) -> ClaimedDelivery:
    """Claim a delivery whose row is locked."""
    row.state = DeliveryState.SENDING
    row.worker = worker
    row.lease_until = func.now() + dt.timedelta(seconds=LEASE_S)
    session.flush()
    return ClaimedDelivery(
        id=row.id,
        result_id=row.result_id,
        analysis_id=row.analysis_id,
        study_id=row.study_id,
        tenant=row.tenant,
        origin=row.origin,
        destination=row.destination,
        variant=row.variant,
        attempts=row.attempts,
        statuses=dict(row.statuses),
        expires_at=row.expires_at,
        worker=worker,
        is_rejection=session.get(WithdrawalRow, row.result_id) is not None,
    )


def renew(session: Session, delivery: ClaimedDelivery) -> bool:
    """Keep a claimed delivery for another lease; False where it is this worker's no more."""
    kept = session.scalar(
        update(DeliveryRow)
        .where(*_is_mine(delivery))
        .values(lease_until=func.now() + dt.timedelta(seconds=LEASE_S))
        .returning(DeliveryRow.id)
    )
    return kept is not None


def take_back(session: Session, is_gone: Callable[[str], bool]) -> int:
    """End the leases of workers that are known to be dead; returns how many deliveries are free.

    The others of the dead come back when their leases are over.
    """
    is_sending = DeliveryRow.state == DeliveryState.SENDING
    workers = session.scalars(select(DeliveryRow.worker).where(is_sending).distinct()).all()
    freed = session.scalars(
        update(DeliveryRow)
        .where(is_sending, DeliveryRow.worker.in_([name for name in workers if is_gone(name)]))
        .values(lease_until=func.now())
        .returning(DeliveryRow.id)
    )
    return len(freed.all())


def note(session: Session, delivery: ClaimedDelivery, answers: Mapping[str, str]) -> dict[str, str]:
    """Write down what a claimed delivery's destination has answered; returns all its answers.

    Raises
    ------
    StaleAnalysis
        If the lease ran out and another worker has it, or has finished it.
    """
    row = session.scalar(select(DeliveryRow).where(*_is_mine(delivery)).with_for_update())
    if row is None:
        raise _stale(delivery)
    row.statuses = merged(row.statuses, answers)
    session.flush()
    return row.statuses


def write(session: Session, delivery: ClaimedDelivery, **values: object) -> None:
    """Change a claimed delivery.

    Raises
    ------
    StaleAnalysis
        If the lease ran out and another worker has it, or has finished it.
    """
    written = session.scalar(
        update(DeliveryRow).where(*_is_mine(delivery)).values(**values).returning(DeliveryRow.id)
    )
    if written is None:
        raise _stale(delivery)


def _stale(delivery: ClaimedDelivery) -> StaleAnalysis:
    return StaleAnalysis(f"delivery row {delivery.id} is no longer this worker's")


def _is_mine(delivery: ClaimedDelivery) -> tuple[ColumnElement[bool], ...]:
    return (
        DeliveryRow.id == delivery.id,
        DeliveryRow.worker == delivery.worker,
        DeliveryRow.state == DeliveryState.SENDING,
    )
