"""`vigil withdraw`: results that must not stand any more, and the rejection notes about them."""

import getpass
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy import select
from sqlalchemy.orm import Session

from config.settings import load
from db import withdrawals
from db.errors import IllegalMove
from db.study import WithdrawalReason
from db.tables import DeliveryRow, StudyRow
from node.database import opened
from node.where import analyses, find_one


@dataclass(frozen=True, slots=True)
class Asked:
    """What an operator asks for."""

    study: str
    tenant: str
    reason: WithdrawalReason
    words: str


def outlook(study: str, tenant: str, config: Path | None) -> str:
    """What is out and where, before anything is done."""
    with opened(load(config)) as engine, Session(engine) as session:
        row = find_one(session, study, tenant)
        out = session.scalars(
            select(DeliveryRow.destination)
            .where(DeliveryRow.study_id == row.id, withdrawals.is_out())
            .distinct()
        ).all()
        where = f"out at {', '.join(sorted(out))}" if out else "out nowhere"
        return f"Study {row.public_id} of tenant {row.tenant}: results {where}."


def withdraw(asked: Asked, config: Path | None) -> dict[str, Any]:
    """Take back what stands of a study; says what was done, bundle by bundle.

    Raises
    ------
    IllegalMove
        If no bundle has anything to take back.
    BadWords
    """
    actor = f"cli:{getpass.getuser()}"
    done: list[dict[str, Any]] = []
    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        study = find_one(session, asked.study, asked.tenant)
        for row in analyses(session, study):
            if not row.is_shadow:
                done.append(_one(session, row.id, row.bundle, asked, actor))
        if not any("destinations" in one for one in done):
            told = "; ".join(f"{one['bundle']}: {one['refused']}" for one in done)
            raise IllegalMove(told or "the study has no analysis yet")
        return _document(session, study, done)


def _one(session: Session, key: int, bundle: str, asked: Asked, actor: str) -> dict[str, Any]:
    try:
        with session.begin_nested():
            found = withdrawals.withdraw(
                session, key, actor=actor, reason=asked.reason, words=asked.words
            )
    except IllegalMove as error:
        return {"bundle": bundle, "refused": str(error)}
    return {
        "bundle": bundle,
        "results": list(found.results),
        "destinations": list(found.destinations),
        "again": list(found.again),
    }


def _document(session: Session, study: StudyRow, done: list[dict[str, Any]]) -> dict[str, Any]:
    session.flush()
    session.refresh(study)
    return {
        "study": str(study.public_id),
        "tenant": study.tenant,
        "study_instance_uid": study.study_instance_uid,
        "is_held": study.is_held,
        "analyses": done,
    }


def show(document: dict[str, Any], console: Console) -> None:
    for one in document["analyses"]:
        if "refused" in one:
            console.print(f"{one['bundle']}: {one['refused']}", soft_wrap=True)
            continue
        words = []
        if one["results"]:
            to = f"; a rejection note goes to {', '.join(one['destinations'])}"
            words.append(f"withdrawn{to if one['destinations'] else '; it was nowhere yet'}")
        if one["again"]:
            words.append(f"the note that did not arrive goes to {', '.join(one['again'])} again")
        console.print(f"{one['bundle']}: {'; '.join(words)}", soft_wrap=True)
    console.print(f"`vigil where {document['study']}` says when it has arrived.", soft_wrap=True)
