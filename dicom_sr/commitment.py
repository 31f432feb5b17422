"""Storage commitment on the line: asking an archive, and answering a modality (PS3.4 Annex J)."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from queue import Empty, Queue
from typing import Any

from pynetdicom.association import Association
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import build_context, build_role

from db import transaction
from db.faults import point
from db.transaction import Transaction
from dicom_sr.association import ABORTED, Peer, speaking, why_not
from dicom_sr.line import NoLine
from dicom_sr.requestor import sole_reader

_CONTEXT = build_context(transaction.SOP_CLASS, list(transaction.SYNTAXES[:2]))
_SUCCESS, _PROCESSING_FAILURE = 0x0000, 0x0110
#: Statuses that pass: no resources, processing failure, a transaction UID that was used before.
_TRANSIENT = frozenset({_PROCESSING_FAILURE, 0x0131, 0x0213})
#: Some archives report at once, on the association on which they were asked.
LINGER_S = 2.0

Inbox = Queue[tuple[Any, int]]  # messages, with the ids of their contexts

#: Takes a report's data set and its transfer syntax; False where it could not be written down.
Hear = Callable[[str, str], bool]


class Outcome(StrEnum):
    TAKEN = "taken"  # the archive will report
    UNKNOWN = "unknown"  # it may have heard the request, and may report
    LATER = "later"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Asked:
    outcome: Outcome
    error: str = ""  # why not, in one word, or the status


def ask(peer: Peer, wanted: Transaction, hear: Hear) -> Asked:
    """Ask an archive to vouch for instances; its report comes now, to `hear`, or later."""
    try:
        with speaking(peer, [_CONTEXT]) as (association, entity):
            if association.rejected_contexts and not association.accepted_contexts:
                return Asked(Outcome.REFUSED, "context_refused")
            if not association.is_established:
                return Asked(Outcome.LATER, why_not(association, entity))
            with sole_reader(association):
                inbox = _inbox(association)
                asked = _request(association, wanted)
                point("commitment_asked")
                if asked.outcome is Outcome.TAKEN:
                    _linger(association, inbox, hear)
                return asked
    except NoLine as none:
        return Asked(Outcome.LATER, none.why)


def _request(association: Association, wanted: Transaction) -> Asked:
    try:
        status, _ = association.send_n_action(
            wanted.dataset(), transaction.REQUEST, transaction.SOP_CLASS, transaction.SOP_INSTANCE
        )
    except (RuntimeError, ValueError):  # it ended meanwhile
        return Asked(Outcome.LATER, ABORTED)
    if "Status" not in status:
        return Asked(Outcome.UNKNOWN, "no_answer")
    code = f"0x{status.Status:04X}"
    if status.Status == _SUCCESS:
        return Asked(Outcome.TAKEN)
    return Asked(Outcome.LATER if status.Status in _TRANSIENT else Outcome.REFUSED, code)


def _inbox(association: Association) -> Inbox:
    """Where reports go that come on this association.

    pynetdicom serves them in a thread of their own, which lets go of the association's thread that
    `sole_reader` holds; the release would wait for that for ever.
    """
    inbox: Inbox = Queue()
    association._serve_request = lambda msg, context_id: inbox.put(  # type: ignore[method-assign]
        (msg, context_id)
    )
    return inbox


def _linger(association: Association, inbox: Inbox, hear: Hear) -> None:
    try:
        message, context_id = inbox.get(timeout=LINGER_S)
    except Empty:
        return
    context = association._accepted_cx.get(context_id)
    if not isinstance(message, N_EVENT_REPORT) or context is None:
        return
    if message.EventInformation is None:
        return
    body = base64.b64encode(message.EventInformation.getvalue()).decode("ascii")
    is_heard = hear(body, str(context.transfer_syntax[0]))
    answered = N_EVENT_REPORT()
    answered.MessageIDBeingRespondedTo = message.MessageID
    answered.AffectedSOPClassUID = message.AffectedSOPClassUID
    answered.AffectedSOPInstanceUID = message.AffectedSOPInstanceUID
    answered.EventTypeID = message.EventTypeID
    answered.Status = _SUCCESS if is_heard else _PROCESSING_FAILURE
    association.dimse.send_msg(answered, context_id)


def tell(peer: Peer, answer: Transaction) -> str:
    """Report to a modality what we vouch for; empty where it has heard it, else why not."""
    try:
        with speaking(peer, [_CONTEXT], roles=[_as_scp()]) as (association, entity):
            if association.rejected_contexts and not association.accepted_contexts:
                return "context_refused"
            if not association.is_established:
                return why_not(association, entity)
            with sole_reader(association):
                return _report(association, answer)
    except NoLine as none:
        return none.why


def _as_scp() -> SCP_SCU_RoleSelectionNegotiation:
    return build_role(transaction.SOP_CLASS, scp_role=True)


def _report(association: Association, answer: Transaction) -> str:
    for context in association.accepted_contexts:
        context._as_scp = True  # a modality that leaves the roles unanswered wants to hear it, too
    event = transaction.SOME_FAILED if answer.failed else transaction.ALL_KEPT
    try:
        status, _ = association.send_n_event_report(
            answer.dataset(), event, transaction.SOP_CLASS, transaction.SOP_INSTANCE
        )
    except (RuntimeError, ValueError):  # it ended meanwhile
        return ABORTED
    if "Status" not in status:
        return "no_answer"
    return "" if status.Status == _SUCCESS else f"0x{status.Status:04X}"
