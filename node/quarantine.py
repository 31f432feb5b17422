"""What was set aside, and the operator's decision: `vigil quarantine`."""

import getpass
import json
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import select
from sqlalchemy.orm import Session

from config.settings import Settings, load
from db import operator, withdrawals
from db.describe import describe
from db.errors import NodeError
from db.files import quarantine_path, store_path
from db.filing import patient_of
from db.identity import Described, Difference, header_differences, patient_differences
from db.release import Release, Released
from db.release_rules import RELEASABLE, outlook
from db.sandbox import Sandbox
from db.tables import DeliveryRow, InstanceRow, QuarantineRow, StudyRow
from node.database import opened
from node.where import find_one

#: Files read for one list; beyond that differences are told by name, not by value.
MAX_READ = 500
_READ_S = 10.0


def entries(config: Path | None) -> list[dict[str, Any]]:
    """Everything that is open, oldest first, with what differs: for a person, never for a log."""
    settings = load(config)
    with (
        opened(settings) as engine,
        Session(engine) as session,
        Sandbox(size=1) as sandbox,  # untrusted bytes are read
    ):
        rows = session.execute(
            select(QuarantineRow, StudyRow)
            .outerjoin(StudyRow, StudyRow.id == QuarantineRow.study_id)
            .where(QuarantineRow.state == "OPEN")
            .order_by(QuarantineRow.at)
        ).all()
        reader = _Reader(settings, sandbox)
        return [_entry(session, reader, row, study) for row, study in rows]


def _entry(
    session: Session, reader: "_Reader", row: QuarantineRow, study: StudyRow | None
) -> dict[str, Any]:
    newcomer = reader.of(quarantine_path(reader.data_dir, row.tenant, row.id), row.code)
    return {
        "id": str(row.id),
        "tenant": row.tenant,
        "at": row.at.isoformat(timespec="seconds"),
        "code": row.code,
        "reason": row.reason,
        "differs": [
            {"what": one.what, "first": one.first, "newcomer": one.newcomer}
            for one in _differences(session, reader, row, study, newcomer)
        ],
        "release": outlook(row.code),
        "holds_study": study.study_instance_uid if study and row.is_conflict else None,
        "study": str(study.public_id) if study else None,
        "study_instance_uid": study.study_instance_uid if study else row.study_instance_uid,
        "study_instances": study.n_instances if study else None,
        "accession_number": _accession_number(study, newcomer),
        "results_out": _results_out(session, study) if study and row.is_conflict else [],
        "series_instance_uid": row.series_instance_uid,
        "sop_instance_uid": row.sop_instance_uid,
        "sender": row.sender,
        "size_bytes": row.size_bytes,
    }


class _Reader:
    """What files say of themselves; nothing where that cannot be told."""

    def __init__(self, settings: Settings, sandbox: Sandbox) -> None:
        self.data_dir, self._sandbox = settings.node.data_dir, sandbox
        self._left = MAX_READ

    def of(self, path: Path, code: str) -> Described | None:
        if code not in RELEASABLE or self._left <= 0 or not path.exists():
            return None
        self._left -= 1
        try:
            value, _ = self._sandbox.run(describe, str(path.resolve()), timeout_s=_READ_S)
        except NodeError:
            return None
        return Described.from_json(value)


def _differences(
    session: Session,
    reader: _Reader,
    row: QuarantineRow,
    study: StudyRow | None,
    newcomer: Described | None,
) -> list[Difference]:
    """From the instance whose UID it has; where there is none, from its study's patient."""
    if newcomer is None or study is None:
        return []
    first = session.scalar(
        select(InstanceRow).where(
            InstanceRow.tenant == row.tenant,
            InstanceRow.origin == row.origin,
            InstanceRow.sop_instance_uid == row.sop_instance_uid,
        )
    )
    if first is None:
        return patient_differences(patient_of(study), newcomer.patient)
    path = store_path(reader.data_dir, first.tenant, first.study_id, first.id)
    present = reader.of(path, row.code)
    if present is None:
        return []
    found = patient_differences(present.patient, newcomer.patient)
    found += header_differences(present.header, newcomer.header)
    if present.pixel_sha256 != newcomer.pixel_sha256:
        digests = present.pixel_sha256[:12], newcomer.pixel_sha256[:12]
        found.append(Difference("pixel data (SHA-256)", *digests))
    return found


def _accession_number(study: StudyRow | None, newcomer: Described | None) -> str:
    if study is not None:
        return study.accession_number
    return newcomer.patient["accession_number"] if newcomer else ""


def _results_out(session: Session, study: StudyRow) -> list[str]:
    """Destinations that may have something of the study's results."""
    found = session.scalars(
        select(DeliveryRow.destination)
        .where(DeliveryRow.study_id == study.id, withdrawals.is_out())
        .distinct()
    )
    return sorted(found)


def discard(key: uuid.UUID, config: Path | None) -> dict[str, Any]:
    """The first stays, the newcomer is out; says what was done."""
    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        operator.discard(session, key, actor=_actor())
        row = session.get_one(QuarantineRow, key)
        study = session.get(StudyRow, row.study_id) if row.study_id else None
        return {
            "action": "discarded",
            "id": str(key),
            "study": str(study.public_id) if study else None,
            "is_held": study.is_held if study else None,
        }


def discard_study(name: str, tenant: str, config: Path | None) -> dict[str, Any]:
    """All that is set aside beside a study is wrong, and out; says how much it was.

    Raises
    ------
    NotOpen
        If nothing is open there.
    """
    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        study = find_one(session, name, tenant)
        keys = session.scalars(
            select(QuarantineRow.id)
            .where(QuarantineRow.study_id == study.id, QuarantineRow.state == "OPEN")
            .order_by(QuarantineRow.at, QuarantineRow.id)
        ).all()
        if not keys:
            raise operator.NotOpen("nothing is set aside beside this study that is undecided")
        for key in keys:
            operator.discard(session, key, actor=_actor())
        session.refresh(study)
        return {
            "action": "discarded",
            "ids": [str(key) for key in keys],
            "study": str(study.public_id),
            "is_held": study.is_held,
        }


def release(key: uuid.UUID, config: Path | None) -> dict[str, Any]:
    """The newcomer is right: it joins its study, or takes a place there."""
    settings = load(config)
    with opened(settings) as engine, Sandbox(size=1) as sandbox:
        return _document(Release(engine, settings, sandbox, _actor()).one(key))


def release_study(name: str, tenant: str, config: Path | None) -> dict[str, Any]:
    """All that contradicts a study is right: a correction of the whole study."""
    settings = load(config)
    with opened(settings) as engine, Sandbox(size=1) as sandbox:
        with Session(engine) as session:
            study_id = find_one(session, name, tenant).id
        return _document(Release(engine, settings, sandbox, _actor()).study(study_id))


def _actor() -> str:
    return f"cli:{getpass.getuser()}"


def _document(done: Released) -> dict[str, Any]:
    return {
        "action": "released",
        "study": done.study,
        "released": list(done.released),
        "replaced": list(done.replaced),
        "is_other_patient": done.is_other_patient,
        "is_held": done.is_held,
    }


def show_decision(document: Mapping[str, Any], console: Console) -> None:
    keys = document.get("released") or document.get("ids") or [document["id"]]
    for key in keys:
        console.print(f"{key}: {document['action']}", soft_wrap=True)
    for key in document.get("replaced", ()):
        console.print(f"{key}: set aside in its place", soft_wrap=True)
    if document.get("is_other_patient"):
        console.print("The study has the corrected patient now, and is analysed again.")
    if document["study"] and document["is_held"]:
        console.print(f"study {document['study']}: still held, another conflict is open")
    elif document["study"]:
        console.print(f"study {document['study']}: not held")


def show(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A paragraph each: a table would cut the ids on a narrow terminal."""
    if not found:
        console.print("Nothing is in the quarantine.")
        return
    for alike in _alike(found):
        _show(alike[0], console)
        for entry in alike[1:]:
            _say(console, f"{entry['id']}  likewise, instance {entry['sop_instance_uid']}")
        if len(alike) > 1 and alike[0]["study"]:
            n_all = alike[0]["study_instances"]
            _say(console, f"  {len(alike)} alike; its study has {n_all} instances")
        console.print()
    console.print("`vigil quarantine discard ID`: it stays out, and its study goes on.")
    console.print("`vigil quarantine release ID`: it is right, and goes where it says it belongs.")
    console.print("`vigil quarantine release --study STUDY`: so is all that contradicts a study.")


def _show(entry: Mapping[str, Any], console: Console) -> None:
    say = partial(_say, console)
    say(entry["id"], "bold")
    say(f"  {entry['at'][:19].replace('T', ' ')} UTC  tenant {entry['tenant']}  {entry['sender']}")
    say(f"  {entry['reason']}", "red" if entry["holds_study"] else "")
    accession = f"  accession {entry['accession_number']}" if entry["accession_number"] else ""
    held = "  held" if entry["holds_study"] else ""
    say(f"  study     {entry['study_instance_uid'] or '-'}{accession}{held}")
    if entry["study"]:
        say(f"            {entry['study']}")
    say(f"  instance  {entry['sop_instance_uid'] or '-'}")
    if entry["results_out"]:
        out = ", ".join(entry["results_out"])
        say(
            f"  results are out at {out}: if it is right, vigil withdraw {entry['study']}",
            "red",
        )
    if entry["differs"]:
        table = Table("", "first", "newcomer", box=None, padding=(0, 2), pad_edge=True)
        for one in entry["differs"]:
            table.add_row(*(Text(printable(one[key])) for key in ("what", "first", "newcomer")))
        console.print(table)
    say(f"  release   {entry['release']}")


def _say(console: Console, text: str, style: str = "") -> None:
    # What a sender wrote is no markup and no control sequence.
    console.print(Text(printable(text), style=style), soft_wrap=True)


def _alike(found: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """A corrected study is told once, not image by image; each id stands there all the same."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in found:
        told = [entry[key] for key in ("study", "study_instance_uid", "code", "reason", "differs")]
        groups.setdefault(json.dumps(told), []).append(entry)
    return list(groups.values())


def printable(text: str) -> str:
    """Without what could move a terminal's cursor or turn its text round."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
