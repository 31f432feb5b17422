"""C-STORE a folder or a ZIP, as a scanner would: `vigil send`."""

import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any

from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association

from dicom_sr.requestor import sole_reader

# The bytes of the file go out as they are; nothing is decoded or converted on the way.
_config.STORE_SEND_CHUNKED_DATASET = True
_config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False

MAX_CONTEXTS = 128  # presentation context ids are odd numbers below 256 (PS3.8 9.3.2.2)
MAX_MEMBERS = 100_000
MAX_ZIP_BYTES = 20 * 2**30  # of a ZIP's content, unpacked
CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 120  # a receiver that syncs to a slow disk may need it

_WARNINGS = frozenset({0x0001, 0x0107, 0x0116, 0xB000, 0xB006, 0xB007})  # PS3.4 Table B.2-1


class Outcome(StrEnum):
    STORED = "stored"
    WARNED = "stored with a warning"
    REFUSED = "refused"  # the receiver answered with a failure, or took no such context
    NOT_SENT = "not sent"  # no connection, or it broke
    SKIPPED = "skipped"  # not DICOM


GOOD = frozenset({Outcome.STORED, Outcome.WARNED})


@dataclass(frozen=True, slots=True)
class Peer:
    """Where to send, and under which names."""

    host: str
    port: int
    called: str
    calling: str


@dataclass(frozen=True, slots=True)
class DicomFile:
    path: Path
    name: str  # as the user knows it: relative to the folder, or the ZIP's entry
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str

    @property
    def context(self) -> tuple[str, str]:
        return self.sop_class_uid, self.transfer_syntax_uid


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of one file."""

    name: str
    outcome: Outcome
    status: int | None = None  # the C-STORE answer
    reason: str = ""
    sop_instance_uid: str = ""

    def to_json(self) -> dict[str, Any]:
        status = None if self.status is None else f"0x{self.status:04X}"
        return {
            "file": self.name,
            "outcome": self.outcome.value,
            "status": status,
            "reason": self.reason,
            "sop_instance_uid": self.sop_instance_uid,
        }


@contextmanager
def opened(source: Path) -> Iterator[Path]:
    """The folder itself, or a temporary one with the ZIP's entries under names of our own.

    Raises
    ------
    ValueError
        If `source` is neither, or the ZIP is broken, encrypted or beyond the limits.
    """
    if source.is_dir():
        yield source
        return
    if not zipfile.is_zipfile(source):
        raise ValueError(f"{source} is neither a folder nor a ZIP")
    with tempfile.TemporaryDirectory(prefix="vigil-send-") as name:
        _unpack(source, Path(name))
        yield Path(name)


def gather(folder: Path) -> tuple[list[DicomFile], list[Sent]]:
    """All DICOM files below `folder` in the order of their names, and what was passed over."""
    files: list[DicomFile] = []
    passed: list[Sent] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        try:
            files.append(_read(path, name))
        except (InvalidDicomError, OSError, ValueError, KeyError, AttributeError) as error:
            reason = str(error) if type(error) is ValueError else "not a DICOM file"
            passed.append(Sent(name, Outcome.SKIPPED, reason=reason))
    return files, passed


def send(
    files: Sequence[DicomFile], peer: Peer, on_sent: Callable[[Sent], None] = lambda _: None
) -> list[Sent]:
    """Store every file at `peer`; one association, or more where its contexts do not suffice.

    `on_sent` is called after each file. Nothing is raised: a file's failure is its outcome.
    """
    answers: list[Sent] = []
    contexts = list(dict.fromkeys(file.context for file in files))
    for first in range(0, len(contexts), MAX_CONTEXTS):
        some = contexts[first : first + MAX_CONTEXTS]
        for answer in _over_one_association([f for f in files if f.context in some], peer, some):
            answers.append(answer)
            on_sent(answer)
    return answers


def echo(peer: Peer) -> str:
    """C-ECHO; empty when answered with success, else what went wrong."""
    ae = _entity(peer)
    ae.add_requested_context("1.2.840.10008.1.1")
    try:
        association = _associate(ae, peer)
    except OSError as error:  # its name does not resolve
        return f"no connection ({error.strerror or type(error).__name__})"
    if not association.is_established:
        return _why_not(association)
    try:
        status = association.send_c_echo()
    finally:
        association.release()
    if "Status" not in status:
        return "no answer"
    return "" if status.Status == 0 else f"answered 0x{status.Status:04X}"


def _over_one_association(
    files: Sequence[DicomFile], peer: Peer, contexts: Sequence[tuple[str, str]]
) -> Iterator[Sent]:
    ae = _entity(peer)
    for sop_class, syntax in contexts:
        ae.add_requested_context(sop_class, syntax)
    try:
        association = _associate(ae, peer)
    except OSError as error:  # its name does not resolve
        reason = f"no connection ({error.strerror or type(error).__name__})"
        for file in files:
            yield Sent(file.name, Outcome.NOT_SENT, None, reason, file.sop_instance_uid)
        return
    reason = "" if association.is_established else _why_not(association)
    with sole_reader(association):
        for file in files:
            if association.is_established:
                yield _store(association, file)
                continue
            reason = reason or "the connection broke"
            yield Sent(file.name, Outcome.NOT_SENT, None, reason, file.sop_instance_uid)


def _store(association: Association, file: DicomFile) -> Sent:
    accepted = {(c.abstract_syntax, c.transfer_syntax[0]) for c in association.accepted_contexts}
    if file.context not in accepted:
        reason = "the receiver takes no such SOP class in this transfer syntax"
        return Sent(file.name, Outcome.REFUSED, None, reason, file.sop_instance_uid)
    try:
        answer = association.send_c_store(file.path)
    except (OSError, RuntimeError, ValueError, AttributeError):
        reason = "the connection broke" if file.path.exists() else "the file is gone"
        return Sent(file.name, Outcome.NOT_SENT, None, reason, file.sop_instance_uid)
    if "Status" not in answer:
        return Sent(file.name, Outcome.NOT_SENT, None, "no answer", file.sop_instance_uid)
    status = int(answer.Status)
    outcome, reason = Outcome.STORED, ""
    if status in _WARNINGS:
        outcome = Outcome.WARNED
    elif status:
        outcome, reason = Outcome.REFUSED, f"answered 0x{status:04X}"
    return Sent(file.name, outcome, status, reason, file.sop_instance_uid)


def _entity(peer: Peer) -> AE:
    ae = AE(ae_title=peer.calling)
    ae.connection_timeout = ae.acse_timeout = CONNECT_TIMEOUT_S
    ae.dimse_timeout = ae.network_timeout = ANSWER_TIMEOUT_S
    ae.maximum_pdu_size = 131072
    return ae


def _associate(ae: AE, peer: Peer) -> Association:
    return ae.associate(
        peer.host, peer.port, ae_title=peer.called, evt_handlers=[(evt.EVT_CONN_OPEN, _no_delay)]
    )


def _no_delay(event: evt.Event) -> None:
    # Small PDUs wait up to 40 ms for the peer's delayed acknowledgement otherwise.
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _why_not(association: Association) -> str:
    if not association.is_rejected:
        return "no connection"
    said: Any = association.acceptor.primitive
    result, source, diagnostic = said.result, said.result_source, said.diagnostic
    return f"association rejected: {said.reason_str} ({result}/{source}/{diagnostic})"


def _read(path: Path, name: str) -> DicomFile:
    meta = read_file_meta_info(path)
    if meta.MediaStorageSOPClassUID == "1.2.840.10008.1.3.10":
        raise ValueError("a DICOMDIR is an index, not an image")
    return DicomFile(
        path,
        name,
        str(meta.MediaStorageSOPClassUID),
        str(meta.MediaStorageSOPInstanceUID),
        str(meta.TransferSyntaxUID),
    )


def _unpack(source: Path, folder: Path) -> None:
    """Write each entry under a number: no path out of an archive is ever used."""
    number = count(1)
    try:
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > MAX_MEMBERS or sum(m.file_size for m in members) > MAX_ZIP_BYTES:
                raise ValueError(f"{source} holds more than a study can")
            for member in members:
                target = folder / f"{next(number):06d}-{Path(member.filename).name[-60:]}"
                _copy(archive, member, target)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{source} cannot be unpacked: broken or encrypted") from error


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    left = member.file_size  # what the directory declares; more than that is a bomb
    with archive.open(member) as packed, target.open("xb") as file:
        while piece := packed.read(2**20):
            left -= len(piece)
            if left < 0:
                raise ValueError("an entry is larger than the ZIP says")
            file.write(piece)
