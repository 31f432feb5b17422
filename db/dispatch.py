"""How a try to deliver ends: what a sender writes down about the delivery that it has claimed.

Back-off belongs to a destination that cannot be reached: the first success releases all that waits
for it. Where one object upsets it, that delivery alone waits.
"""

import datetime as dt
from collections.abc import Collection, Mapping
from dataclasses import replace

from sqlalchemy import and_, func, or_, select, tuple_, update
from sqlalchemy.orm import Session

from db import reach, studies, withdrawals
from db.answers import IN_DOUBT, has_something
from db.claims import REFUSAL_WAIT, ClaimedDelivery, note, take, write
from db.outbox import OPEN, DeliveryState, settle
from db.tables import DeliveryRow, NoticeRow, StudyRow

#: Five tries in a day end a delivery that the destination refuses.
MAX_REFUSALS = 5
#: After its time, and after the node's start: a person is to have had a day to decide.
LONG_HELD = dt.timedelta(days=1)


def accept(session: Session, delivery: ClaimedDelivery, answers: Mapping[str, str]) -> None:
    """The destination has every object; everything that waits for it may go now.

    answers : those of this try, by SOP Instance UID (also where they were noted already)

    This and the others that record an outcome raise `StaleAnalysis` where the lease was lost and
    another worker has the delivery.
    """
    studies.lock(session, delivery.study_id)
    statuses = note(session, delivery, answers)
    _close(session, delivery, DeliveryState.DELIVERED, error_code="")
    reach.answered(session, delivery.tenant, delivery.destination)
    kind = "rejection_delivered" if delivery.is_rejection else "result_delivered"
    _event(session, delivery, kind, n_objects=len(statuses))
    settle(session, delivery.analysis_id)


def postpone(
    session: Session, delivery: ClaimedDelivery, answers: Mapping[str, str], *, error_code: str
) -> None:
    """It could not be sent now; expiry ends the delivery, or what took its place meanwhile.

    A destination that is away backs off as a whole. One that was reached goes on with the next
    delivery, and this one waits: an object that upsets it must not hold up the others.
    """
    studies.lock(session, delivery.study_id)
    note(session, delivery, answers)
    if _was_stopped(session, delivery, error_code):
        return
    if _is_past(session, delivery.expires_at):
        _close(session, delivery, DeliveryState.EXPIRED, error_code=error_code)
        _event(session, delivery, "delivery_expired", is_alarm=True, reason_code=error_code)
        settle(session, delivery.analysis_id)
        return
    wait = dt.timedelta(0)
    if reach.is_unreachable(error_code):
        reach.back_off(session, delivery.tenant, delivery.destination, error_code)
    else:
        wait = reach.backoff(delivery.attempts + 1)
        reach.pause(session, delivery.tenant, delivery.destination)
    if not _has_something(session, delivery) and _is_overtaken(session, delivery):
        _close(session, delivery, DeliveryState.DROPPED, error_code=error_code)
        return
    _wait_again(session, delivery, error_code, wait)
    if delivery.attempts == 0:  # once a delivery, or an hour's outage fills the timeline
        _event(session, delivery, "delivery_postponed", reason_code=error_code)


def refuse(
    session: Session, delivery: ClaimedDelivery, answers: Mapping[str, str], *, error_code: str
) -> None:
    """The destination would not have some objects: five tries in a day, then it ends in part.

    At once where something newer waits: that is not held up for most of a day.
    """
    studies.lock(session, delivery.study_id)
    note(session, delivery, answers)
    reach.answered(session, delivery.tenant, delivery.destination)
    if _was_stopped(session, delivery, error_code):
        return
    refusals = session.scalar(
        update(DeliveryRow)
        .where(DeliveryRow.id == delivery.id)
        .values(refusals=DeliveryRow.refusals + 1)
        .returning(DeliveryRow.refusals)
    )
    is_last = (refusals or 0) >= MAX_REFUSALS or _is_past(session, delivery.expires_at)
    if is_last or _is_overtaken(session, delivery):
        _close(session, delivery, DeliveryState.REFUSED, error_code=error_code)
        _event(session, delivery, "delivery_refused", is_alarm=True, reason_code=error_code)
        settle(session, delivery.analysis_id)
        return
    wait = REFUSAL_WAIT if refusals != 1 else dt.timedelta(seconds=60)
    _wait_again(session, delivery, error_code, wait)
    # A person can mend it: not only when all tries are over, most of a day later.
    _event(session, delivery, "objects_refused", is_alarm=refusals == 1, reason_code=error_code)


def withhold(session: Session, delivery: ClaimedDelivery, *, error_code: str) -> None:
    """The object no longer matches its study: it is never sent, and a person is told."""
    studies.lock(session, delivery.study_id)
    _close(session, delivery, DeliveryState.REFUSED, error_code=error_code)
    _event(session, delivery, "delivery_withheld", is_alarm=True, reason_code=error_code)
    settle(session, delivery.analysis_id)


def drop_if_over(session: Session, delivery: ClaimedDelivery) -> bool:
    """End a notice that nobody has where its analysis was opened again; whether it was."""
    said_of = session.scalar(
        select(NoticeRow.analysis_version).where(NoticeRow.id == delivery.result_id)
    )
    if said_of is None:
        return False
    studies.lock(session, delivery.study_id)
    is_so = studies.load(session, delivery.analysis_id).row_version == said_of
    if is_so or _has_something(session, delivery):
        return False
    _close(session, delivery, DeliveryState.DROPPED, error_code="")
    return True


def is_hindered(session: Session, delivery: ClaimedDelivery) -> bool:
    """Whether it may not go on as things are now: its study is held, or it was taken back (H8)."""
    if delivery.is_rejection:
        return False
    is_held = session.scalar(select(StudyRow.is_held).where(StudyRow.id == delivery.study_id))
    return bool(is_held) or withdrawals.is_withdrawn(
        session, delivery.analysis_id, delivery.result_id
    )


def begin(session: Session, delivery: ClaimedDelivery, sop_instance_uid: str) -> bool:
    """Before an object leaves: whether it may. If so, it is written down that it may arrive.

    Without that a line that breaks before the answer would leave an object in an archive that no
    rejection note names.
    """
    if is_hindered(session, delivery):
        return False
    note(session, delivery, {sop_instance_uid: IN_DOUBT})
    return True


def drop(session: Session, delivery: ClaimedDelivery) -> None:
    """There is nothing to send: a rejection note for a destination that has nothing of it."""
    _close(session, delivery, DeliveryState.DROPPED, error_code="")


def release(
    session: Session, delivery: ClaimedDelivery, answers: Mapping[str, str] | None = None
) -> None:
    """Give a claimed delivery back, as no try: the worker stops, or it may not go on now."""
    note(session, delivery, answers or {})
    if not _was_stopped(session, delivery, ""):
        _wait_again(session, delivery, "", dt.timedelta(0), count=False)


def _was_stopped(session: Session, delivery: ClaimedDelivery, error_code: str) -> bool:
    """End a delivery that was taken back while it was on its way; whether it was."""
    if not withdrawals.is_withdrawn(session, delivery.analysis_id, delivery.result_id):
        return False
    _close(session, delivery, DeliveryState.WITHDRAWN, error_code=error_code)
    return True


def revise(session: Session, delivery: ClaimedDelivery, variant: str) -> ClaimedDelivery:
    """Send another variant of the result, before the destination has any of it."""
    write(session, delivery, variant=variant)
    return replace(delivery, variant=variant)


def expire_next(
    session: Session,
    worker: str,
    *,
    sent_to: Collection[tuple[str, str]] = (),
    since: dt.datetime | None = None,
) -> bool:
    """End a delivery past its time that nobody sends any more; False where there is none.

    Senders end their own. This is for a destination or tenant that left the configuration, and
    for a study that stays held. What another worker holds is left alone, and what was not tried
    yet after a long outage of the node.

    sent_to : tenants and destinations that have a sender
    since : when the senders began
    """
    begun = dt.datetime.max.replace(tzinfo=dt.UTC) if since is None else since
    place = tuple_(DeliveryRow.tenant, DeliveryRow.destination)
    may_end = or_(
        place.not_in(list(sent_to)),
        DeliveryRow.run_after >= begun,  # written at the end of a try
        StudyRow.is_held & (func.greatest(DeliveryRow.expires_at, begun) < func.now() - LONG_HELD),
    )
    is_overdue = and_(
        DeliveryRow.state.in_(OPEN),
        DeliveryRow.expires_at < func.now(),
        or_(DeliveryRow.lease_until.is_(None), DeliveryRow.lease_until < func.now()),
    )
    delivery_id = session.scalar(
        select(DeliveryRow.id)
        .join(StudyRow, StudyRow.id == DeliveryRow.study_id)
        .where(is_overdue, may_end)
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
    _close(session, delivery, DeliveryState.EXPIRED, error_code=error_code)
    _event(session, delivery, "delivery_expired", is_alarm=True, reason_code=error_code)
    settle(session, delivery.analysis_id)
    return True


def _close(
    session: Session,
    delivery: ClaimedDelivery,
    state: DeliveryState,
    *,
    error_code: str,
) -> None:
    write(
        session,
        delivery,
        state=state,
        attempts=DeliveryRow.attempts + 1,
        error_code=error_code,
        lease_until=None,
        finished_at=func.now(),
    )


def _wait_again(
    session: Session,
    delivery: ClaimedDelivery,
    error_code: str,
    wait: dt.timedelta,
    *,
    count: bool = True,
) -> None:
    write(
        session,
        delivery,
        state=DeliveryState.WAITING,
        attempts=DeliveryRow.attempts + int(count),
        error_code=error_code,
        run_after=func.now() + wait,
        worker="",
        lease_until=None,
    )


def _has_something(session: Session, delivery: ClaimedDelivery) -> bool:
    return bool(session.scalar(select(has_something()).where(DeliveryRow.id == delivery.id)))


def _is_overtaken(session: Session, delivery: ClaimedDelivery) -> bool:
    """Whether something newer waits for the same place.

    A result that the destination has nothing of yet is not overtaken by a notice, and a rejection
    note by nothing.
    """
    if delivery.is_rejection:
        return False
    newer = session.scalars(
        select(DeliveryRow.result_id).where(
            DeliveryRow.analysis_id == delivery.analysis_id,
            DeliveryRow.destination == delivery.destination,
            DeliveryRow.id > delivery.id,
            DeliveryRow.state.in_(OPEN),
        )
    ).all()
    ids = [delivery.result_id, *newer]
    notices = set(session.scalars(select(NoticeRow.id).where(NoticeRow.id.in_(ids))))
    if delivery.result_id in notices or _has_something(session, delivery):
        return bool(newer)
    return not notices.issuperset(newer)


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
        **({"what": "rejection note"} if delivery.is_rejection else {}),
        **detail,
    )
