"""What does not join a study: set aside for an operator, or our own object that came back."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db import studies, withdrawals
from db.files import quarantine_path, same_content
from db.header import InstanceHeader
from db.identity import Described, Trouble
from db.meta import Provenance, SpoolCorrupt
from db.spool import Spooled
from db.tables import DeliveryRow, QuarantineRow, ReturnedRow, StudyRow

_LOOKED_AT = 20  # rows of one UID
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
        if detail["delivered_to"]:
            detail["do"] = f"vigil withdraw {study.public_id}"
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


def keep_out(
    session: Session, data_dir: Path, item: Arrival, trouble: Trouble, study: StudyRow
) -> list[Spooled]:
    """Quarantine what may not join a study; returns it where the same data set lies there already.

    Then that decides: a sender that tries again must not open anew what an operator has discarded
    or replaced.
    """
    if before := _came_before(session, data_dir, item):
        studies.record(
            session,
            "instance_came_again",
            tenant=study.tenant,
            origin=study.origin,
            study_id=study.id,
            instance_id=str(before.id),
            decision=before.state.lower(),
        )
        return [item.spooled]
    said = item.described.header
    quarantine(session, item.spooled, item.source, trouble, uid=item.uid, said=said, study=study)
    return []


def _came_before(session: Session, data_dir: Path, item: Arrival) -> QuarantineRow | None:
    """What is set aside already, undecided or out for good, with the same data set."""
    rows = session.scalars(
        select(QuarantineRow)
        .where(
            QuarantineRow.tenant == item.source.tenant,
            QuarantineRow.origin == item.source.origin,
            QuarantineRow.study_instance_uid == item.described.header.study_instance_uid,
            QuarantineRow.sop_instance_uid == item.uid,
            QuarantineRow.state != "RELEASED",
        )
        .order_by(QuarantineRow.at.desc())
        .limit(_LOOKED_AT)
    )
    for row in rows:
        path = quarantine_path(data_dir, row.tenant, row.id)
        with suppress(SpoolCorrupt):
            if path.exists() and same_content(path, item.spooled.path):
                return row
    return None


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
    """Where anything of a result of this study is, or may be: the alarm names it.

    Whatever became of the rest, which may be refused or on its way; not what was withdrawn.
    """
    rows = session.execute(
        select(DeliveryRow.destination, DeliveryRow.result_id).where(
            DeliveryRow.study_id == study.id, withdrawals.is_out()
        )
    )
    return sorted({f"{destination}: result {result_id}" for destination, result_id in rows})
