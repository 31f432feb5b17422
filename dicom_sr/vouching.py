"""Answers to senders that asked for storage commitment, on associations of our own."""

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from config.settings import Settings
from db import pledges
from db.faults import point
from db.pledges import ClaimedPledge
from db.process import Stop
from dicom_sr.association import Peer, caller_of
from dicom_sr.commitment import tell
from dicom_sr.recording import NEVER, record

log = structlog.get_logger()


class Voucher:
    """Tells each sender what it may rely on."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings

    def tell_once(self, stop: Stop = NEVER) -> bool:
        """Give the answer that is due next; False where none is."""
        with Session(self._engine) as session, session.begin():
            pledge = pledges.claim_due(session)
        if pledge is None:
            return False
        peer = self._peer(pledge)
        error = tell(peer, pledge.answer) if peer else pledges.NO_ADDRESS
        point("pledge_reported")

        def conclude(session: Session) -> None:
            if error:
                pledges.put_off(session, pledge, error)
            else:
                pledges.reported(session, pledge)

        record(self._engine, conclude, stop)
        log.info("commitment_told", tenant=pledge.tenant, outcome=error or "reported")
        return True

    def _peer(self, pledge: ClaimedPledge) -> Peer | None:
        """Where it asked from, at the port that the configuration names now."""
        tenant = self._settings.tenant(pledge.tenant)
        sender = tenant.sender(pledge.sender, pledge.address) if tenant else None
        if sender is None or not sender.port:
            return None
        return caller_of(sender, pledge.address, pledge.called_ae, self._settings.scp)
