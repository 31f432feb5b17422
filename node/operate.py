"""An operator's hands on the command line: run a study again, send its result again."""

import getpass
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy.orm import Session

from config.settings import load
from db import operator
from db.errors import IllegalMove
from db.studies import Analysis
from node.database import opened
from node.where import analyses, find_one


def rerun(study: str, tenant: str, config: Path | None) -> dict[str, Any]:
    """Queue every analysis of the study again; what was done, as one JSON document.

    Raises
    ------
    IllegalMove
        If none could be.
    """
    return _each(study, tenant, config, operator.rerun, "queued again")


def resend(study: str, tenant: str, config: Path | None) -> dict[str, Any]:
    """Put every result of the study into the outbox again; likewise."""
    return _each(study, tenant, config, operator.resend, "will be sent again")


def _each(
    study: str, tenant: str, config: Path | None, act: Callable[..., Analysis], done: str
) -> dict[str, Any]:
    actor = f"cli:{getpass.getuser()}"
    told: list[dict[str, str]] = []
    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        found = find_one(session, study, tenant)
        for row in analyses(session, found):
            bundle = row.bundle
            try:
                with session.begin_nested():
                    act(session, row.id, actor=actor)
            except IllegalMove as error:
                told.append({"bundle": bundle, "refused": str(error)})
            else:
                told.append({"bundle": bundle, "done": done})
        if not any("done" in one for one in told):
            refused = "; ".join(f"{one['bundle']}: {one['refused']}" for one in told)
            raise IllegalMove(refused or "the study has no analysis yet")
        return {"study": str(found.public_id), "tenant": found.tenant, "analyses": told}


def show(document: dict[str, Any], console: Console) -> None:
    for one in document["analyses"]:
        console.print(f"{one['bundle']}: {one.get('done') or one['refused']}", soft_wrap=True)
