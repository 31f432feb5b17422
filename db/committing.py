"""Takes in what receivers have kept of storage commitment: senders' requests, archives' reports."""

import math
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from config.settings import Settings
from db import commitment, pledges, studies, transaction
from db.errors import ChildDied, PermanentError
from db.faults import point
from db.meta import Provenance
from db.sandbox import Sandbox
from db.spool import Spooled, read_provenance, receivers, scan
from db.transaction import Transaction

_READ_S, _READ_AGAIN_S = 20.0, 120.0
log = structlog.get_logger()


class Committing:
    """Empties a receiver's folder of these; the caller holds its intake lock."""

    def __init__(self, engine: Engine, settings: Settings, sandbox: Sandbox) -> None:
        self._engine, self._settings, self._sandbox = engine, settings, sandbox
        self._data_dir = settings.node.data_dir

    def take(self, folder: Path) -> int:
        """Reports at once; a request when all that came before it, to whichever receiver, is filed.

        Returns
        -------
        How many files left the spool.

        Raises
        ------
        TransientError, sqlalchemy.exc.DBAPIError
            Nothing is lost; call again later.
        """
        reports = scan(folder, kind="report")
        requests = scan(folder, kind="request")
        if requests:  # only then: it looks at every file there is
            # After the requests: whatever came before them lies there, or is filed.
            oldest_ns = self._oldest_ns()
            requests = [item for item in requests if item.at_ns < oldest_ns]
        for item in (*reports, *requests):
            self._take(item)
        return len(reports) + len(requests)

    def _oldest_ns(self) -> float:
        """When the oldest instance came that waits at any receiver; infinity where none does."""
        return min(
            (item.at_ns for folder in receivers(self._data_dir) for item in scan(folder)),
            default=math.inf,
        )

    def _take(self, item: Spooled) -> None:
        try:
            source = read_provenance(item.path)
            found = Transaction.from_json(self._read(item.path))
        except (PermanentError, ChildDied) as error:
            self._unreadable(item, error.code)
        else:
            with Session(self._engine) as session, session.begin():
                if item.path.suffix == ".request":
                    pledges.owe(session, self._data_dir, item.id, source, found)
                else:
                    self._report(session, source, found)
        point("commitment_taken")
        item.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Any]:
        """Twice where its reader dies: of a machine that is short of time or memory, perhaps."""
        try:
            value, _ = self._sandbox.run(transaction.read, str(path), timeout_s=_READ_S)
        except ChildDied:
            value, _ = self._sandbox.run(transaction.read, str(path), timeout_s=_READ_AGAIN_S)
        return value

    def _report(self, session: Session, source: Provenance, report: Transaction) -> None:
        tenant = self._settings.tenant(source.tenant)
        caller = source.calling_ae.strip()
        names = tuple(
            one.name for one in (tenant.destinations if tenant else ()) if one.ae_title == caller
        )
        if not commitment.take_report(session, source.tenant, names, report):
            log.warning("commitment_not_asked_for", tenant=source.tenant, calling_ae=caller)

    def _unreadable(self, item: Spooled, code: str) -> None:
        """Nothing follows from it: who asked keeps its copy, and whom we asked is asked again."""
        log.error("commitment_unreadable", tenant=item.tenant, exc_code=code)
        with Session(self._engine) as session, session.begin():
            studies.record(
                session,
                "commitment_unreadable",
                tenant=item.tenant,
                origin="dicom",
                is_alarm=True,
                what=item.path.suffix[1:],
                reason_code=code,
            )
