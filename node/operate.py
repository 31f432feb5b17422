"""An operator's hands on the command line: run a study again, send its result again."""

import getpass
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.orm import Session

from config.settings import load
from db import operator
from db.errors import IllegalMove
from db.studies import Analysis
from node.database import opened
from node.where import analyses, find_one


def rerun(study: str, tenant: str, config: Path | None) -> str:
    """Queue every analysis of the study again; says what was done."""
    return _each(study, tenant, config, operator.rerun, "queued again")


def resend(study: str, tenant: str, config: Path | None) -> str:
    """Put every result of the study into the outbox again; says what was done."""
    return _each(study, tenant, config, operator.resend, "will be sent again")


def _each(
    study: str, tenant: str, config: Path | None, act: Callable[..., Analysis], done: str
) -> str:
    actor = f"cli:{getpass.getuser()}"
    words: list[str] = []
    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        rows = analyses(session, find_one(session, study, tenant))
        for row in rows:
            bundle = row.bundle
            try:
                with session.begin_nested():
                    act(session, row.id, actor=actor)
            except IllegalMove as error:
                words.append(f"{bundle}: {error}")
            else:
                words.append(f"{bundle}: {done}")
        if not any(word.endswith(done) for word in words):
            raise IllegalMove("; ".join(words) or "the study has no analysis yet")
    return "\n".join(words)
