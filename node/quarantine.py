"""What was set aside, and the operator's decision: `vigil quarantine`."""

import getpass
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import select
from sqlalchemy.orm import Session

from config.settings import load
from db import operator
from db.tables import QuarantineRow, StudyRow
from node.database import opened


def entries(config: Path | None) -> list[dict[str, Any]]:
    """Everything that is open, oldest first."""
    with opened(load(config)) as engine, Session(engine) as session:
        rows = session.execute(
            select(QuarantineRow, StudyRow.study_instance_uid)
            .outerjoin(StudyRow, StudyRow.id == QuarantineRow.study_id)
            .where(QuarantineRow.state == "OPEN")
            .order_by(QuarantineRow.at)
        ).all()
        return [
            {
                "id": str(row.id),
                "tenant": row.tenant,
                "at": row.at.isoformat(timespec="seconds"),
                "code": row.code,
                "reason": row.reason,
                "holds_study": study_uid if row.is_conflict else None,
                "study_instance_uid": study_uid,
                "sop_instance_uid": row.sop_instance_uid,
                "sender": row.sender,
                "size_bytes": row.size_bytes,
            }
            for row, study_uid in rows
        ]


def discard(entry: str, config: Path | None) -> str:
    """The first stays, the newcomer is out; says what was done."""
    try:
        quarantined = uuid.UUID(entry)
    except ValueError:
        raise operator.NotOpen(f"{entry!r} is no id of the quarantine") from None
    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        operator.discard(session, quarantined, actor=f"cli:{getpass.getuser()}")
    return f"{quarantined}: discarded; a study that was held for nothing else goes on"


def show(found: list[dict[str, Any]], console: Console) -> None:
    if not found:
        console.print("Nothing is in the quarantine.")
        return
    table = Table("id", "tenant", "since (UTC)", "why", "holds", "from", title="Quarantine")
    for entry in found:
        holds = "its study" if entry["holds_study"] else "-"
        table.add_row(
            entry["id"], entry["tenant"], entry["at"][:19], entry["reason"], holds, entry["sender"]
        )
    console.print(table)
    console.print("`vigil quarantine discard ID`: it stays out, and its study goes on.")
