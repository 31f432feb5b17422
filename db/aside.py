"""What does not join a study: set aside for an operator, or our own object that came back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db import answers, studies
from db.header import InstanceHeader
from db.identity import Described, Trouble
from db.meta import Provenance
from db.outbox import DeliveryState
from db.spool import Spooled
from db.tables import DeliveryRow, QuarantineRow, ReturnedRow, StudyRow

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Arrival:
    """A spooled instance that could be read."""

    spooled: Spooled
    source: Provenance
    described: Described
    size_bytes: int

    @property
    def uid(self) -> str:
        return self.described.header.sop_instance_uid


def quarantine(
    session: Session,
    item: Spooled,
    source: Provenance,
    trouble: Trouble,
    *,
    uid: str = "",
    said: InstanceHeader | None = None,
    study: StudyRow | None = None,
) -> None:
    """Set an instance aside until an operator decides; a conflict holds the study.

    uid : its SOP Instance UID, as far as it is known
    said : what it says of itself, which need not be true
    """
    session.add(
        QuarantineRow(
            id=item.id,
            tenant=source.tenant,
            origin=source.origin,
            study_id=study.id if study else None,
            code=trouble.code,
            reason=trouble.reason,
            is_conflict=trouble.is_conflict,
            sop_instance_uid=uid,
            study_instance_uid=said.study_instance_uid if said else "",
            series_instance_uid=said.series_instance_uid if said else "",
            sender=source.calling_ae,
            size_bytes=item.path.stat().st_size,
        )
    )
    detail: dict[str, Any] = {"code": trouble.code, "instance_id": str(item.id)}
    if study is not None and trouble.is_conflict:
        detail["delivered_to"] = _delivered_to(session, study)
        study.is_held = True
        study.row_version += 1
        studies.refresh_state(session, study.id)
    studies.record(
        session,
        "instance_quarantined",
        tenant=source.tenant,
        origin=source.origin,
        study_id=study.id if study else None,
        is_alarm=trouble.is_conflict,
        **detail,
    )
    log.warning("instance_quarantined", reason_code=trouble.code, instance_id=str(item.id))


def file_returned(session: Session, arrivals: Sequence[Arrival]) -> list[Spooled]:
    """Count our own objects that came back; returns those whose file is here already."""
    again: list[Spooled] = []
    for item in arrivals:
        kept = session.scalar(
            insert(ReturnedRow)
            .values(
                id=item.spooled.id,
                tenant=item.source.tenant,
                sop_instance_uid=item.uid,
                sender=item.source.calling_ae,
            )
            .on_conflict_do_update(
                index_elements=["tenant", "sop_instance_uid"],
                set_={"n": ReturnedRow.n + 1, "at": func.now()},
            )
            .returning(ReturnedRow.id)
        )
        if kept != item.spooled.id:
            again.append(item.spooled)
    return again


def _delivered_to(session: Session, study: StudyRow) -> list[str]:
    """Where anything of a result of this study is already: the alarm names it."""
    rows = session.execute(
        select(DeliveryRow.destination, DeliveryRow.result_id).where(
            DeliveryRow.study_id == study.id,
            # Whatever became of the rest: it may be refused, or still be on its way.
            or_(DeliveryRow.state == DeliveryState.DELIVERED, answers.has_something()),
        )
    )
    return sorted({f"{destination}: result {result_id}" for destination, result_id in rows})
