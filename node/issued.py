"""What was issued of an analysis and what became of it, for `vigil where`."""

import datetime as dt
from typing import Any

from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from db.commitment import COMMITMENT_WORDS
from db.outbox import DeliveryState
from db.tables import (
    AnalysisRow,
    CommitmentRow,
    DeliveryRow,
    DestinationRow,
    NoticeRow,
    ResultRow,
    StudyRow,
    WithdrawalRow,
)

NOTE = "rejection note"


def withdrawals(session: Session, row: AnalysisRow) -> list[dict[str, Any]]:
    """What was taken back, oldest first; each takes back all results before it."""
    rows = session.scalars(
        select(WithdrawalRow)
        .where(WithdrawalRow.analysis_id == row.id)
        .order_by(WithdrawalRow.result_no)
    )
    return [
        {
            "result_no": one.result_no,
            "at": one.at.isoformat(),
            "by": one.actor,
            "reason": one.withdrawal["reason"],
            "words": one.withdrawal["words"],
        }
        for one in rows
    ]


def deliveries(session: Session, row: AnalysisRow) -> list[dict[str, Any]]:
    """What went to whom, in order; what waits, and for what."""
    taken_back = max((one["result_no"] for one in withdrawals(session, row)), default=0)
    query = (
        select(
            DeliveryRow,
            ResultRow.result_no,
            NoticeRow.result_no,
            WithdrawalRow.result_no,
            DestinationRow,
            StudyRow,
        )
        .join(StudyRow, StudyRow.id == DeliveryRow.study_id)
        .outerjoin(ResultRow, ResultRow.id == DeliveryRow.result_id)
        .outerjoin(NoticeRow, NoticeRow.id == DeliveryRow.result_id)
        .outerjoin(WithdrawalRow, WithdrawalRow.id == DeliveryRow.result_id)
        .outerjoin(
            DestinationRow,
            and_(
                DestinationRow.tenant == DeliveryRow.tenant,
                DestinationRow.name == DeliveryRow.destination,
            ),
        )
        .where(DeliveryRow.analysis_id == row.id)
        .order_by(DeliveryRow.id)
    )
    return [
        {
            "what": "result" if result_no else "notice" if notice_no else NOTE,
            "result_no": result_no or notice_no or withdrawn_no,
            "destination": d.destination,
            "state": d.state,
            "is_withdrawn": bool((number := result_no or notice_no) and number < taken_back),
            "attempts": d.attempts,
            "error": d.error_code,
            "statuses": d.statuses,
            "finished_at": d.finished_at and d.finished_at.isoformat(),
            "commitment": _commitment(session, d),
            "waits_for": (
                _waits_for(d, to, study, is_note=withdrawn_no is not None)
                if d.state == DeliveryState.WAITING
                else ""
            ),
        }
        for d, result_no, notice_no, withdrawn_no, to, study in session.execute(query)
    ]


def _commitment(session: Session, delivery: DeliveryRow) -> dict[str, Any] | None:
    """What the destination says of keeping it; None where it was never to be asked."""
    row = session.scalar(
        select(CommitmentRow)
        .where(CommitmentRow.delivery_id == delivery.id)
        .order_by(CommitmentRow.id.desc())
        .limit(1)
    )
    if row is None:
        return None
    return {
        "state": row.state,
        "objects": len(row.items),
        "failed": row.failed,
        "error": row.error_code,
        "transaction_uid": row.transaction_uid,
        "asked_at": row.asked_at and row.asked_at.isoformat(),
        "finished_at": row.finished_at and row.finished_at.isoformat(),
    }


def _waits_for(
    delivery: DeliveryRow, to: DestinationRow | None, study: StudyRow, *, is_note: bool
) -> str:
    if study.is_held and not is_note:
        return "held: an identity conflict is open"
    next_at = max(delivery.run_after, to.retry_at) if to else delivery.run_after
    if next_at <= dt.datetime.now(dt.UTC):
        return ""
    why = f" ({to.last_error})" if to and to.failures and to.last_error else ""
    return f"next try {minute(next_at.isoformat())} UTC{why}"


def delivered(delivery: dict[str, Any]) -> str:
    what = f"{delivery['what']} {delivery['result_no']}"
    words = f"  {what} to {delivery['destination']}: {delivery['state']}"
    if delivery["is_withdrawn"] and delivery["state"] != DeliveryState.WITHDRAWN:
        words += ", [red]withdrawn[/]"
    if delivery["finished_at"]:
        words += f" {minute(delivery['finished_at'])}"
    words += f", {len(delivery['statuses'])} objects, {delivery['attempts']} tries"
    if delivery["error"]:
        words += f", [red]{delivery['error']}[/]"
    if delivery["commitment"]:
        words += f", {_committed(delivery['commitment'])}"
    return words + (f"; {delivery['waits_for']}" if delivery["waits_for"] else "")


def _committed(commitment: dict[str, Any]) -> str:
    words = COMMITMENT_WORDS[commitment["state"]]
    if commitment["failed"]:
        words += f" for {len(commitment['failed'])} of {commitment['objects']} objects"
    if commitment["error"]:
        words += f" [red]{commitment['error']}[/]"
    return words + (f" {minute(at)}" if (at := commitment["finished_at"]) else "")


def minute(at: str) -> str:
    return at[:16].replace("T", " ")
