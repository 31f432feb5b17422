"""Keeping what was claimed while it is worked on, so that nobody else takes it meanwhile."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

log = structlog.get_logger()

RENEW_S = 5.0
#: Longer than any preparation may take. Who is not done by then hangs, and is not waited for.
HELD_AT_MOST_S = 900.0
#: A renewal that hangs is left behind: it changes nothing that is no longer ours.
JOIN_S = 10.0


class Lease:
    """Renews in a thread of its own, from entering to leaving it."""

    def __init__(self, engine: Engine, renew: Callable[[Session], bool], *, lease_s: float) -> None:
        self._engine, self._renewed = engine, renew  # False: another has it
        self._lease_s = lease_s
        self._held_until = time.monotonic() + lease_s
        self._is_over, self._is_lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def is_held(self) -> bool:
        """Whether it is still ours; no where that cannot be known, for another may have it."""
        return not self._is_lost.is_set() and time.monotonic() < self._held_until

    def allow(self, seconds: float) -> None:
        """So long from now it may still be worked on."""
        self._until = time.monotonic() + seconds

    def __enter__(self) -> Self:
        self.allow(HELD_AT_MOST_S)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join(JOIN_S)

    def _keep(self) -> None:
        while not self._is_over.wait(RENEW_S):
            if time.monotonic() > self._until or not self._renew():
                self._is_lost.set()
                return

    def _renew(self) -> bool:
        """False where another has it."""
        asked_at = time.monotonic()
        try:
            with Session(self._engine) as session, session.begin():
                is_ours = self._renewed(session)
        except Exception as error:  # noqa: BLE001 - the thread's loop: records and goes on
            log.warning("lease_not_renewed", exc_type=type(error).__name__)
            return True  # not known; `is_held` says no once the last one has run out
        if is_ours:
            self._held_until = asked_at + self._lease_s
        return is_ours
