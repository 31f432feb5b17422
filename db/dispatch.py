"""How a try to deliver ends: what a sender writes down about the delivery that it has claimed.

Back-off belongs to a destination that cannot be reached: the first success releases all that waits
for it. Where one object upsets it, that delivery alone waits.
"""

import datetime as dt
from collections.abc import Mapping
from dataclasses import replace

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session

from db import reach, studies
from db.claims import ClaimedDelivery, take, write
from db.outbox import OPEN, DeliveryState, settle
from db.tables import DeliveryRow, StudyRow

#: Five tries in a day end a delivery that the destination refuses.
MAX_REFUSALS = 5
REFUSAL_WAIT_S = 5 * 3600.0


def accept(session: Session, delivery: ClaimedDelivery, statuses: Mapping[str, str]) -> None:
    """The destination has every object; everything that waits for it may go now.

    This and the others that record an outcome raise `StaleAnalysis` where the lease was lost and
    another worker has the delivery.
    """
    studies.lock(session, delivery.study_id)
    _close(session, delivery, DeliveryState.DELIVERED, statuses, error_code="")
    reach.answered(session, delivery.tenant, delivery.destination)
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
    if reach.is_unreachable(error_code):
        reach.back_off(session, delivery.tenant, delivery.destination, error_code)
    else:
        wait = reach.backoff(delivery.attempts + 1)
        reach.pause(session, delivery.tenant, delivery.destination)
    _wait_again(session, delivery, statuses, error_code, wait)
    if delivery.attempts == 0:  # once a delivery, or an hour's outage fills the timeline
        _event(session, delivery, "delivery_postponed", reason_code=error_code)


def refuse(
    session: Session, delivery: ClaimedDelivery, statuses: Mapping[str, str], *, error_code: str
) -> None:
    """The destination would not have some objects: five tries in a day, then it ends in part."""
    studies.lock(session, delivery.study_id)
    reach.answered(session, delivery.tenant, delivery.destination)
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
    write(session, delivery, variant=variant)
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
    delivery = take(session, row, worker)
    _close(session, delivery, DeliveryState.EXPIRED, delivery.statuses, error_code=error_code)
    _event(session, delivery, "delivery_expired", is_alarm=True, reason_code=error_code)
    settle(session, delivery.analysis_id)
    return True


def _close(
    session: Session,
    delivery: ClaimedDelivery,
    state: DeliveryState,
    statuses: Mapping[str, str],
    *,
    error_code: str,
) -> None:
    write(
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
    write(
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
