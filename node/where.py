"""`vigil where`: where is my study? Its timeline, found by whatever the caller has in hand."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from config.settings import Settings
from db import replaced
from db.errors import PermanentError
from db.study import AnalysisState, StudyState
from db.tables import (
    AnalysisRow,
    EventRow,
    InstanceRow,
    ObjectRow,
    QuarantineRow,
    ResultRow,
    StudyRow,
)
from node import issued, set_aside

MAX_STUDIES = 20
#: What an open identity conflict keeps from being built or sent; analysed it is all the same.
HELD_BACK = (AnalysisState.FOUND, AnalysisState.BUILT)
ENDED_WITHOUT_RESULT = (AnalysisState.NOT_ANALYSED, AnalysisState.FAILED)


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
    by_result = select(ObjectRow.study_id).where(
        or_(ObjectRow.sop_instance_uid == wanted, ObjectRow.series_instance_uid == wanted)
    )
    same = [
        StudyRow.study_instance_uid == wanted,
        StudyRow.accession_number == wanted,
        StudyRow.patient_id == wanted,
        StudyRow.id.in_(by_instance),
        StudyRow.id.in_(by_result),
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
    is_held = story["state"] == StudyState.HELD
    for analysis in story["analyses"]:
        waits = is_held and analysis["state"] in HELD_BACK
        held = ", [bold red]held[/] until a person decides" if waits else ""
        console.print(
            f"{analysis['bundle']}: [bold]{analysis['state']}[/]{held}  {_said(analysis)}",
            highlight=False,
        )
        for delivery in analysis["deliveries"]:
            console.print(issued.delivered(delivery), highlight=False)
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
    for alike in _alike(story["quarantine"]):
        entry, n = alike[0], len(alike) - 1
        more = f" and {n} more like it (--json)" if n else ""
        console.print(
            f"[red]quarantined[/] {entry['at'][:19].replace('T', ' ')} {entry['reason']} "
            f"({entry['state'].lower()}) {entry['id']}{more}",
            highlight=False,
        )
    if story.get("kept_out_of"):
        console.print(f"kept out of study {story['kept_out_of']}", highlight=False)
    if story["state"] == "QUARANTINED":
        console.print("No study of it is here; to decide: `vigil quarantine list`.")


def _alike(entries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each reason and decision once, however many images of a study it is about."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        # Of what was replaced each reason names another image.
        reason = "" if entry["code"] == replaced.CODE else entry["reason"]
        found.setdefault((entry["code"], reason, entry["state"]), []).append(entry)
    return list(found.values())


def _said(analysis: dict[str, Any]) -> str:
    """What an analysis came to, in words."""
    result = analysis["result"]
    if analysis["state"] == AnalysisState.WITHDRAWN:
        last = analysis["withdrawals"][-1]
        words = f": {last['words']}" if last["words"] else ""
        return f"{issued.minute(last['at'])} by {last['by']}, {last['reason']}{words}"
    if analysis["state"] in ENDED_WITHOUT_RESULT or result is None:
        return str(analysis["reason"])
    partial = ", PARTIAL" if analysis["is_partial"] else ""
    return f"{result['urgency']}{partial}, result {result['result_no']}"


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
        "withdrawals": issued.withdrawals(session, row),
        "deliveries": issued.deliveries(session, row),
    }
