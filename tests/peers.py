"""A PACS that can be told to misbehave: a real storage SCP on loopback, in threads of the test."""

import ssl
import threading
from types import TracebackType
from typing import Any, Self

from pydicom import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from pynetdicom import AE, AllStoragePresentationContexts, evt

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless)


class Pacs:
    """Receives on a free port.

    Set at any time: `answer`, the status of the next stores; `answers`, statuses by SOP class,
    which win; `aborts_after`, how many stores it takes before it aborts; `stalls`, whether it
    never answers, and `stalls_after`, how many it answers before; `rejects`, whether it rejects
    associations.
    """

    def __init__(
        self,
        *,
        ae_title: str = "PACS",
        refuses: tuple[str, ...] = (),
        syntaxes: tuple[UID, ...] = SYNTAXES,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answer = 0x0000
        self.answers: dict[str, int] = {}
        self.aborts_after: int | None = None
        self.stalls = False
        self.stalls_after = 0
        self.is_stalled = threading.Event()  # somebody waits for an answer in vain
        self.rejects = False
        self.received: list[Dataset] = []  # every store, in order, also of the same instance
        self.raw: list[bytes] = []  # the encoded data sets as they came
        self.calling: list[str] = []
        self.proposed: list[list[str]] = []  # abstract syntaxes of each association
        self.ae_title = ae_title
        self._gone = threading.Event()
        self._tls = tls
        self._entity = AE(ae_title=ae_title)
        self._entity.maximum_pdu_size = 0
        for context in AllStoragePresentationContexts:
            if context.abstract_syntax not in refuses:
                self._entity.add_supported_context(str(context.abstract_syntax), list(syntaxes))
        self._entity.add_supported_context("1.2.840.10008.1.1")  # Verification
        self._start()

    def _handlers(self) -> list[Any]:
        return [(evt.EVT_C_STORE, self._store), (evt.EVT_REQUESTED, self._requested)]

    def _start(self, port: int = 0) -> None:
        handlers = self._handlers()
        server = self._entity.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=handlers, ssl_context=self._tls
        )
        assert server is not None
        self.port = int(server.server_address[1])

    def _requested(self, event: evt.Event) -> None:
        requestor = event.assoc.requestor
        self.proposed.append([str(cx.abstract_syntax) for cx in requestor.requested_contexts])
        self.calling.append(requestor.primitive.calling_ae_title)
        if self.rejects:
            event.assoc.acse.send_reject(0x02, 0x03, 0x02)  # local limit exceeded
            event.assoc.kill()

    def _store(self, event: evt.Event) -> int:
        if self.stalls and len(self.received) >= self.stalls_after:
            self.is_stalled.set()
            self._gone.wait(30)
            return 0x0000
        if self.aborts_after is not None and len(self.received) >= self.aborts_after:
            event.assoc.abort()
            return 0x0000
        built = event.dataset
        built.file_meta = event.file_meta
        self.received.append(built)
        self.raw.append(event.request.DataSet.getvalue())
        return self.answers.get(str(event.request.AffectedSOPClassUID), self.answer)

    @property
    def instances(self) -> set[str]:
        """What a PACS that files by SOP Instance UID would hold."""
        return {str(built.SOPInstanceUID) for built in self.received}

    def let_go(self) -> None:
        """Answer what it stalls on, and stall no more."""
        self.stalls = False
        self._gone.set()

    def go_down(self) -> None:
        self._entity.shutdown()

    def come_back(self) -> None:
        """On the same port."""
        self._start(self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._gone.set()
        self._entity.shutdown()
