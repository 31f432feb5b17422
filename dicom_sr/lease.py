"""Keeping what was claimed while it is worked on, so that nobody else takes it meanwhile."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

RENEW_S = 5.0
#: Longer than any association may take: ten objects, each answered at the last moment. Who is not
#: done by then hangs, and is not waited for.
HELD_AT_MOST_S = 900.0


class Lease:
    """Renews in a thread of its own, from entering to leaving it."""

    def __init__(self, engine: Engine, renew: Callable[[Session], bool]) -> None:
        self._engine, self._renewed = engine, renew  # False: another has it
        self._is_over, self._is_lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def is_held(self) -> bool:
        """Whether it is still ours."""
        return not self._is_lost.is_set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _keep(self) -> None:
        until = time.monotonic() + HELD_AT_MOST_S
        while not self._is_over.wait(RENEW_S):
            if time.monotonic() > until or not self._renew():
                self._is_lost.set()
                return

    def _renew(self) -> bool:
        """False where another has it. With the database away nobody can take it."""
        try:
            with Session(self._engine) as session, session.begin():
                return self._renewed(session)
        except DBAPIError:
            return True
