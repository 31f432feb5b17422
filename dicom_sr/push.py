"""One association with a destination: sends a result's objects and says what became of each."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import pydicom
from pydicom import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from db.answers import is_delivered
from db.errors import PermanentError
from db.faults import point
from dicom_sr.association import Entity, Peer, speaking, why_not
from dicom_sr.line import NoLine
from dicom_sr.plan import REPORT
from dicom_sr.requestor import sole_reader

STOPPED = "stopped"  # by ourselves, between two objects


class ObjectsGone(PermanentError):
    """A stored object is missing or has changed: the same bytes cannot be sent again."""

    code: ClassVar[str] = "objects_gone"


class Outcome(StrEnum):
    ACCEPTED = "accepted"
    WARNING = "warning"  # the peer has it, and remarked on it
    TRANSIENT = "transient"  # may pass by itself
    REFUSED = "refused"  # will not pass by itself


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one object."""

    outcome: Outcome
    code: str  # the status as 0xA700, or a word where there was none

    @property
    def is_delivered(self) -> bool:
        return self.outcome in (Outcome.ACCEPTED, Outcome.WARNING)


CONTEXT_REFUSED = Answer(Outcome.REFUSED, "context_refused")


def answer_for(status: int) -> Answer:
    """The meaning of a C-STORE status (PS3.4 B.2.3)."""
    code = f"0x{status:04X}"
    if status == 0x0000:
        return Answer(Outcome.ACCEPTED, code)
    if is_delivered(code):
        return Answer(Outcome.WARNING, code)
    if status & 0xFF00 == 0xA700:
        return Answer(Outcome.TRANSIENT, code)
    return Answer(Outcome.REFUSED, code)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A stored object on its way."""

    role: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    path: Path
    sha256: str  # of the file, as it was built

    def read(self) -> bytes:
        """The stored object; `ObjectsGone` unless it is what was built."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            raise ObjectsGone("a stored object is missing") from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ObjectsGone("a stored object has changed")
        return data


@dataclass(frozen=True, slots=True)
class Delivery:
    """What an association came to: an answer for each object that was tried."""

    answers: Mapping[str, Answer]  # by SOP Instance UID
    error: str = ""  # why it ended early: a word, empty if it did not


def time_limit_s(peer: Peer, size_bytes: int) -> float:
    """How long an object may take, from its first byte to the peer's answer."""
    return peer.dimse_timeout_s + size_bytes / peer.min_bytes_per_s


def push(
    peer: Peer,
    parcels: Sequence[Parcel],
    may_go_on: Callable[[str, float], bool] = lambda *_: True,
    note: Callable[[str, Answer], None] = lambda *_: None,
) -> Delivery:
    """Send the parcels in order; stops early where trying on would be in vain.

    Of several reports (one result in several SR classes) the first whose class the peer accepts is
    sent, and the others are not. `may_go_on` is asked before each object leaves, which may take so
    many seconds; `note` is told what the peer said of each, as it comes.
    """
    try:
        with speaking(peer, proposed(parcels)) as (association, entity):
            if not association.is_established:
                return _not_established(association, entity, parcels)
            with sole_reader(association):
                return _send_all(association, peer, parcels, may_go_on, note)
    except NoLine as none:
        return Delivery({}, none.why)


def proposed(parcels: Sequence[Parcel]) -> list[PresentationContext]:
    """One context a class, in the order of the parcels; a compressed syntax gets one of its own.

    Explicit and the default Implicit VR stand in one context (PS3.5 10.1: the default must be
    offered), for a peer that knows only the latter still gets the object.
    """
    syntaxes: list[str | UID] = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    contexts = []
    for sop_class in dict.fromkeys(parcel.sop_class_uid for parcel in parcels):
        of_class = [parcel for parcel in parcels if parcel.sop_class_uid == sop_class]
        for syntax in dict.fromkeys(UID(parcel.transfer_syntax_uid) for parcel in of_class):
            if syntax.is_compressed:
                contexts.append(build_context(sop_class, syntax))
        contexts.append(build_context(sop_class, syntaxes))
    return contexts


def _not_established(
    association: Association, entity: Entity, parcels: Sequence[Parcel]
) -> Delivery:
    # Accepted, but none of its contexts: pynetdicom aborts such an association by itself.
    if association.rejected_contexts and not association.accepted_contexts:
        return Delivery({parcel.sop_instance_uid: CONTEXT_REFUSED for parcel in parcels})
    return Delivery({}, why_not(association, entity))


def _send_all(
    association: Association,
    peer: Peer,
    parcels: Sequence[Parcel],
    may_go_on: Callable[[str, float], bool],
    note: Callable[[str, Answer], None],
) -> Delivery:
    answers: dict[str, Answer] = {}
    has_report = False
    for parcel in parcels:
        if parcel.role == REPORT and has_report:
            continue
        built = _read(association, parcel)
        limit_s = time_limit_s(peer, _size(built))
        if built is not None and not may_go_on(parcel.sop_instance_uid, limit_s):
            return Delivery(answers, STOPPED)
        point("object_to_send")
        answer = _send(association, built, limit_s)
        point("object_sent")
        if answer is None:
            return Delivery(answers, "no_answer")
        if answer is not CONTEXT_REFUSED:
            note(parcel.sop_instance_uid, answer)
        if parcel.role == REPORT and answer is not CONTEXT_REFUSED:
            # The refused classes before it do not count: this one stands for the report.
            answers = {uid: old for uid, old in answers.items() if uid not in _reports(parcels)}
            has_report = True
        answers[parcel.sop_instance_uid] = answer
        if answer.outcome is Outcome.TRANSIENT:
            return Delivery(answers, answer.code)  # it has no room: the rest would fare no better
    return Delivery(answers)


def _reports(parcels: Sequence[Parcel]) -> frozenset[str]:
    return frozenset(parcel.sop_instance_uid for parcel in parcels if parcel.role == REPORT)


def _send(association: Association, built: Dataset | None, limit_s: float) -> Answer | None:
    """None where the peer gave no answer: it aborted, stalled or went away."""
    if built is None:
        return CONTEXT_REFUSED
    association.dimse_timeout = limit_s
    try:
        status = association.send_c_store(built)
    except (RuntimeError, ValueError):  # it ended between two objects
        return None
    return answer_for(status.Status) if "Status" in status else None


def _read(association: Association, parcel: Parcel) -> Dataset | None:
    """The stored object; decompressed where the peer does not take it as it is (no loss: RLE).

    None where the peer takes it in no way.
    """
    accepted = [
        context.transfer_syntax[0]
        for context in association.accepted_contexts
        if context.abstract_syntax == parcel.sop_class_uid
    ]
    if not accepted:
        return None
    built = pydicom.dcmread(io.BytesIO(parcel.read()))
    syntax = built.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax in accepted:
        return built
    if not any(not offered.is_compressed for offered in accepted):
        return None
    built.decompress(generate_instance_uid=False)
    return built


def _size(built: Dataset | None) -> int:
    """About how many bytes go over the line; the rest of an object is small."""
    keywords = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
    return sum(len(built.get(keyword) or b"") for keyword in keywords) if built else 0
