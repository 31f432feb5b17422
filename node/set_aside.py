"""Searching the quarantine: what never joined a study is known by its record, and by its header."""

import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from config.settings import Settings
from db.describe import describe
from db.errors import CutOff, NodeError
from db.files import quarantine_path
from db.sandbox import Sandbox
from db.tables import QuarantineRow, StudyRow

#: Headers read for one question; a record holds neither patient nor accession number.
MAX_READ = 500
_READ_S = 10.0
_DEADLY = "kills_reader"  # it has cost two children already


def stories(
    session: Session, settings: Settings, wanted: str, tenant: str, *, beside: Collection[int]
) -> list[dict[str, Any]]:
    """What goes by that name in the quarantine, a story for each study it says to be of.

    beside : ids of studies that are told of anyhow, with what was kept out of them
    """
    query = select(QuarantineRow).order_by(QuarantineRow.at.desc())
    query = query.where(or_(QuarantineRow.study_id.is_(None), ~QuarantineRow.study_id.in_(beside)))
    if tenant:
        query = query.where(QuarantineRow.tenant == tenant)
    by_record = [
        QuarantineRow.sop_instance_uid == wanted,
        QuarantineRow.study_instance_uid == wanted,
        QuarantineRow.series_instance_uid == wanted,
    ]
    if key := uuid_of(wanted):
        by_record.append(QuarantineRow.id == key)
    known = session.scalars(query.where(or_(*by_record)).limit(MAX_READ)).all()
    is_open = QuarantineRow.state == "OPEN"
    waiting = session.scalars(query.where(is_open).limit(MAX_READ)).all()
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    rows = [*known, *(row for row in waiting if row not in known)]
    for row, header in _headers(settings, rows):
        if row in known or wanted in header.values():
            _add(session, found, row, header)
    return list(found.values())


def entry(row: QuarantineRow) -> dict[str, Any]:
    return {
        "id": str(row.id),
        "at": row.at.isoformat(),
        "state": row.state,
        "code": row.code,
        "reason": row.reason,
        "sop_instance_uid": row.sop_instance_uid,
    }


def uuid_of(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def _headers(
    settings: Settings, rows: Sequence[QuarantineRow]
) -> Iterator[tuple[QuarantineRow, dict[str, str]]]:
    """Each row with what its file says of itself; nothing where that cannot be read."""
    if not rows:
        return
    with Sandbox(size=1) as sandbox:  # untrusted bytes: that is why it is here
        for row in rows:
            yield row, _header(sandbox, settings, row)


def _header(sandbox: Sandbox, settings: Settings, row: QuarantineRow) -> dict[str, str]:
    path = quarantine_path(settings.node.data_dir, row.tenant, row.id)
    if row.code == _DEADLY or not path.exists():
        return {}
    try:
        is_cut = row.code == CutOff.code
        value, _ = sandbox.run(describe, str(path.resolve()), is_cut, timeout_s=_READ_S)
    except NodeError:
        return {}
    header, patient = value["header"], value["patient"]
    uids = ("study_instance_uid", "series_instance_uid", "sop_instance_uid")
    return {
        **{name: str(header[name]) for name in uids},
        **{name: str(patient[name]) for name in ("patient_id", "accession_number")},
    }


def _add(
    session: Session,
    found: dict[tuple[str, str, str], dict[str, Any]],
    row: QuarantineRow,
    header: dict[str, str],
) -> None:
    header = {"study_instance_uid": row.study_instance_uid, **header}
    uid = header["study_instance_uid"]
    key = (row.tenant, row.origin, uid or str(row.id))
    kept_out_of = session.get(StudyRow, row.study_id) if row.study_id else None
    told = found.setdefault(key, _story(row, header, kept_out_of))
    told["instances"] += 1
    told["first_received"] = min(told["first_received"], row.at.isoformat())
    told["quarantine"].append(entry(row))


def _story(
    row: QuarantineRow, header: dict[str, str], kept_out_of: StudyRow | None
) -> dict[str, Any]:
    """In the words of a study's story (node/where.py), of which there is none."""
    return {
        "study": None,
        "kept_out_of": str(kept_out_of.public_id) if kept_out_of else None,
        "tenant": row.tenant,
        "origin": row.origin,
        "study_instance_uid": header.get("study_instance_uid", ""),
        "accession_number": header.get("accession_number", ""),
        "patient_id": header.get("patient_id", ""),
        "state": "QUARANTINED",
        "instances": 0,
        "sender": row.sender,
        "first_received": row.at.isoformat(),
        "last_received": row.at.isoformat(),
        "analyses": [],
        "events": [],
        "quarantine": [],
    }
