"""The line to a destination: connected, with TLS where it is asked for, or the reason why not.

pynetdicom would make it, too, but swallows why it could not, leaves the socket open then, and
afterwards waits on it without any limit.
"""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pynetdicom.association import Association
from pynetdicom.transport import T_CONNECT, AddressInformation, AssociationSocket

from db.reach import Unreachable

PIECE = 64 * 1024  # bytes


class NoLine(Exception):
    """No line could be made."""

    def __init__(self, why: Unreachable) -> None:
        super().__init__(why.value)
        self.why = why


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Read for each line, so that a renewed certificate needs no restart."""

    ca: str = ""  # who signs for the destinations; empty: whoever the system trusts
    cert: str = ""  # shown where the destination asks for one
    key: str = ""

    def context(self) -> ssl.SSLContext:
        """Chain and name are always verified (PS3.15 B.9: TLS 1.2 and later)."""
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            if self.cert:
                # With no password at all, a key that has one is asked for at the terminal.
                context.load_cert_chain(self.cert, self.key or None, password="")
        except OSError:  # missing, unreadable, no certificate, or no pair
            raise NoLine(Unreachable.TLS_FILES_UNUSABLE) from None
        return context


def connect(
    host: str,
    port: int,
    tls: TlsFiles | None,
    *,
    tls_name: str = "",
    connect_timeout_s: float,
    io_timeout_s: float,
) -> socket.socket:
    """A connected socket; no read or write on it waits longer than `io_timeout_s`.

    tls_name : what the peer's certificate must name, where that is not `host`

    Raises
    ------
    NoLine
        Nothing was sent; nothing is left open.
    """
    context = tls.context() if tls else None
    try:
        made = socket.create_connection((host, port), timeout=connect_timeout_s)
    except (OSError, UnicodeError):  # IDNA refuses some names
        raise NoLine(Unreachable.NO_CONNECTION) from None
    # Without it Nagle and delayed acknowledgements add 40 ms to every object.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if context is not None:
        made = _secured(made, context, tls_name or host)
    made.settimeout(io_timeout_s)
    return made


def _secured(made: socket.socket, context: ssl.SSLContext, name: str) -> ssl.SSLSocket:
    """The socket with TLS; closed where the handshake fails or does not end in time."""
    secured = context.wrap_socket(made, server_hostname=name, do_handshake_on_connect=False)
    try:
        secured.do_handshake()
    except OSError as error:
        has_spoken = secured.cipher() is not None  # set by its first answer in TLS
        secured.close()
        raise NoLine(_why(error, has_spoken)) from None
    return secured


# X509_V_ERR_* of OpenSSL.
_EXPIRED = 10
_WRONG_NAME = (62, 64)  # host name, IP address


def _why(error: OSError, has_spoken: bool) -> Unreachable:
    if isinstance(error, TimeoutError):
        return Unreachable.TLS_TIMEOUT
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == _EXPIRED:
            return Unreachable.CERTIFICATE_EXPIRED
        is_name = error.verify_code in _WRONG_NAME
        return (
            Unreachable.CERTIFICATE_WRONG_NAME if is_name else Unreachable.CERTIFICATE_NOT_TRUSTED
        )
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    is_tls = has_spoken or "ALERT" in reason or reason == "UNSUPPORTED_PROTOCOL"
    # A plain-text port answers with an A-ABORT, hangs up, or resets what it has not read.
    return Unreachable.TLS_REFUSED if is_tls else Unreachable.TLS_NOT_SPOKEN


class Line(AssociationSocket):
    """A line that stands already, as pynetdicom's associations want it."""

    def __init__(
        self, association: Association, address: AddressInformation, made: socket.socket
    ) -> None:
        self._made = made
        self.has_heard = False  # whether the peer has said anything, beyond TLS
        self.was_cut = False  # by the peer
        super().__init__(association, address=address)

    def _create_socket(self, address: AddressInformation) -> socket.socket:
        return self._made

    def connect(self, primitive: T_CONNECT) -> None:
        own = self._made.getsockname()
        self.assoc.requestor.address_info = AddressInformation.from_tuple(own)
        self._is_connected = True
        primitive.result = "Evt2"  # PS3.8 9.2.2: transport connection confirmation
        self.provider_queue.put(primitive)
        self._ready.set()

    def recv(self, nr_bytes: int) -> bytearray:
        with self._noting_a_cut():
            heard = super().recv(nr_bytes)
        self.has_heard = self.has_heard or bool(heard)
        self.was_cut = self.was_cut or not heard
        return heard

    def send(self, bytestream: bytes) -> None:
        try:
            with self._noting_a_cut():
                # In pieces: the limit is for the whole of a call, and a PDU can be a whole object.
                for start in range(0, len(bytestream), PIECE):
                    self._made.sendall(bytestream[start : start + PIECE])
        except OSError:
            self.event_queue.put("Evt17")  # transport connection closed

    @contextmanager
    def _noting_a_cut(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise
        except OSError:
            self.was_cut = True
            raise
