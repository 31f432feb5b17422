"""pynetdicom's upper layer made fit for a listener: it waits instead of polling, bounds what a peer
may make it hold, and lets data sets flow into the spool while they arrive.

Measured with 3.0.4: its reactors wake 2,000 times a second and association, read in 4 kB steps,
never time out inside a PDU, and believe any PDU length up to 4 GiB.
"""

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any, Protocol, cast

import pydicom.config
from pynetdicom import _config, evt
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ, DIMSEMessage
from pynetdicom.dul import DULServiceProvider
from pynetdicom.fsm import InvalidEventError, StateMachine
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket

_CLOSED, _CLOSING = "Sta1", "Sta13"  # PS3.8 9.2: idle; awaiting the transport's close
# Primitives of ours: accept, reject, data, release, its answer, abort (PS3.8 Table 9-6).
_OURS = frozenset({"Evt7", "Evt8", "Evt9", "Evt11", "Evt14", "Evt15"})
_TICK_S = 0.25  # how late a timer may be noticed
_MAX_PDU_BYTES = 4 * 2**20  # some peers send more than they were told to
_MAX_COMMAND_BYTES = 2**18
_MAX_MEMORY_BYTES = 16 * 2**20  # data sets of other services than storage
_SLOWEST_BYTES_PER_S = 1024  # over a whole message, once it has taken a time-out's length


def configure() -> None:
    """Set the libraries' switches, once, before any association."""
    _config.LOG_HANDLER_LEVEL = "none"  # its handlers log identifiers
    # Malformed titles and UIDs are judged by admission and intake, not by an abort.
    _config.VALIDATORS["AE"] = lambda value: (True, "")
    _config.VALIDATORS["UI"] = lambda value: (True, "")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE


class ProtocolError(Exception):
    """The peer passed a bound; it gets an A-ABORT."""


class _Bell(queue.Queue[Any]):
    """A queue that wakes whoever waits for several things at once."""

    def __init__(self, ring: Callable[[], None]) -> None:
        super().__init__()
        self._ring = ring

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        self._ring()


class Line(AssociationSocket):
    """A peer's connection: whole reads, a deadline for each PDU, a bound for its length."""

    def __init__(self, assoc: Association, connection: socket.socket, timeout_s: float) -> None:
        super().__init__(assoc, client_socket=connection)
        self._timeout_s = timeout_s
        self._buffered = getattr(connection, "pending", lambda: 0)  # of a TLS connection
        connection.settimeout(timeout_s)

    @property
    def ready(self) -> bool:
        return self.wait(0)

    def wait(self, timeout_s: float, wake_fd: int | None = None) -> bool:
        """Wait until there is something to read, or `wake_fd` is readable; True for the former."""
        is_open = self.socket is not None and self._is_connected
        if is_open and self._buffered():
            return True
        poll = select.poll()
        try:
            fd = self.socket.fileno() if is_open and self.socket else -1
            if wake_fd is not None:
                poll.register(wake_fd, select.POLLIN)
            if is_open:
                poll.register(fd, select.POLLIN)
            return any(found == fd for found, _ in poll.poll(timeout_s * 1000))
        except (OSError, ValueError):  # closed by another thread meanwhile
            self.event_queue.put("Evt17")
            return False

    def _shutdown_socket(self) -> None:
        """Close it also where the peer was faster, which the base class leaves to the collector."""
        connection = self.socket
        if connection is None:
            return
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def recv(self, nr_bytes: int) -> bytearray:
        """Read `nr_bytes`, or fewer if the peer closes. Raises OSError past deadline or bound."""
        if nr_bytes > _MAX_PDU_BYTES:
            raise OSError("the PDU is too long")
        connection = cast(socket.socket, self.socket)
        data = bytearray(nr_bytes)
        view = memoryview(data)
        deadline = time.monotonic() + self._timeout_s
        while len(view):
            got = connection.recv_into(view)
            if got == 0:
                return data[: nr_bytes - len(view)]
            view = view[got:]
            if time.monotonic() > deadline:
                raise TimeoutError("the PDU takes too long")
        return data


class Machine(StateMachine):
    """The library's, which knows no primitive of ours that crosses an abort of theirs."""

    def do_action(self, event: str) -> None:
        """Take an event; what comes once the line is lost changes nothing.

        A peer that sends data with its A-ASSOCIATE-RQ is aborted while we still decide to accept.
        """
        try:
            super().do_action(event)
        except InvalidEventError:
            if self.current_state not in (_CLOSED, _CLOSING):
                raise
            if event in _OURS:  # or the provider would find it there again, without end
                with contextlib.suppress(queue.Empty):
                    self.dul.to_provider_queue.get_nowait()


class Provider(DULServiceProvider):
    """The upper layer's thread, asleep until its line or its user has something for it."""

    def __init__(self, assoc: Association) -> None:
        super().__init__(assoc)
        self.state_machine = Machine(self)
        self._run_loop_delay = 0
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = (
            threading.Lock()
        )  # a closed descriptor's number may be a spool file's next
        self.to_provider_queue = _Bell(self.wake)

    def run_reactor(self) -> None:
        """Until the line is closed; who still waits for the peer's first word then need not."""
        try:
            super().run_reactor()
        finally:
            self.to_user_queue.put(None)  # `receive_pdu` passes it on

    def _decode_pdu(self, bytestream: bytearray) -> tuple[Any, str]:
        """As the library does; what makes no primitive is invalid here, not a crash later.

        Such as an A-ABORT from nobody: its source is neither the user nor the provider.
        """
        pdu, event = super()._decode_pdu(bytestream)
        if not isinstance(pdu, P_DATA_TF):
            pdu.to_primitive()
        return pdu, event

    def wake(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _is_transport_event(self) -> bool:
        line = cast(Line, self.socket)
        # Sta13 waits for nothing but the peer's close, and its action closes when there is no more.
        if self.event_queue.empty() and not line.wait(_TICK_S, self._wake_fd):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            if self.state_machine.current_state != _CLOSING:
                return False
        return bool(super()._is_transport_event())

    def kill_dul(self) -> None:
        super().kill_dul()
        self.wake()

    def stop_dul(self) -> bool:
        if self.state_machine.current_state != _CLOSED:
            return False
        self._kill_thread = True
        self.wake()
        self.join()
        return True

    def close(self) -> None:
        with self._wake_lock:
            fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)


class Inflow(BytesIO):
    """Where one message's data set goes: into a sink for C-STORE, else into bounded memory."""

    def __init__(self, reception: "Reception", message: DIMSEMessage) -> None:
        super().__init__()
        self._reception, self._message = reception, message
        self._started = time.monotonic()
        self._size = 0
        self.sink: Sink | None = None

    def write(self, data: Any) -> int:
        self._size += len(data)
        took = time.monotonic() - self._started
        if took > self._reception.patience_s and self._size < took * _SLOWEST_BYTES_PER_S:
            raise ProtocolError("the message trickles")
        if not isinstance(self._message, C_STORE_RQ):
            if self._size > _MAX_MEMORY_BYTES:
                raise ProtocolError("the data set is too long")
            return super().write(data)
        if self.sink is None:
            self.sink = self._reception.open_sink(self._message)
        self.sink.write(data)
        return len(data)

    def discard(self) -> None:
        if self.sink is not None:
            self.sink.discard()


class Sink(Protocol):
    """What a data set flows into while it arrives."""

    def write(self, data: bytes) -> None: ...

    def discard(self) -> None: ...


class Messages(DIMSEServiceProvider):
    """DIMSE messages assembled with bounds."""

    def __init__(self, assoc: "Reception", ring: Callable[[], None]) -> None:
        super().__init__(assoc)
        self.msg_queue = _Bell(ring)

    def receive_primitive(self, primitive: P_DATA) -> None:
        if self.message is None:
            self.message = DIMSEMessage()
            self.message.data_set = Inflow(cast(Reception, self.assoc), self.message)
        message = self.message
        inflow = cast(Inflow, message.data_set)
        try:
            super().receive_primitive(primitive)
            if message.encoded_command_set.tell() > _MAX_COMMAND_BYTES:
                raise ProtocolError("the command is too long")
        except Exception:  # noqa: BLE001 - a peer's bytes may raise anything in the library
            inflow.discard()
            self.dul.event_queue.put("Evt19")  # invalid PDU: A-ABORT (PS3.8 9.2, AA-8)

    def discard(self) -> None:
        """Let go of what was still arriving or waiting when the association ended."""
        if self.message is not None:
            cast(Inflow, self.message.data_set).discard()
        while True:
            _, request = self.get_msg(block=False)
            if request is None:
                return
            inflow = getattr(request, "DataSet", None)
            if isinstance(inflow, Inflow):
                inflow.discard()


class Reception(Association):
    """An association in which we accept; `open_sink` is for who knows the spool."""

    def __init__(self, ae: ApplicationEntity, *, patience_s: float) -> None:
        super().__init__(ae, MODE_ACCEPTOR)
        self.patience_s = patience_s
        self._work = threading.Event()
        self.dimse: Messages = Messages(self, self._work.set)
        self.dul: Provider = Provider(self)
        self.dul.to_user_queue = _Bell(self._work.set)
        self.acse_timeout, self.network_timeout = ae.acse_timeout, ae.network_timeout

    def open_sink(self, message: DIMSEMessage) -> Sink:
        raise NotImplementedError

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        finally:
            self.kill()
            self.dul.join(self.patience_s)
            self.dimse.discard()
            self.dul.close()

    def _run_reactor(self) -> None:
        """Serve until the peer releases, aborts, vanishes or falls silent."""
        self._is_paused = False
        while not self._kill:
            self._work.wait(_TICK_S)
            self._work.clear()
            self._serve_next()
            if self.is_established and self.acse.is_release_requested():
                self.acse.send_release(is_response=True)
                self.is_released, self.is_established = True, False
                evt.trigger(self, evt.EVT_RELEASED, {})
                self._kill = True
            elif self.acse.is_aborted():
                self.dul.receive_pdu(wait=False)
                self.is_aborted, self.is_established = True, False
                evt.trigger(self, evt.EVT_ABORTED, {})
                self._kill = True
            elif not self.dul.is_alive():
                self._kill = True
            elif self.dul.idle_timer_expired():
                self.abort()
        self.kill()  # waits until the last answer is sent

    def _serve_next(self) -> None:
        context_id, message = self.dimse.get_msg(block=False)
        if message is not None:
            self._serve_request(message, cast(int, context_id))
            self.dul._idle_timer.restart()  # a slow disk of ours is no silence of theirs
            self._work.set()  # there may be more
