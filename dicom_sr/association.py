"""An association with a destination: made, ended whatever happens, and why there is none."""

import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at run time
from pynetdicom.transport import AddressInformation, AssociationSocket

from config.settings import ScpSettings
from config.tenants import Destination, Sender, Tenant
from db.reach import Unreachable
from dicom_sr.line import Line, NoLine, TlsFiles, connect
from dicom_sr.requestor import sole_reader

MAX_PDU = 128 * 1024  # bytes
#: A slow line, a branch's or a VPN's, is given the time that it needs.
MIN_BYTES_PER_S = 20_000.0
ABORTED = "association_aborted"
NO_ECHO = "echo_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Where to, and how patiently."""

    host: str
    port: int
    ae_title: str
    calling_ae: str
    tls: TlsFiles | None = None
    tls_name: str = ""  # in its certificate; empty: `host`
    connect_timeout_s: float = 10.0
    acse_timeout_s: float = 30.0
    dimse_timeout_s: float = 60.0  # for the answer to one object, beside what its bytes take
    min_bytes_per_s: float = MIN_BYTES_PER_S
    network_timeout_s: float = 60.0


def peer_of(tenant: Tenant, destination: Destination, scp: ScpSettings) -> Peer:
    """A configured destination; over TLS we show the certificate that our listener shows."""
    return Peer(
        host=destination.host,
        port=destination.port,
        ae_title=destination.ae_title,
        calling_ae=tenant.calling_ae(destination),
        tls=TlsFiles(scp.tls_ca, scp.tls_cert, scp.tls_key) if destination.tls else None,
        tls_name=destination.tls_name,
    )


def caller_of(sender: Sender, address: str, calling_ae: str, scp: ScpSettings) -> Peer:
    """A sender that listens for reports; over TLS where it must show a certificate itself.

    Its certificate is held against the address: no name of it is known.
    """
    return Peer(
        host=address,
        port=sender.port,
        ae_title=sender.ae_title,
        calling_ae=calling_ae,
        tls=TlsFiles(scp.tls_ca, scp.tls_cert, scp.tls_key) if sender.tls_subject else None,
    )


def echo(peer: Peer) -> str:
    """Ask by C-ECHO; empty where it answers, else why not, in one word."""
    try:
        with speaking(peer, [build_context(Verification)]) as (association, entity):
            if not association.is_established:
                return why_not(association, entity)
            with sole_reader(association):
                answer = association.send_c_echo()
                return "" if answer.get("Status") == 0x0000 else NO_ECHO
    except NoLine as none:
        return none.why


@contextmanager
def speaking(
    peer: Peer,
    contexts: Sequence[PresentationContext],
    *,
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
) -> Iterator[tuple[Association, "Entity"]]:
    """An association, established or not; ended and closed on leaving.

    Raises
    ------
    NoLine
        Before anything was said.
    """
    made = connect(
        peer.host,
        peer.port,
        peer.tls,
        tls_name=peer.tls_name,
        connect_timeout_s=peer.connect_timeout_s,
        io_timeout_s=peer.network_timeout_s,
    )
    # pynetdicom leaves it open where the peer hung up first or never answered: retries over a
    # long weekend would use up the file descriptors.
    with closing(made):
        entity = Entity(peer, made)
        # The line stands: the address is not looked at, nor a name resolved once more.
        association = entity.associate(
            "127.0.0.1",
            peer.port,
            contexts=list(contexts),
            ae_title=peer.ae_title,
            max_pdu=MAX_PDU,
            ext_neg=list(roles),
        )
        with _ended(association, peer):
            yield association, entity


def why_not(association: Association, entity: "Entity") -> str:
    """Why an association was not established."""
    if association.is_rejected:
        return Unreachable.ASSOCIATION_REJECTED
    return Unreachable.TLS_REFUSED if entity.was_refused_tls else ABORTED


@contextmanager
def _ended(association: Association, peer: Peer) -> Iterator[None]:
    try:
        yield
    finally:
        if association.is_established:  # the peer did not answer the release
            association.abort()
        if association.is_alive():
            association.join(timeout=peer.acse_timeout_s)


class Entity(AE):
    """Speaks over a line that was made for it."""

    def __init__(self, peer: Peer, made: socket.socket) -> None:
        super().__init__(peer.calling_ae)
        self.acse_timeout = peer.acse_timeout_s
        self.dimse_timeout = peer.dimse_timeout_s
        self.network_timeout = peer.network_timeout_s
        self._made, self._is_secured = made, peer.tls is not None
        self._line: Line | None = None

    @property
    def was_refused_tls(self) -> bool:
        """Whether the peer ended TLS before it said anything over it.

        With TLS 1.3 our handshake is over before the peer has judged our certificate
        (RFC 8446 4.4.2.4), and its alert is lost where its hanging up overtakes it.
        """
        line = self._line
        return self._is_secured and line is not None and line.was_cut and not line.has_heard

    def _create_socket(
        self,
        assoc: Association,
        address: AddressInformation,
        tls_args: tuple[ssl.SSLContext, str] | None,
    ) -> AssociationSocket:
        self._line = Line(assoc, address, self._made)
        return self._line
