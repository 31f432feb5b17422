"""What all associations of a receiver share: settings, spool, limits, notes of refusals."""

import contextlib
import threading

import structlog

from config.settings import Settings
from config.tenants import Tenant
from db.errors import NodeError
from db.refusals import Refused, note
from db.spool import Spool
from scp.admission import Admission, Caller, Limits, Refusal, judge

log = structlog.get_logger()


class Door:
    """What all associations of this process share."""

    def __init__(self, settings: Settings, spool: Spool, processes: int = 1) -> None:
        self.settings = settings  # replaced as a whole by a reload
        self.spool = spool
        self.limits = Limits(settings.scp, processes)
        self.is_closing = threading.Event()

    def reload(self, tenants: tuple[Tenant, ...], min_free_mb: int | None = None) -> None:
        """Other tenants from now on; associations that live keep what they were admitted to.

        min_free_mb : another watermark of the disk, where one is given
        """
        fresh = self.settings.model_copy(update={"tenants": tenants})
        if min_free_mb is not None:
            node = fresh.node.model_copy(update={"min_free_mb": min_free_mb})
            fresh = fresh.model_copy(update={"node": node})
            self.spool.min_free_mb = min_free_mb
        fresh.__dict__.pop("by_ae_title", None)  # a cached property that the copy took along
        self.settings = fresh

    def admit(self, caller: Caller) -> Admission | Refusal:
        found = judge(self.settings, caller)
        if isinstance(found, Refusal):
            self.refused(found.name.lower(), caller)
        return found

    def refused(self, code: str, caller: Caller) -> None:
        """Log it and note it for the audit trail."""
        tenant = self.settings.by_ae_title.get(caller.called_ae)
        words = {"calling_ae": caller.calling_ae, "called_ae": caller.called_ae}
        log.warning("association_refused", reason_code=code, address=caller.address, **words)
        with contextlib.suppress(NodeError):  # a full disk must not stop the refusal itself
            note(
                self.spool.folder,
                Refused(
                    code=code,
                    address=caller.address,
                    tenant=tenant.id if tenant else "",
                    **words,
                ),
            )
