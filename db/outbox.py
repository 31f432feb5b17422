"""The outbox: one row per result and destination, kept until the destination has everything.

Here a result is owed and, at last, settled. Between the two a sender claims each delivery
(`db.claims`) and writes down how its try ended (`db.dispatch`).
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import exists, func, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from config.tenants import Destination
from db import studies
from db.answers import has_something
from db.study import AnalysisEvent, AnalysisState
from db.tables import DeliveryRow, DestinationRow, NoticeRow, ResultRow, WithdrawalRow


class DeliveryState(StrEnum):
    WAITING = "WAITING"
    SENDING = "SENDING"  # claimed under a lease
    DELIVERED = "DELIVERED"
    REFUSED = "REFUSED"  # the destination would not have some of it
    EXPIRED = "EXPIRED"
    DROPPED = "DROPPED"  # a newer result took its place before any of it was sent
    WITHDRAWN = "WITHDRAWN"  # an operator took it back before all of it was sent


OPEN = (DeliveryState.WAITING, DeliveryState.SENDING)


def enqueue(
    session: Session,
    analysis: studies.Analysis,
    result_id: uuid.UUID,
    destinations: Sequence[tuple[Destination, str]],
) -> None:
    """Owe a result or a notice to each destination (with its variant); what waits makes way."""
    studies.lock(session, analysis.study_id)
    _make_way(session, analysis, result_id, [destination.name for destination, _ in destinations])
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


def _make_way(
    session: Session, analysis: studies.Analysis, result_id: uuid.UUID, destinations: Sequence[str]
) -> None:
    """End what waits there and is older; of which a part was sent is finished first.

    `claims.claim_due` keeps the order. What was refused in part is not waited for: that may take
    most of a day. A notice takes no result's place: a finding must not be lost to a page that
    there is none. Nor does anything take a rejection note's place.
    """
    notices = select(NoticeRow.id).where(NoticeRow.analysis_id == analysis.id)
    older = (
        DeliveryRow.analysis_id == analysis.id,
        DeliveryRow.destination.in_(destinations),
        DeliveryRow.result_id != result_id,
        DeliveryRow.state == DeliveryState.WAITING,
        ~exists().where(WithdrawalRow.id == DeliveryRow.result_id),
    )
    refused = session.execute(
        update(DeliveryRow)
        .where(*older, has_something(), DeliveryRow.refusals > 0)
        .values(state=DeliveryState.REFUSED, finished_at=func.now())
        .returning(DeliveryRow.destination, DeliveryRow.error_code)
    )
    for destination, error_code in refused.all():
        studies.record(
            session,
            "delivery_refused",
            tenant=analysis.tenant,
            origin=analysis.origin,
            study_id=analysis.study_id,
            analysis_id=analysis.id,
            is_alarm=True,
            destination=destination,
            reason_code=error_code,
        )
    is_notice = session.get(NoticeRow, result_id) is not None
    session.execute(
        update(DeliveryRow)
        .where(
            *older, ~has_something(), DeliveryRow.result_id.in_(notices) if is_notice else true()
        )
        .values(state=DeliveryState.DROPPED, finished_at=func.now())
    )


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
    # Without its row nobody can say what it was: that is no success.
    whole = result_id is not None and states <= {DeliveryState.DELIVERED, DeliveryState.DROPPED}
    event = AnalysisEvent.ALL_ACCEPTED if whole else AnalysisEvent.SOME_REFUSED
    studies.move(session, analysis, event)
