"""A DICOM peer made of bytes: what no library would send, it sends, and it reads what comes back.

PDUs are those of PS3.8 9.3, commands those of PS3.7 9.3 and E.1.
"""

import contextlib
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

VERIFICATION, CT = "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.1.2"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RP, ABORT = 0x02, 0x03, 0x04, 0x06, 0x07
_APPLICATION = "1.2.840.10008.3.1.1.1"
_LAST, _COMMAND = 0x02, 0x01
_FRAGMENT_BYTES = 16000

Context = tuple[str, Sequence[str]]  # abstract syntax, transfer syntaxes


def item(kind: int, value: bytes) -> bytes:
    """An item or sub-item of an A-ASSOCIATE PDU."""
    return struct.pack(">BxH", kind, len(value)) + value


def pdu(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxI", kind, len(value)) + value


def associate_rq(
    contexts: Sequence[Context], called: str, calling: str, *, max_pdu: int = 0, user: bytes = b""
) -> bytes:
    """An A-ASSOCIATE-RQ; context ids are 1, 3, 5, ...

    user : further user information sub-items (PS3.7 D.3.3)
    """
    proposed = b"".join(
        item(0x20, struct.pack("BBBB", 2 * n + 1, 0, 0, 0) + _syntaxes(*context))
        for n, context in enumerate(contexts)
    )
    information = item(0x51, struct.pack(">I", max_pdu)) + item(0x52, b"1.2.3.4") + user
    titles = called.encode().ljust(16) + calling.encode().ljust(16)
    body = struct.pack(">HH", 1, 0) + titles + bytes(32)
    return pdu(0x01, body + item(0x10, _APPLICATION.encode()) + proposed + item(0x50, information))


def _syntaxes(abstract: str, transfer: Sequence[str]) -> bytes:
    return item(0x30, abstract.encode()) + b"".join(item(0x40, t.encode()) for t in transfer)


def pdv(context: int, header: int, data: bytes) -> bytes:
    """A P-DATA-TF of one fragment; `header` is its message control header."""
    value = struct.pack(">IBB", len(data) + 2, context, header) + data
    return pdu(P_DATA, value)


def command(values: Mapping[int, bytes]) -> bytes:
    """A command set by element number; values are padded with NUL."""
    body = b"".join(
        struct.pack("<HHI", 0, number, len(value) + len(value) % 2)
        + value
        + b"\0" * (len(value) % 2)
        for number, value in sorted(values.items())
    )
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def c_store_rq(sop_class: str, sop_instance: str, message_id: int = 1) -> bytes:
    return command(
        {
            0x0002: sop_class.encode(), 0x0100: b"\x01\x00",
            0x0110: struct.pack("<H", message_id), 0x0700: b"\x00\x00", 0x0800: b"\x01\x00",
            0x1000: sop_instance.encode(),
        }
    )  # fmt: skip


def c_echo_rq(message_id: int = 1) -> bytes:
    return command(
        {
            0x0002: VERIFICATION.encode(), 0x0100: b"\x30\x00",
            0x0110: struct.pack("<H", message_id), 0x0800: b"\x01\x01",
        }
    )  # fmt: skip


def store_pdus(context: int, sop_class: str, sop_instance: str, body: bytes) -> Iterator[bytes]:
    """One C-STORE, PDU by PDU."""
    yield pdv(context, _COMMAND | _LAST, c_store_rq(sop_class, sop_instance))
    for at in range(0, max(len(body), 1), _FRAGMENT_BYTES):
        piece = body[at : at + _FRAGMENT_BYTES]
        yield pdv(context, _LAST * (at + _FRAGMENT_BYTES >= len(body)), piece)


def statuses(received: Iterable[tuple[int, bytes]]) -> list[int]:
    """The DIMSE statuses in P-DATA that were received, each in one fragment, as answers are."""
    found = []
    for kind, value in received:
        at = value.find(b"\x00\x00\x00\x09\x02\x00\x00\x00") if kind == P_DATA else -1
        if at >= 0:
            found.append(struct.unpack_from("<H", value, at + 8)[0])
    return found


class Gone(Exception):
    """The other side closed the connection, or aborted."""


class RawPeer:
    """A connection that speaks in PDUs; nothing runs in the background."""

    def __init__(self, port: int, *, timeout_s: float = 60.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.accepted: dict[int, str] = {}  # context id -> transfer syntax
        self.user: dict[int, bytes] = {}  # user information sub-items of the answer

    def associate(
        self,
        contexts: Sequence[Context] = ((CT, (EXPLICIT,)),),
        called: str = "NORTH_AI",
        calling: str = "CT1",
        *,
        user: bytes = b"",
    ) -> Self:
        """Raises Gone where it is refused, and closes the connection."""
        try:
            self.socket.sendall(associate_rq(contexts, called, calling, user=user))
            kind, value = self.receive()
        except (OSError, Gone):
            self.close()
            raise
        if kind != ASSOCIATE_AC:
            self.close()
            raise Gone(f"answered with PDU {kind:02X} {value[:4].hex()}")
        for name, content in _items(value[68:]):
            if name == 0x21 and content[2] == 0:  # acceptance
                (_, syntax), *_ = _items(content[4:])
                self.accepted[content[0]] = syntax.decode()
            elif name == 0x50:
                self.user = dict(_items(content))
        return self

    def store(self, sop_class: str, sop_instance: str, body: bytes, *, context: int = 1) -> int:
        """The status of one C-STORE."""
        try:
            for sent in store_pdus(context, sop_class, sop_instance, body):
                self.socket.sendall(sent)
        except OSError:
            raise Gone("the line broke") from None
        return self.status()

    def echo(self, *, context: int = 1) -> int:
        self.socket.sendall(pdv(context, _COMMAND | _LAST, c_echo_rq()))
        return self.status()

    def status(self) -> int:
        """Of the next answer."""
        found = statuses([self.receive()])
        if not found:
            raise Gone("no answer, but another PDU")
        return found[0]

    def receive(self) -> tuple[int, bytes]:
        """The next PDU's type and value; Gone where there is none."""
        head = self._exactly(6)
        kind, length = struct.unpack(">BxI", head)
        return kind, self._exactly(length)

    def rest(self) -> list[tuple[int, bytes]]:
        """All PDUs until the other side closes, or falls silent."""
        found = []
        with contextlib.suppress(Gone, TimeoutError):
            while True:
                found.append(self.receive())
        return found

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                got = self.socket.recv(size - len(data))
            except ConnectionError:
                got = b""
            if not got:
                raise Gone("the connection is closed")
            data += got
        return bytes(data)

    def release(self) -> None:
        with contextlib.suppress(OSError, Gone):
            self.socket.sendall(pdu(0x05, bytes(4)))
            self.receive()
        self.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        kind, length = struct.unpack_from(">BxH", data, at)
        yield kind, data[at + 4 : at + 4 + length]
        at += 4 + length
