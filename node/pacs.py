"""The demo's PACS: takes what it is sent, writes it down, and can say what it got."""

import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydicom.filereader import dcmread
from pynetdicom import AE, AllStoragePresentationContexts, evt

VERIFICATION = "1.2.840.10008.1.1"
CANNOT_UNDERSTAND = 0xC000  # PS3.4 Table B.2-1
OUT_OF_RESOURCES = 0xA700


@dataclass(frozen=True, slots=True)
class Received:
    """One object that arrived; the last with the same SOP Instance UID counts."""

    called_ae: str
    calling_ae: str
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_description: str
    modality: str
    at: float  # monotonic


class Pacs:
    """A storage SCP on loopback, in threads of this process; one folder for each called AE title.

    A real peer, not a stand-in: every object crosses the network and lies on disk as a file.
    `answer` is the status of the next stores; set it to play a full or stubborn archive.
    """

    name = "The demo's PACS"

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._received: dict[tuple[str, str], Received] = {}
        self.answer = 0x0000
        self._entity = AE(ae_title="ANY_PACS")
        self._entity.maximum_pdu_size = 0
        self._entity.supported_contexts = AllStoragePresentationContexts
        self._entity.add_supported_context(VERIFICATION)
        server = self._entity.start_server(
            ("127.0.0.1", port),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, self._store), (evt.EVT_CONN_OPEN, _no_delay)],
        )
        if server is None:  # only a blocking server returns nothing
            raise RuntimeError("the PACS did not start")
        self.port = int(server.server_address[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._entity.shutdown()

    def received(self, *, called_ae: str = "", study_instance_uid: str = "") -> list[Received]:
        """What has arrived, oldest first; an empty string selects all."""
        with self._lock:
            items = list(self._received.values())
        return [
            item
            for item in items
            if called_ae in ("", item.called_ae)
            and study_instance_uid in ("", item.study_instance_uid)
        ]

    def count(self, *, called_ae: str, study_instance_uid: str) -> Counter[str]:
        """Objects of a study by kind: `SR`, `KO`, or the word of a Secondary Capture's series."""
        items = self.received(called_ae=called_ae, study_instance_uid=study_instance_uid)
        return Counter(_kind(item) for item in items)

    def last_at(self, *, study_instance_uid: str) -> float | None:
        """When the newest object of a study came, on the monotonic clock."""
        items = self.received(study_instance_uid=study_instance_uid)
        return max((item.at for item in items), default=None)

    def strays(self, *, called_ae: str, study_instance_uid: str) -> int:
        """Objects of a study that came under another title than its own hospital's."""
        items = self.received(study_instance_uid=study_instance_uid)
        return sum(item.called_ae != called_ae for item in items)

    def _store(self, event: evt.Event) -> int:
        if self.answer:
            return self.answer
        request: Any = event.assoc.requestor.primitive
        called = request.called_ae_title.strip()
        # Our own number, not the sender's UID: no name from outside becomes part of a path.
        folder = self._folder / "".join(c if c.isalnum() else "_" for c in called)
        with self._lock:
            path = folder / f"{len(self._received) + 1:06d}.dcm"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(event.encoded_dataset())
                item = _read(path, called, event.assoc.requestor.ae_title.strip())
            except OSError:
                return OUT_OF_RESOURCES
            except (ValueError, AttributeError, KeyError):
                return CANNOT_UNDERSTAND
            self._received[called, item.sop_instance_uid] = item
        return 0x0000


def _read(path: Path, called: str, calling: str) -> Received:
    header = dcmread(path, stop_before_pixels=True)
    return Received(
        called_ae=called,
        calling_ae=calling,
        path=path,
        sop_class_uid=str(header.SOPClassUID),
        sop_instance_uid=str(header.SOPInstanceUID),
        study_instance_uid=str(header.StudyInstanceUID),
        series_description=str(header.get("SeriesDescription", "")),
        modality=str(header.get("Modality", "")),
        at=time.monotonic(),
    )


def _kind(item: Received) -> str:
    if item.modality in ("SR", "KO"):
        return item.modality
    words = item.series_description.lower()
    return next((word for word in ("summary", "overlay", "map") if word in words), item.modality)


def _no_delay(event: evt.Event) -> None:
    # `event.assoc.dul.socket` is the accepted connection; small PDUs wait 40 ms otherwise.
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
