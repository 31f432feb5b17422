"""`vigil where`: where is my study? Its timeline, found by whatever the caller has in hand."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from config.settings import Settings
from db.errors import PermanentError
from db.outbox import DeliveryState
from db.study import AnalysisState
from db.tables import (
    AnalysisRow,
    DeliveryRow,
    DestinationRow,
    EventRow,
    InstanceRow,
    NoticeRow,
    QuarantineRow,
    ResultRow,
    StudyRow,
    WithdrawalRow,
)
from node import set_aside

MAX_STUDIES = 20
ENDED_WITHOUT_RESULT = (AnalysisState.NOT_ANALYSED, AnalysisState.FAILED)
NOTE = "rejection note"


class UnknownStudy(PermanentError):
    """Nothing here goes by that name."""

    code = "unknown_study"


class UnknownTenant(PermanentError):
    """The configuration has no such tenant."""

    code = "unknown_tenant"


class AmbiguousStudy(PermanentError):
    """Several studies go by that name, where one is meant."""

    code = "ambiguous_study"


def search(
    session: Session, settings: Settings, text: str, tenant: str = ""
) -> list[dict[str, Any]]:
    """The stories of all that goes by that name, in the quarantine too.

    Raises
    ------
    UnknownStudy
        If there is nothing.
    PermanentError
        If there is no such tenant.
    """
    rows = _matching(session, text, tenant)
    told = [story(session, study) for study in rows]
    wanted = text.strip()
    told += set_aside.stories(session, settings, wanted, tenant, beside={row.id for row in rows})
    if not told and tenant and settings.tenant(tenant) is None:
        # Only then: one that has left the configuration still has studies.
        known = ", ".join(one.id for one in settings.tenants)
        raise UnknownTenant(f"no tenant {tenant!r} in the configuration; there are: {known}")
    if not told:
        raise _unknown()
    return told


def find(session: Session, text: str, tenant: str = "") -> Sequence[StudyRow]:
    """Studies by accession number, patient ID, any UID of theirs, or page id; newest first.

    Raises
    ------
    UnknownStudy
        If there is none.
    """
    found = _matching(session, text, tenant)
    if not found:
        raise _unknown()
    return found


def _unknown() -> UnknownStudy:
    return UnknownStudy(
        "nothing that was received goes by that name; see `vigil status` for senders"
    )


def _matching(session: Session, text: str, tenant: str) -> Sequence[StudyRow]:
    wanted = text.strip()
    by_instance = select(InstanceRow.study_id).where(
        or_(InstanceRow.sop_instance_uid == wanted, InstanceRow.series_instance_uid == wanted)
    )
    same = [
        StudyRow.study_instance_uid == wanted,
        StudyRow.accession_number == wanted,
        StudyRow.patient_id == wanted,
        StudyRow.id.in_(by_instance),
    ]
    if public := set_aside.uuid_of(wanted):
        same.append(StudyRow.public_id == public)
    query = select(StudyRow).where(or_(*same)).order_by(StudyRow.id.desc()).limit(MAX_STUDIES)
    return session.scalars(query.where(StudyRow.tenant == tenant) if tenant else query).all()


def find_one(session: Session, text: str, tenant: str = "") -> StudyRow:
    """As `find`, when exactly one study is meant.

    Raises
    ------
    UnknownStudy
        If there is none.
    AmbiguousStudy
        If there is more than one.
    """
    found = find(session, text, tenant)
    if len(found) > 1:
        each = "".join(f"\n  --tenant {one.tenant}  {one.public_id}" for one in found)
        raise AmbiguousStudy(
            f"{len(found)} studies go by that name: give one's id, or --tenant{each}"
        )
    return found[0]


def analyses(session: Session, study: StudyRow) -> Sequence[AnalysisRow]:
    return session.scalars(
        select(AnalysisRow).where(AnalysisRow.study_id == study.id).order_by(AnalysisRow.id)
    ).all()


def story(session: Session, study: StudyRow) -> dict[str, Any]:
    """Everything that is known of a study's way, as one JSON document."""
    events = session.scalars(
        select(EventRow).where(EventRow.study_id == study.id).order_by(EventRow.id)
    )
    quarantined = session.scalars(select(QuarantineRow).where(QuarantineRow.study_id == study.id))
    return {
        "study": str(study.public_id),
        "tenant": study.tenant,
        "origin": study.origin,
        "study_instance_uid": study.study_instance_uid,
        "accession_number": study.accession_number,
        "patient_id": study.patient_id,
        "state": study.state,
        "instances": study.n_instances,
        "sender": study.sender,
        "first_received": study.created_at.isoformat(),
        "last_received": study.last_instance_at.isoformat(),
        "analyses": [_analysis(session, row) for row in analyses(session, study)],
        "events": [
            {"at": e.at.isoformat(), "event": e.kind, "is_alarm": e.is_alarm, **e.detail}
            for e in events
        ],
        "quarantine": [set_aside.entry(row) for row in quarantined],
    }


def show(stories: Sequence[dict[str, Any]], console: Console) -> None:
    """The same, for a terminal."""
    for number, one in enumerate(stories):
        if number:
            console.rule()
        _show(one, console)


def _show(story: dict[str, Any], console: Console) -> None:
    console.print(
        f"[bold]{story['state']}[/]  {story['tenant']}  "
        f"accession {story['accession_number'] or '-'}  "
        f"{story['instances']} instances from {story['sender'] or story['origin']}",
        highlight=False,
    )
    console.print(f"study {story['study_instance_uid'] or '-'}", highlight=False)
    for analysis in story["analyses"]:
        console.print(
            f"{analysis['bundle']}: [bold]{analysis['state']}[/]  {_said(analysis)}",
            highlight=False,
        )
        for delivery in analysis["deliveries"]:
            console.print(_delivered(delivery), highlight=False)
    table = Table("when (UTC)", "what", Column("detail", overflow="fold"), box=None, pad_edge=False)
    for event in story["events"]:
        rest = {k: v for k, v in event.items() if k not in ("at", "event", "is_alarm")}
        colour = "red" if event["is_alarm"] else "default"
        detail = "  ".join(
            f"{key}={value}" for key, value in rest.items() if value not in ("", None)
        )
        table.add_row(event["at"][:19].replace("T", " "), f"[{colour}]{event['event']}[/]", detail)
    if story["events"]:
        console.print(table)
    for entry in story["quarantine"]:
        console.print(
            f"[red]quarantined[/] {entry['at'][:19].replace('T', ' ')} {entry['reason']} "
            f"({entry['state'].lower()}) {entry['id']}",
            highlight=False,
        )
    if story.get("kept_out_of"):
        console.print(f"kept out of study {story['kept_out_of']}", highlight=False)
    if story["state"] == "QUARANTINED":
        console.print("No study of it is here; to decide: `vigil quarantine list`.")


def _said(analysis: dict[str, Any]) -> str:
    """What an analysis came to, in words."""
    result = analysis["result"]
    if analysis["state"] == AnalysisState.WITHDRAWN:
        last = analysis["withdrawals"][-1]
        words = f": {last['words']}" if last["words"] else ""
        return f"{_minute(last['at'])} by {last['by']}, {last['reason']}{words}"
    if analysis["state"] in ENDED_WITHOUT_RESULT or result is None:
        return str(analysis["reason"])
    partial = ", PARTIAL" if analysis["is_partial"] else ""
    return f"{result['urgency']}{partial}, result {result['result_no']}"


def _delivered(delivery: dict[str, Any]) -> str:
    what = f"{delivery['what']} {delivery['result_no']}"
    words = f"  {what} to {delivery['destination']}: {delivery['state']}"
    if delivery["finished_at"]:
        words += f" {_minute(delivery['finished_at'])}"
    words += f", {len(delivery['statuses'])} objects, {delivery['attempts']} tries"
    if delivery["error"]:
        words += f", [red]{delivery['error']}[/]"
    return words + (f"; {delivery['waits_for']}" if delivery["waits_for"] else "")


def _minute(at: str) -> str:
    return at[:16].replace("T", " ")


def _analysis(session: Session, row: AnalysisRow) -> dict[str, Any]:
    result = session.scalar(
        select(ResultRow).where(
            ResultRow.analysis_id == row.id, ResultRow.result_no == row.result_no
        )
    )
    return {
        "bundle": row.bundle,
        "is_shadow": row.is_shadow,
        "state": row.state,
        "reason_code": row.reason_code,
        "reason": row.reason,
        "is_applicable": row.is_applicable,
        "is_partial": row.is_partial,
        "result": result
        and {
            "result_no": result.result_no,
            "is_positive": result.is_positive,
            "urgency": result.urgency,
            "probability": result.probability,
            "at": result.at.isoformat(),
        },
        "withdrawals": _withdrawals(session, row),
        "deliveries": _deliveries(session, row),
    }


def _withdrawals(session: Session, row: AnalysisRow) -> list[dict[str, Any]]:
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


def _deliveries(session: Session, row: AnalysisRow) -> list[dict[str, Any]]:
    """What went to whom, in order; what waits, and for what."""
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
            "attempts": d.attempts,
            "error": d.error_code,
            "statuses": d.statuses,
            "finished_at": d.finished_at and d.finished_at.isoformat(),
            "waits_for": (
                _waits_for(d, to, study, is_note=withdrawn_no is not None)
                if d.state == DeliveryState.WAITING
                else ""
            ),
        }
        for d, result_no, notice_no, withdrawn_no, to, study in session.execute(query)
    ]


def _waits_for(
    delivery: DeliveryRow, to: DestinationRow | None, study: StudyRow, *, is_note: bool
) -> str:
    if study.is_held and not is_note:
        return "held: an identity conflict is open"
    next_at = max(delivery.run_after, to.retry_at) if to else delivery.run_after
    if next_at <= dt.datetime.now(dt.UTC):
        return ""
    why = f" ({to.last_error})" if to and to.failures and to.last_error else ""
    return f"next try {_minute(next_at.isoformat())} UTC{why}"
