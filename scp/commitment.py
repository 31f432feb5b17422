"""Storage commitment, as it comes in: a modality's request, or an archive's report (PS3.4 Annex J).

Either is kept in the spool before it is answered, as an instance is, and means something only once
intake has come to it: what was sent before it has been filed by then.
"""

import structlog
from pynetdicom.dimse_primitives import N_ACTION, N_EVENT_REPORT

from db import transaction
from db.errors import PermanentError, TransientError
from db.faults import point
from db.meta import Provenance
from db.spool import Kind, Spool
from scp.admission import Admission

Message = N_ACTION | N_EVENT_REPORT

# PS3.7 C.4.
SUCCESS = 0x0000
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_EVENT_TYPE = 0x0113
INVALID_ARGUMENT = 0x0115
NO_SUCH_ACTION = 0x0123
NOT_AUTHORISED = 0x0124
OUT_OF_RESOURCES = 0x0213

log = structlog.get_logger()


def answer(
    message: Message, admission: Admission | None, spool: Spool, source: Provenance
) -> Message:
    """Keep what the message says, and the response that says whether it is kept."""
    if isinstance(message, N_ACTION):
        status = _asked(message, admission, spool, source)
    else:
        status = _told(message, admission, spool, source)
    return _response(message, status)


def _asked(message: N_ACTION, admission: Admission | None, spool: Spool, source: Provenance) -> int:
    if admission is None or not admission.may_ask:
        return NOT_AUTHORISED
    if message.RequestedSOPInstanceUID != transaction.SOP_INSTANCE:
        return NO_SUCH_INSTANCE
    if message.ActionTypeID != transaction.REQUEST:
        return NO_SUCH_ACTION
    information = message.ActionInformation
    return _keep(spool, source, information.getvalue() if information else b"", "request")


def _told(
    message: N_EVENT_REPORT, admission: Admission | None, spool: Spool, source: Provenance
) -> int:
    if admission is None or not admission.may_report:
        return NOT_AUTHORISED
    if message.AffectedSOPInstanceUID != transaction.SOP_INSTANCE:
        return NO_SUCH_INSTANCE
    if message.EventTypeID not in (transaction.ALL_KEPT, transaction.SOME_FAILED):
        return NO_SUCH_EVENT_TYPE
    information = message.EventInformation
    return _keep(spool, source, information.getvalue() if information else b"", "report")


def _keep(spool: Spool, source: Provenance, body: bytes, kind: Kind) -> int:
    try:
        spool.keep(source, body, kind)
    except PermanentError:  # nothing in it
        return INVALID_ARGUMENT
    except TransientError as error:
        log.error("commitment_not_kept", exc_code=error.code)
        return OUT_OF_RESOURCES
    point("commitment_kept")
    return SUCCESS


def _response(message: Message, status: int) -> Message:
    answered: Message
    if isinstance(message, N_ACTION):
        answered = N_ACTION()
        answered.AffectedSOPClassUID = message.RequestedSOPClassUID
        answered.AffectedSOPInstanceUID = message.RequestedSOPInstanceUID
        answered.ActionTypeID = message.ActionTypeID
    else:
        answered = N_EVENT_REPORT()
        answered.AffectedSOPClassUID = message.AffectedSOPClassUID
        answered.AffectedSOPInstanceUID = message.AffectedSOPInstanceUID
        answered.EventTypeID = message.EventTypeID
    answered.MessageIDBeingRespondedTo = message.MessageID
    answered.Status = status
    if status != SUCCESS:
        log.warning("commitment_refused", status=f"0x{status:04X}")
    return answered
