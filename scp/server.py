"""The listener: connections become associations, associations are admitted, data sets are kept."""

import contextlib
import datetime as dt
import socket
import socketserver
import ssl
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeGuard, cast

import structlog
from pynetdicom import AE, evt
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.transport import (
    AddressInformation,
    RequestHandler,
    ThreadedAssociationServer,
)

from config.settings import ScpSettings
from db import transaction
from db.meta import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, Provenance
from scp import commitment, presentation, store
from scp.admission import Admission, Caller, LimitReached, Refusal
from scp.door import Door
from scp.tls import subject
from scp.upper_layer import Line, Reception

_SPARE_CONNECTIONS = 64  # beside the associations: probes, refusals, handshakes
_SHUTDOWN_S = 5.0  # for C-STOREs under way
log = structlog.get_logger()


class StoreReception(Reception):
    """One association with a sender."""

    def __init__(
        self, ae: AE, door: Door, connection: socket.socket, on_end: Callable[[], None]
    ) -> None:
        super().__init__(ae, patience_s=door.settings.scp.dimse_timeout_s)
        self._door, self._on_end = door, on_end
        self._admission: Admission | None = None
        self._slot = contextlib.ExitStack()
        self._id = uuid.uuid4().hex
        self._tls_subject = subject(connection)
        self._n_kept = 0
        self.set_socket(Line(self, connection, door.settings.scp.dimse_timeout_s))
        self.bind(evt.EVT_REQUESTED, lambda event: self._judge())

    def run_reactor(self) -> None:
        started = time.monotonic()
        structlog.contextvars.bind_contextvars(association=self._id)
        try:
            super().run_reactor()
        finally:
            self._slot.close()
            self._on_end()
            if self._admission is not None:
                log.info(
                    "association_ended",
                    outcome="released" if self.is_released else "aborted",
                    n_instances=self._n_kept,
                    duration_s=round(time.monotonic() - started, 3),
                )

    def _judge(self) -> None:
        """Admit or refuse, before anything else is negotiated."""
        request = cast(A_ASSOCIATE, self.requestor.primitive)
        requested = presentation.well_formed(request.presentation_context_definition_list)
        request.presentation_context_definition_list = requested
        caller = Caller(
            called_ae=request.called_ae_title,
            calling_ae=request.calling_ae_title,
            address=self._peer.address,
            local_host=self._local.address,
            tls_subject=self._tls_subject,
            is_verification_only=presentation.is_verification_only(requested),
        )
        found = self._door.admit(caller)
        if isinstance(found, Admission):
            try:
                self._slot.enter_context(self._door.limits.slot(found))
            except LimitReached:
                self._door.refused("limit", caller)
                found = Refusal.LIMIT
        if isinstance(found, Refusal):
            self.acse.send_reject(*found.value)
            self.kill()  # without it the A-ASSOCIATE-RJ is not delivered
            return
        self._admission = found
        self.acceptor.supported_contexts = presentation.supported(
            requested, storage=found.may_store, commitment=found.may_commit
        )
        log.info(
            "association_accepted",
            tenant=found.tenant.id,
            calling_ae=caller.calling_ae,
            address=caller.address,
        )

    @property
    def _peer(self) -> AddressInformation:
        return cast(AddressInformation, self.requestor.address_info)

    @property
    def _local(self) -> AddressInformation:
        return cast(AddressInformation, self.acceptor.address_info)

    def open_sink(self, message: DIMSEMessage) -> store.Keeping:
        source = self._source(cast(int, message.context_id), message)
        return store.Keeping(self._door.spool, self._door.settings.node.min_free_mb, source)

    def _source(self, context_id: int, message: DIMSEMessage | None = None) -> Provenance:
        if self._admission is None:
            raise PermissionError("a data set before admission")
        local = f"{self._local.address}:{self._local.port}"
        syntax = str(self._accepted_cx[context_id].transfer_syntax[0])
        return store.provenance(self._admission, syntax, self._id, local, message)

    def _serve_request(self, message: Any, context_id: int) -> None:
        if isinstance(message, C_STORE):
            context = self._accepted_cx.get(context_id)
            status = store.answer(message, str(context.abstract_syntax) if context else "")
            self._n_kept += status == store.SUCCESS
            if message.MessageID is not None:
                self.dimse.send_msg(store.response(message, status), context_id)
        elif self._is_commitment(message, context_id):
            source = self._source(context_id)
            answered = commitment.answer(message, self._admission, self._door.spool, source)
            self.dimse.send_msg(answered, context_id)
        else:
            super()._serve_request(message, context_id)

    def _is_commitment(self, message: Any, context_id: int) -> TypeGuard[commitment.Message]:
        context = self._accepted_cx.get(context_id)
        return (
            isinstance(message, commitment.Message)
            and message.is_valid_request
            and context is not None
            and context.abstract_syntax == transaction.SOP_CLASS
        )

    def _serve_next(self) -> None:
        super()._serve_next()
        if self._door.is_closing.is_set() and self.dimse.message is None:
            self.abort()  # between two messages: what was acknowledged is kept


class _Handler(RequestHandler):
    server: "Listener"
    request: socket.socket

    def _create_association(self) -> StoreReception:
        server = self.server
        reception = StoreReception(self.ae, server.door, self.request, server.leave)
        reception._server = server
        reception.name = f"AcceptorThread@{dt.datetime.now(dt.UTC):%Y%m%d%H%M%S}"
        reception.acceptor.maximum_length = self.ae.maximum_pdu_size
        reception.acceptor.ae_title = server.ae_title
        reception.acceptor.address_info = self.local
        reception.acceptor.implementation_class_uid = self.ae.implementation_class_uid
        reception.acceptor.implementation_version_name = self.ae.implementation_version_name
        reception.acceptor.supported_contexts = []  # nothing before admission
        reception.requestor.address_info = self.remote
        return reception


class Listener(ThreadedAssociationServer):
    """Accepts on a socket that its parent process opened and that its siblings share."""

    daemon_threads = True

    def __init__(
        self, ae: AE, listening: socket.socket, door: Door, tls: ssl.SSLContext | None = None
    ) -> None:
        self.door = door
        self._listening, self._tls = listening, tls
        limit = 2 * door.settings.scp.max_associations + _SPARE_CONNECTIONS
        self._room = threading.BoundedSemaphore(limit)
        super().__init__(ae, listening.getsockname(), ae.ae_title, [], request_handler=_Handler)

    def server_bind(self) -> None:
        cast(socket.socket, self.socket).close()  # the base class's own
        self.socket = self._listening
        # Siblings race for each connection; who loses must not sleep in accept.
        self._listening.setblocking(False)
        self.server_address = self._listening.getsockname()

    def server_activate(self) -> None:
        pass  # it listens already

    def server_close(self) -> None:
        self._listening.close()  # no shutdown(2): it would deafen the siblings too

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = self._listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._room.acquire(blocking=False)

    def leave(self) -> None:
        self._room.release()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            opened = self._open(request, client_address)
        except OSError:  # TLS errors and time-outs among them
            opened = None
        if opened is None:
            self.shutdown_request(request)
            self.leave()
            return
        self.finish_request(opened, client_address)

    def _open(self, connection: socket.socket, address: Any) -> socket.socket | None:
        """Wait for the peer's first word, off the accept loop; None for a mere probe."""
        connection.settimeout(self.door.settings.scp.acse_timeout_s)
        if not connection.recv(1, socket.MSG_PEEK):
            return None
        if self._tls is None:
            return connection
        try:
            return self._tls.wrap_socket(connection, server_side=True)
        except (OSError, ValueError):
            self.door.refused("tls", Caller(called_ae="", calling_ae="", address=address[0]))
            return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("connection_failed")

    def service_actions(self) -> None:
        """Without the base class's garbage collection at every 59th tick."""


def application_entity(settings: ScpSettings, title: str) -> AE:
    """Our side of every association."""
    ae = AE(ae_title=title)
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    ae.maximum_pdu_size = settings.max_pdu
    ae.maximum_associations = 1_000_000  # `Limits` counts, by our rules
    ae.acse_timeout = settings.acse_timeout_s
    ae.dimse_timeout = settings.dimse_timeout_s
    ae.network_timeout = settings.idle_timeout_s
    return ae


def serve(listener: Listener) -> threading.Thread:
    thread = threading.Thread(target=listener.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    return thread


def stop(listeners: list[Listener], door: Door) -> None:
    """Stop accepting, let C-STOREs under way finish, then abort what is left."""
    for listener in listeners:
        socketserver.BaseServer.shutdown(listener)  # pynetdicom's would look for its own socket
        listener.server_close()
    door.is_closing.set()
    deadline = time.monotonic() + _SHUTDOWN_S
    while (running := _running(listeners)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for reception in running:
        reception.abort()


def _running(listeners: list[Listener]) -> list[StoreReception]:
    found = [reception for listener in listeners for reception in listener.active_associations]
    return cast(list[StoreReception], found)
