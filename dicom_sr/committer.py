"""Asks a destination to vouch for the results that it has accepted."""

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from config.settings import Settings
from config.tenants import Destination, Tenant
from db import commitment, transaction
from db.errors import NodeError
from db.faults import point
from db.process import Stop
from db.sandbox import Sandbox
from db.transaction import Transaction
from dicom_sr.association import peer_of
from dicom_sr.commitment import Outcome, ask
from dicom_sr.recording import NEVER, record

_READ_S = 20.0
log = structlog.get_logger()


class Committer:
    """Of one destination."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        sandbox: Sandbox,
        tenant: Tenant,
        destination: Destination,
    ) -> None:
        self._engine, self._sandbox = engine, sandbox
        self._tenant, self._destination = tenant.id, destination.name
        self._peer = peer_of(tenant, destination, settings.scp)

    def ask_once(self, stop: Stop = NEVER) -> bool:
        """Make the request that is due next; False where none is."""
        with Session(self._engine) as session, session.begin():
            claimed = commitment.claim_due(session, self._tenant, self._destination)
        if claimed is None:
            return False
        point("commitment_claimed")
        asked = ask(
            self._peer,
            claimed.transaction,
            lambda encoded, syntax: self._hear(encoded, syntax, stop),
        )

        def conclude(session: Session) -> None:
            if asked.outcome in (Outcome.TAKEN, Outcome.UNKNOWN):
                commitment.note_asked(session, claimed, asked.error)
            elif asked.outcome is Outcome.LATER:
                commitment.put_off(session, claimed, asked.error)
            else:
                commitment.note_refused(session, claimed, asked.error)

        record(self._engine, conclude, stop)
        log.info(
            "commitment_requested",
            tenant=self._tenant,
            destination=self._destination,
            outcome=asked.outcome.value,
            reason_code=asked.error,
        )
        return True

    def _hear(self, encoded: str, syntax: str, stop: Stop) -> bool:
        """A report on the same association: written down before it is answered."""
        try:
            value, _ = self._sandbox.run(
                transaction.read_base64, encoded, syntax, timeout_s=_READ_S
            )
        except NodeError as error:
            log.error("commitment_unreadable", tenant=self._tenant, exc_code=error.code)
            return False
        report = Transaction.from_json(value)
        record(
            self._engine,
            lambda session: self._take(session, report),
            stop,
        )
        return True

    def _take(self, session: Session, report: Transaction) -> None:
        if not commitment.take_report(session, self._tenant, (self._destination,), report):
            log.warning("commitment_not_asked_for", tenant=self._tenant)
