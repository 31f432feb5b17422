"""The outbox: one row per result and destination, kept until the destination has everything.

Back-off belongs to a destination that cannot be reached: the first success releases all that waits
for it. Where one object upsets it, that delivery alone waits. One destination that is down never
delays another.
"""

import datetime as dt
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from config.tenants import Destination
from db import studies
from db.errors import StaleAnalysis
from db.job import backoff_s
from db.study import AnalysisEvent, AnalysisState
from db.tables import DeliveryRow, DestinationRow, ResultRow, StudyRow

#: Five tries in a day end a delivery that the destination refuses.
MAX_REFUSALS = 5
REFUSAL_WAIT_S = 5 * 3600.0
MAX_BACKOFF_S = 900.0
#: Nothing was sent: the destination itself is away. Anything else may be one object's doing.
UNREACHABLE = frozenset({"no_connection", "association_rejected"})
PAUSE_S = 2.0
DEFAULT_LEASE_S = 300.0


class DeliveryState(StrEnum):
    WAITING = "WAITING"
    SENDING = "SENDING"  # claimed under a lease
    DELIVERED = "DELIVERED"
    REFUSED = "REFUSED"  # the destination would not have some of it
    EXPIRED = "EXPIRED"
    DROPPED = "DROPPED"  # a newer result took its place before any of it was sent


OPEN = (DeliveryState.WAITING, DeliveryState.SENDING)


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
    statuses: Mapping[
        str, str
    ]  # SOP Instance UID -> last answer; what was accepted is not sent again
    expires_at: dt.datetime
    worker: str


def enqueue(
    session: Session,
    analysis: studies.Analysis,
    result_id: uuid.UUID,
    destinations: Sequence[tuple[Destination, str]],
) -> None:
    """Owe a result to each destination (with its variant); older results that wait are dropped.

    An older result of which a part was sent is finished first: `claim_due` keeps the order.
    """
    studies.lock(session, analysis.study_id)
    session.execute(
        update(DeliveryRow)
        .where(
            DeliveryRow.analysis_id == analysis.id,
            DeliveryRow.result_id != result_id,
            DeliveryRow.state == DeliveryState.WAITING,
            DeliveryRow.statuses == {},
        )
        .values(state=DeliveryState.DROPPED, finished_at=func.now())
    )
    for destination, variant in destinations:
        session.execute(
            insert(DeliveryRow)
            .values(
                result_id=result_id,
                analysis_id=analysis.id,
                study_id=analysis.study_id,
                tenant=analysis.tenant,
                origin=analysis.origin,
                destination=destination.name,
                variant=variant,
                lane=analysis.lane,
                expires_at=func.now() + dt.timedelta(hours=destination.expire_h),
            )
            .on_conflict_do_nothing()
        )
        session.execute(
            insert(DestinationRow)
            .values(tenant=analysis.tenant, name=destination.name)
            .on_conflict_do_nothing()
        )
    studies.notify(session)


def claim_due(
    session: Session,
    tenant: str,
    destination: str,
    worker: str,
    *,
    lease_s: float = DEFAULT_LEASE_S,
) -> ClaimedDelivery | None:
    """Claim the next delivery for a destination, urgent first; commit before sending.

    Nothing is due while the destination backs off, while the study is held, or while an older
    result of the same analysis is still on its way there.
    """
    older = aliased(DeliveryRow)
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
            DestinationRow.retry_at <= func.now(),
            StudyRow.is_held.is_(False),
            or_(
                (DeliveryRow.state == DeliveryState.WAITING)
                & (DeliveryRow.run_after <= func.now()),
                # A dead worker's delivery comes back when its lease is over.
                (DeliveryRow.state == DeliveryState.SENDING)
                & (DeliveryRow.lease_until < func.now()),
            ),
            ~exists().where(
                older.analysis_id == DeliveryRow.analysis_id,
                older.destination == DeliveryRow.destination,
                older.id < DeliveryRow.id,
                older.state.in_(OPEN),
            ),
        )
        .order_by(DeliveryRow.lane, DeliveryRow.id)
        .limit(1)
        .with_for_update(of=DeliveryRow, skip_locked=True)
    )
    return None if row is None else _claim(session, row, worker, lease_s)


def _claim(session: Session, row: DeliveryRow, worker: str, lease_s: float) -> ClaimedDelivery:
    row.state = DeliveryState.SENDING
    row.worker = worker
    row.lease_until = func.now() + dt.timedelta(seconds=lease_s)
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
    )


def accept(session: Session, delivery: ClaimedDelivery, statuses: Mapping[str, str]) -> None:
    """The destination has every object; everything that waits for it may go now.

    This and the others that record an outcome raise `StaleAnalysis` where the lease was lost and
    another worker has the delivery.
    """
    studies.lock(session, delivery.study_id)
    _close(session, delivery, DeliveryState.DELIVERED, statuses, error_code="")
    _destination_answers(session, delivery)
    _event(session, delivery, "result_delivered", n_objects=len(statuses))
    settle(session, delivery.analysis_id)


def postpone(
    session: Session, delivery: ClaimedDelivery, statuses: Mapping[str, str], *, error_code: str
) -> None:
    """It could not be sent now; expiry ends the delivery.

    A destination that is away backs off as a whole. One that was reached goes on with the next
    delivery, and this one waits: an object that upsets it must not hold up the others.
    """
    studies.lock(session, delivery.study_id)
    if _is_past(session, delivery.expires_at):
        _close(session, delivery, DeliveryState.EXPIRED, statuses, error_code=error_code)
        _event(session, delivery, "delivery_expired", is_alarm=True, reason_code=error_code)
        settle(session, delivery.analysis_id)
        return
    wait = dt.timedelta(0)
    if error_code in UNREACHABLE:
        _back_off(session, delivery, error_code)
    else:
        wait = _backoff(delivery.attempts + 1)
        _pause(session, delivery)
    _wait_again(session, delivery, statuses, error_code, wait)
    if delivery.attempts == 0:  # once a delivery, or an hour's outage fills the timeline
        _event(session, delivery, "delivery_postponed", reason_code=error_code)


def refuse(
    session: Session, delivery: ClaimedDelivery, statuses: Mapping[str, str], *, error_code: str
) -> None:
    """The destination would not have some objects: five tries in a day, then it ends in part."""
    studies.lock(session, delivery.study_id)
    _destination_answers(session, delivery)
    refusals = session.scalar(
        update(DeliveryRow)
        .where(DeliveryRow.id == delivery.id)
        .values(refusals=DeliveryRow.refusals + 1)
        .returning(DeliveryRow.refusals)
    )
    if (refusals or 0) >= MAX_REFUSALS or _is_past(session, delivery.expires_at):
        _close(session, delivery, DeliveryState.REFUSED, statuses, error_code=error_code)
        _event(session, delivery, "delivery_refused", is_alarm=True, reason_code=error_code)
        settle(session, delivery.analysis_id)
        return
    wait = dt.timedelta(seconds=REFUSAL_WAIT_S if refusals != 1 else 60)
    _wait_again(session, delivery, statuses, error_code, wait)
    _event(session, delivery, "objects_refused", reason_code=error_code)


def withhold(session: Session, delivery: ClaimedDelivery, *, error_code: str) -> None:
    """The object no longer matches its study: it is never sent, and a person is told."""
    studies.lock(session, delivery.study_id)
    _close(session, delivery, DeliveryState.REFUSED, delivery.statuses, error_code=error_code)
    _event(session, delivery, "delivery_withheld", is_alarm=True, reason_code=error_code)
    settle(session, delivery.analysis_id)


def release(session: Session, delivery: ClaimedDelivery) -> None:
    """Give a claimed delivery back untouched: the worker stops."""
    _wait_again(session, delivery, delivery.statuses, "", dt.timedelta(0), count=False)


def revise(session: Session, delivery: ClaimedDelivery, variant: str) -> ClaimedDelivery:
    """Send another variant of the result, before any of it was sent."""
    _write(session, delivery, variant=variant)
    return replace(delivery, variant=variant)


def expire_next(session: Session, worker: str) -> bool:
    """End a delivery past its time that nobody sends any more; False where there is none.

    Senders end their own. This is for a destination or tenant that left the configuration, and
    for a study that stays held. What another worker holds is left alone.
    """
    is_overdue = and_(
        DeliveryRow.state.in_(OPEN),
        DeliveryRow.expires_at < func.now(),
        or_(DeliveryRow.lease_until.is_(None), DeliveryRow.lease_until < func.now()),
    )
    delivery_id = session.scalar(
        select(DeliveryRow.id)
        .join(StudyRow, StudyRow.id == DeliveryRow.study_id)
        .where(is_overdue)
        .order_by(DeliveryRow.id)
        .limit(1)
        .with_for_update(of=StudyRow, key_share=True, skip_locked=True)
    )
    row = session.scalar(
        select(DeliveryRow)
        .where(DeliveryRow.id == delivery_id, is_overdue)
        .with_for_update(skip_locked=True)
    )
    if row is None:
        return False
    error_code = row.error_code or "expired"
    delivery = _claim(session, row, worker, DEFAULT_LEASE_S)
    _close(session, delivery, DeliveryState.EXPIRED, delivery.statuses, error_code=error_code)
    _event(session, delivery, "delivery_expired", is_alarm=True, reason_code=error_code)
    settle(session, delivery.analysis_id)
    return True


def settle(session: Session, analysis_id: int) -> None:
    """Once nothing of a built analysis is on its way, it is delivered, or delivered in part."""
    # Read under the lock: of two destinations that finish together the later sees the earlier.
    studies.lock(session, studies.load(session, analysis_id).study_id)
    analysis = studies.load(session, analysis_id)
    if analysis.state is not AnalysisState.BUILT:
        return
    result_id = session.scalar(
        select(ResultRow.id).where(
            ResultRow.analysis_id == analysis.id, ResultRow.result_no == analysis.result_no
        )
    )
    states = {
        DeliveryState(state)
        for state in session.scalars(
            select(DeliveryRow.state).where(DeliveryRow.result_id == result_id)
        )
    }
    if states & set(OPEN):
        return
    whole = states <= {DeliveryState.DELIVERED, DeliveryState.DROPPED}
    event = AnalysisEvent.ALL_ACCEPTED if whole else AnalysisEvent.SOME_REFUSED
    studies.move(session, analysis, event)


def _close(
    session: Session,
    delivery: ClaimedDelivery,
    state: DeliveryState,
    statuses: Mapping[str, str],
    *,
    error_code: str,
) -> None:
    _write(
        session,
        delivery,
        state=state,
        statuses=dict(statuses),
        attempts=DeliveryRow.attempts + 1,
        error_code=error_code,
        lease_until=None,
        finished_at=func.now(),
    )


def _wait_again(
    session: Session,
    delivery: ClaimedDelivery,
    statuses: Mapping[str, str],
    error_code: str,
    wait: dt.timedelta,
    *,
    count: bool = True,
) -> None:
    _write(
        session,
        delivery,
        state=DeliveryState.WAITING,
        statuses=dict(statuses),
        attempts=DeliveryRow.attempts + int(count),
        error_code=error_code,
        run_after=func.now() + wait,
        worker="",
        lease_until=None,
    )


def _write(session: Session, delivery: ClaimedDelivery, **values: object) -> None:
    written = session.scalar(
        update(DeliveryRow)
        .where(
            DeliveryRow.id == delivery.id,
            # Else the lease ran out and another worker has it, or has finished it.
            DeliveryRow.worker == delivery.worker,
            DeliveryRow.state == DeliveryState.SENDING,
        )
        .values(**values)
        .returning(DeliveryRow.id)
    )
    if written is None:
        raise StaleAnalysis(f"delivery row {delivery.id} is no longer this worker's")


def _backoff(failures: int) -> dt.timedelta:
    return dt.timedelta(seconds=backoff_s(failures, random.random(), MAX_BACKOFF_S))


def _back_off(session: Session, delivery: ClaimedDelivery, error_code: str) -> None:
    failures = session.scalar(
        update(DestinationRow)
        .where(*_of(delivery))
        .values(failures=DestinationRow.failures + 1, last_error=error_code)
        .returning(DestinationRow.failures)
    )
    session.execute(
        update(DestinationRow)
        .where(*_of(delivery))
        .values(retry_at=func.now() + _backoff(failures or 1))
    )


def _pause(session: Session, delivery: ClaimedDelivery) -> None:
    soon = func.now() + dt.timedelta(seconds=PAUSE_S)
    session.execute(
        update(DestinationRow)
        .where(*_of(delivery))
        .values(retry_at=func.greatest(DestinationRow.retry_at, soon))
    )


def _destination_answers(session: Session, delivery: ClaimedDelivery) -> None:
    session.execute(
        update(DestinationRow)
        .where(*_of(delivery))
        .values(failures=0, retry_at=func.now(), last_success_at=func.now(), last_error="")
    )


def _of(delivery: ClaimedDelivery) -> tuple[ColumnElement[bool], ...]:
    return (
        DestinationRow.tenant == delivery.tenant,
        DestinationRow.name == delivery.destination,
    )


def _is_past(session: Session, moment: dt.datetime) -> bool:
    return bool(session.scalar(select(func.now() >= moment)))


def _event(
    session: Session,
    delivery: ClaimedDelivery,
    kind: str,
    *,
    is_alarm: bool = False,
    **detail: object,
) -> None:
    studies.record(
        session,
        kind,
        tenant=delivery.tenant,
        origin=delivery.origin,
        study_id=delivery.study_id,
        analysis_id=delivery.analysis_id,
        is_alarm=is_alarm,
        destination=delivery.destination,
        **detail,
    )
