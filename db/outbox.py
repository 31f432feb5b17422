"""The outbox: one row per result and destination, kept until the destination has everything.

Here a result is owed and, at last, settled. Between the two a sender claims each delivery
(`db.claims`) and writes down how its try ended (`db.dispatch`).
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from config.tenants import Destination
from db import studies
from db.study import AnalysisEvent, AnalysisState
from db.tables import DeliveryRow, DestinationRow, ResultRow


class DeliveryState(StrEnum):
    WAITING = "WAITING"
    SENDING = "SENDING"  # claimed under a lease
    DELIVERED = "DELIVERED"
    REFUSED = "REFUSED"  # the destination would not have some of it
    EXPIRED = "EXPIRED"
    DROPPED = "DROPPED"  # a newer result took its place before any of it was sent


OPEN = (DeliveryState.WAITING, DeliveryState.SENDING)


def enqueue(
    session: Session,
    analysis: studies.Analysis,
    result_id: uuid.UUID,
    destinations: Sequence[tuple[Destination, str]],
) -> None:
    """Owe a result to each destination (with its variant); older results that wait are dropped.

    An older result of which a part was sent is finished first: `claims.claim_due` keeps the order.
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
