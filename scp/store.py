"""C-STORE: keep, then answer. On Success the modality may delete its own copy."""

import datetime as dt
from typing import Any, cast

import structlog
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.dimse_primitives import C_STORE

from db.errors import DiskFull, PermanentError, TransientError
from db.faults import point
from db.files import check_room
from db.spool import Part, Provenance, Spool
from scp.admission import Admission
from scp.presentation import is_storage

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700  # the modality keeps its copy and sends again (PS3.4 Table B.2-1)
CANNOT_UNDERSTAND = 0xC000
NOT_STORAGE = 0x0122  # SOP Class not supported (PS3.7 C.5.6)

_MAX_UID_CHARS = 256  # four times what one may have: a longer one is none, cut or not
_RECHECK_BYTES = 64 * 2**20  # a large object must not eat what the watermark keeps free
log = structlog.get_logger()


class Keeping:
    """One data set on its way into the spool; what goes wrong is remembered until the answer."""

    def __init__(self, spool: Spool, min_free_mb: int, source: Provenance) -> None:
        self._spool, self._min_free_mb = spool, min_free_mb
        self._part: Part | None = None
        self._error: TransientError | None = None
        self._next_check = _RECHECK_BYTES
        try:
            self._part = spool.begin(source)
        except TransientError as error:
            self._error = error

    def write(self, data: bytes) -> None:
        """Append; after a failure the rest is read and dropped, so that the association stays."""
        if self._part is None:
            return
        try:
            if self._part.size_bytes > self._next_check:
                self._next_check += _RECHECK_BYTES
                check_room(self._spool.folder, self._min_free_mb)
            self._part.write(data)
        except TransientError as error:
            self._error = error
            self.discard()

    def commit(self) -> str:
        """Returns the instance's id once it is durable. Raises what went wrong on the way."""
        if self._part is None:
            raise self._error or DiskFull("not kept")
        part, self._part = self._part, None
        return str(part.commit())

    def discard(self) -> None:
        if self._part is not None:
            self._part.discard()
            self._part = None


def provenance(
    admission: Admission,
    syntax: str,
    association: str,
    local: str,
    message: DIMSEMessage | None = None,
) -> Provenance:
    """What is written beside a data set; UIDs as a C-STORE gave them, well-formed or not."""
    command = message.command_set if message else None
    caller = admission.caller
    return Provenance(
        tenant=admission.tenant.id,
        calling_ae=caller.calling_ae,
        called_ae=caller.called_ae,
        address=caller.address,
        local_address=local,
        tls_subject=caller.tls_subject,
        association=association,
        received_at=dt.datetime.now(dt.UTC).isoformat(),
        sop_class_uid=_uid(command, "AffectedSOPClassUID"),
        sop_instance_uid=_uid(command, "AffectedSOPInstanceUID"),
        transfer_syntax_uid=syntax,
    )


def answer(request: C_STORE, abstract_syntax: str) -> int:
    """Make durable what arrived with `request`, and only then say so."""
    keeping = cast(Keeping | None, getattr(request.DataSet, "sink", None))
    if keeping is None:
        log.warning("instance_refused", exc_code="empty_dataset")
        return CANNOT_UNDERSTAND
    if not is_storage(abstract_syntax):
        keeping.discard()
        log.warning("instance_refused", exc_code="not_a_storage_context")
        return NOT_STORAGE
    try:
        instance_id = keeping.commit()
    except PermanentError as error:
        log.warning("instance_refused", exc_code=error.code)
        return CANNOT_UNDERSTAND
    except TransientError as error:
        log.error("instance_not_kept", exc_code=error.code)
        return OUT_OF_RESOURCES
    point("store_kept")
    log.debug("instance_kept", instance_id=instance_id)
    return SUCCESS


def response(request: C_STORE, status: int) -> C_STORE:
    """The C-STORE-RSP; what the request left out, the answer leaves out (PS3.7 9.1.1.1)."""
    answered = C_STORE()
    answered.MessageIDBeingRespondedTo = request.MessageID
    if request.AffectedSOPClassUID:
        answered.AffectedSOPClassUID = request.AffectedSOPClassUID
    if request.AffectedSOPInstanceUID:
        answered.AffectedSOPInstanceUID = request.AffectedSOPInstanceUID
    answered.Status = status
    return answered


def _uid(command: Any, keyword: str) -> str:
    value = getattr(command, keyword, None)
    return str(value).strip(" \0")[:_MAX_UID_CHARS] if value else ""
