"""The loops of `vigil deliver`: one thread builds, and each destination has a thread of its own.

So a destination that is dead or slow delays no other, and no build.
"""

import datetime as dt
import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from config.settings import Settings
from db import claims, commitment, dispatch
from db.lifetime import is_gone
from db.process import Stop
from db.sandbox import Sandbox
from dicom_sr.assemble import Assembler
from dicom_sr.building import Builder
from dicom_sr.committer import Committer
from dicom_sr.recording import is_away
from dicom_sr.sending import Sender
from dicom_sr.vouching import Voucher

log = structlog.get_logger()

BUILD_POLL_S = 0.2
SEND_POLL_S = 2.0  # a build in this process wakes the senders at once
AWAY_S = 2.0
SWEEP_S = 60.0


class Deliverer:
    """Everything between a stored finding and the PACS."""

    def __init__(
        self, engine: Engine, settings: Settings, sandbox: Sandbox, *, worker: str, version: str
    ) -> None:
        self._engine, self._worker = engine, worker
        self._assembler = assembler = Assembler(engine, settings, sandbox, version)
        self._builder = Builder(engine, settings, assembler, worker)
        self._senders = {
            f"send-{tenant.id}-{destination.name}": (
                Sender(engine, settings, assembler, sandbox, worker, tenant, destination),
                Committer(engine, settings, sandbox, tenant, destination),
            )
            for tenant in settings.tenants
            for destination in tenant.destinations
        }
        self._voucher = Voucher(engine, settings)
        self._places = [(t.id, d.name) for t in settings.tenants for d in t.destinations]
        self._since: dt.datetime | None = None
        self._wake = threading.Condition()
        self._n_wakes = 0

    def run(self, stop: Stop) -> None:
        """Build and send until told to stop; what is under way is finished first."""
        attempt(self.take_back, stop)
        threads = [
            threading.Thread(target=self._send, args=(*both, stop), name=name)
            for name, both in self._senders.items()
        ]
        threads.append(threading.Thread(target=self._vouch, args=(stop,), name="vouch"))
        for thread in threads:
            thread.start()
        attempt(self._warm, stop)
        sweep_at = time.monotonic() + SWEEP_S
        while not stop.is_set():
            if time.monotonic() >= sweep_at:
                attempt(self.sweep, stop)
                sweep_at = time.monotonic() + SWEEP_S
            if attempt(lambda: self._builder.build_once(stop), stop):
                self._wake_senders()
            else:
                stop.wait(BUILD_POLL_S)
        self._wake_senders()
        for thread in threads:
            thread.join()

    def run_once(self) -> None:
        """Build what is due and send what is due, once round; for tests and single commands."""
        while self._builder.build_once():
            pass
        for sender, committer in self._senders.values():
            while sender.send_once() or committer.ask_once():
                pass
        while self._voucher.tell_once():
            pass

    def take_back(self) -> bool:
        """Free what senders held that were killed on this machine; whether there was any."""
        with Session(self._engine) as session, session.begin():
            n = claims.take_back(session, is_gone)
        if n:
            log.warning("deliveries_taken_back", n=n)
        return n > 0

    def sweep(self) -> bool:
        """End what is past its time and has no sender; whether there was any."""
        n, n_reports = 0, 0
        while self._expire():
            n += 1
        if n:
            log.warning("deliveries_expired", n=n)
        while self._follow_up():
            n_reports += 1
        if n_reports:
            log.warning("commitment_reports_missing", n=n_reports)
        return n + n_reports > 0

    def _expire(self) -> bool:
        with Session(self._engine) as session, session.begin():
            # By the database's clock, and no sooner than the senders began.
            self._since = self._since or session.scalar(select(func.now()))
            return dispatch.expire_next(
                session, self._worker, sent_to=self._places, since=self._since
            )

    def _follow_up(self) -> bool:
        with Session(self._engine) as session, session.begin():
            return commitment.follow_up(session)

    def _warm(self) -> bool:
        self._assembler.warm()
        return True

    def _send(self, sender: Sender, committer: Committer, stop: Stop) -> None:
        def work() -> bool:
            # Results first: one that waits is worth more than the word on those that are there.
            return sender.send_once(stop) or committer.ask_once(stop) or sender.ask_once()

        while not stop.is_set():
            seen = self._n_wakes
            if not attempt(work, stop):
                with self._wake:
                    # Woken between looking and waiting: look again.
                    if seen == self._n_wakes and not stop.is_set():
                        self._wake.wait(SEND_POLL_S)

    def _vouch(self, stop: Stop) -> None:
        while not stop.is_set():
            if not attempt(lambda: self._voucher.tell_once(stop), stop):
                stop.wait(SEND_POLL_S)

    def _wake_senders(self) -> None:
        with self._wake:
            self._n_wakes += 1
            self._wake.notify_all()


def attempt(work: Callable[[], bool], stop: Stop) -> bool:
    """One round of a worker loop: whatever fails is recorded, and the loop goes on."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the worker loop: records and goes on
        if is_away(error):
            log.warning("database_away")
        else:
            log.error("delivery_loop_failed", exc_type=type(error).__name__)
    stop.wait(AWAY_S)
    return False
