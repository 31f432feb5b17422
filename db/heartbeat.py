"""Each stage process says that it is alive, for status, readiness and the health page."""

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import structlog
from sqlalchemy import Engine, delete, func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from db.tables import ProcessRow

log = structlog.get_logger()

BEAT_S = 5.0
#: A process that has not been seen for this long is gone.
GONE_S = 30.0


def process_name(stage: str) -> str:
    return f"{socket.gethostname()}/{stage}/{os.getpid()}"


class Heartbeat:
    """A thread that writes this process's row; a database that is away does not end it."""

    def __init__(
        self, engine: Engine, stage: str, detail: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self._engine, self._stage, self._detail = engine, stage, detail
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            with Session(self._engine) as session, session.begin():
                name = process_name(self._stage)
                session.execute(delete(ProcessRow).where(ProcessRow.name == name))
        except OperationalError:
            log.warning("database_away")

    def _run(self) -> None:
        while True:
            try:
                self._beat()
            except OperationalError:
                log.warning("database_away")
            if self._stop.wait(BEAT_S):
                return

    def _beat(self) -> None:
        detail = self._detail()
        row = {"name": process_name(self._stage), "stage": self._stage, "detail": detail}
        with Session(self._engine) as session, session.begin():
            session.execute(
                insert(ProcessRow)
                .values(row)
                .on_conflict_do_update(
                    index_elements=["name"], set_={"seen_at": func.now(), "detail": detail}
                )
            )
            # The dead cannot sign off.
            session.execute(
                delete(ProcessRow).where(
                    ProcessRow.seen_at < func.now() - func.make_interval(0, 0, 0, 1)
                )
            )
