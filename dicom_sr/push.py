"""One association with a destination: sends a result's objects and says what became of each."""

import hashlib
import io
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import pydicom
from pydicom import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AddressInformation, AssociationSocket

from db.errors import PermanentError
from dicom_sr.plan import REPORT
from dicom_sr.requestor import sole_reader

MAX_PDU = 128 * 1024  # bytes


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


#: PS3.4 Table B.2-1; 0111 says that the peer has the instance already.
WARNINGS = frozenset({0x0111, 0xB000, 0xB006, 0xB007})
CONTEXT_REFUSED = Answer(Outcome.REFUSED, "context_refused")


def answer_for(status: int) -> Answer:
    """The meaning of a C-STORE status (PS3.4 B.2.3)."""
    code = f"0x{status:04X}"
    if status == 0x0000:
        return Answer(Outcome.ACCEPTED, code)
    if status in WARNINGS or status & 0xF000 == 0xB000:
        return Answer(Outcome.WARNING, code)
    if status & 0xFF00 == 0xA700:
        return Answer(Outcome.TRANSIENT, code)
    return Answer(Outcome.REFUSED, code)


def is_delivered(code: str) -> bool:
    """Whether a code that was stored as an answer means that the peer has the object."""
    try:
        return answer_for(int(code, 16)).is_delivered
    except ValueError:
        return False  # a word, not a status


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Where to, and how patiently."""

    host: str
    port: int
    ae_title: str
    calling_ae: str
    tls: ssl.SSLContext | None = None
    connect_timeout_s: float = 10.0
    acse_timeout_s: float = 30.0
    dimse_timeout_s: float = 60.0  # for the answer to one object
    network_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What an association came to: an answer for each object that was tried."""

    answers: Mapping[str, Answer]  # by SOP Instance UID
    error: str = ""  # why it ended early: a word, empty if it did not


def push(peer: Peer, parcels: Sequence[Parcel]) -> Delivery:
    """Send the parcels in order; stops early where trying on would be in vain.

    Of several reports (one result in several SR classes) the first whose class the peer accepts is
    sent, and the others are not.
    """
    contexts = proposed(parcels)
    entity = _Entity(peer.calling_ae)
    try:
        association = _associate(entity, peer, contexts)
    except OSError:  # a name that does not resolve, which pynetdicom passes on
        entity.close_sockets()
        return Delivery({}, "no_connection")
    with _closing(association, entity, peer):
        if association.is_established:
            with sole_reader(association):
                return _send_all(association, parcels)
        if not entity.was_connected:
            return Delivery({}, "no_connection")
        return _not_established(association, parcels)


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


def _associate(entity: "_Entity", peer: Peer, contexts: list[PresentationContext]) -> Association:
    entity.connection_timeout = peer.connect_timeout_s
    entity.acse_timeout = peer.acse_timeout_s
    entity.dimse_timeout = peer.dimse_timeout_s
    entity.network_timeout = peer.network_timeout_s
    return entity.associate(
        peer.host,
        peer.port,
        contexts=contexts,
        ae_title=peer.ae_title,
        max_pdu=MAX_PDU,
        tls_args=(peer.tls, peer.host) if peer.tls else None,
        evt_handlers=[(evt.EVT_CONN_OPEN, entity.on_open)],
    )


@contextmanager
def _closing(association: Association, entity: "_Entity", peer: Peer) -> Iterator[None]:
    try:
        yield
    finally:
        if association.is_established:  # the peer did not answer the release
            association.abort()
        if association.is_alive():
            association.join(timeout=peer.acse_timeout_s)
        entity.close_sockets()


class _Entity(AE):
    """Keeps hold of its sockets, which pynetdicom leaves open where the peer hung up first or never
    answered: retries over a long weekend would use up the file descriptors."""

    def __init__(self, ae_title: str) -> None:
        super().__init__(ae_title)
        self._sockets: list[socket.socket] = []
        self.was_connected = False

    def _create_socket(
        self,
        assoc: Association,
        address: AddressInformation,
        tls_args: tuple[ssl.SSLContext, str] | None,
    ) -> AssociationSocket:
        made = super()._create_socket(assoc, address, tls_args)
        if made.socket is not None:
            # Without it Nagle and delayed acknowledgements add 40 ms to every object.
            made.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(made.socket)
        return made

    def on_open(self, event: evt.Event) -> None:
        self.was_connected = True
        transport = event.assoc.dul.socket
        if transport is not None and transport.socket is not None:
            self._sockets.append(transport.socket)  # another one where TLS wraps it

    def close_sockets(self) -> None:
        for made in self._sockets:
            with suppress(OSError):
                made.close()


def _not_established(association: Association, parcels: Sequence[Parcel]) -> Delivery:
    if association.is_rejected:
        return Delivery({}, "association_rejected")
    # Accepted, but none of its contexts: pynetdicom aborts such an association by itself.
    if association.rejected_contexts and not association.accepted_contexts:
        return Delivery({parcel.sop_instance_uid: CONTEXT_REFUSED for parcel in parcels})
    return Delivery({}, "association_aborted")


def _send_all(association: Association, parcels: Sequence[Parcel]) -> Delivery:
    answers: dict[str, Answer] = {}
    has_report = False
    for parcel in parcels:
        if parcel.role == REPORT and has_report:
            continue
        answer = _send(association, parcel)
        if answer is None:
            return Delivery(answers, "no_answer")
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


def _send(association: Association, parcel: Parcel) -> Answer | None:
    """None where the peer gave no answer: it aborted, stalled or went away."""
    accepted = [
        context.transfer_syntax[0]
        for context in association.accepted_contexts
        if context.abstract_syntax == parcel.sop_class_uid
    ]
    if not accepted:
        return CONTEXT_REFUSED
    built = _read(parcel, accepted)
    if built is None:
        return CONTEXT_REFUSED
    try:
        status = association.send_c_store(built)
    except (RuntimeError, ValueError):  # it ended between two objects
        return None
    return answer_for(status.Status) if "Status" in status else None


def _read(parcel: Parcel, accepted: Sequence[UID]) -> Dataset | None:
    """The stored object; decompressed where the peer does not take it as it is (no loss: RLE)."""
    built = pydicom.dcmread(io.BytesIO(parcel.read()))
    syntax = built.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax in accepted:
        return built
    if not any(not offered.is_compressed for offered in accepted):
        return None
    built.decompress(generate_instance_uid=False)
    return built
