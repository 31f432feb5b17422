"""Peers that speak storage commitment: an archive that vouches, a modality that asks."""

import threading
import time
from collections.abc import Iterable
from typing import Any, Self

from pydicom import Dataset
from pynetdicom import AE, build_role, evt

from tests.peers import Pacs

COMMITMENT = "1.2.840.10008.1.20.1"
INSTANCE = "1.2.840.10008.1.20.1.1"


class VouchingPacs(Pacs):
    """An archive that takes requests for storage commitment.

    Set at any time: `status`, the answer to the next requests; `reports_to`, the port to which it
    reports on associations of its own (None: on the one on which it was asked); `reason`, why it
    does not vouch (0: it does) for classes in `fails`, or all; `is_silent`, whether it reports
    nothing; `hangs_up`, whether it aborts instead of answering a request.
    """

    def __init__(self, *, reports_to: int | None = None, **more: Any) -> None:
        self.status = 0x0000
        self.reports_to = reports_to
        self.called_ae = "NORTH_AI"
        self.reason = 0
        self.fails: frozenset[str] = frozenset()
        self.is_silent = False
        self.hangs_up = False
        self.tries = 1  # of each report on an association of its own
        self.asked: list[Dataset] = []
        self.heard: list[int] = []  # statuses with which its reports were answered
        super().__init__(**more)

    def _start(self, port: int = 0) -> None:
        self._entity.add_supported_context(COMMITMENT)
        super()._start(port)

    def _handlers(self) -> list[Any]:
        return [*super()._handlers(), (evt.EVT_N_ACTION, self._ask)]

    def _ask(self, event: evt.Event) -> tuple[int, None]:
        if self.hangs_up:
            self.asked.append(event.action_information)
            event.assoc.abort()
        elif self.status == 0x0000:
            self.asked.append(event.action_information)
            if not self.is_silent:
                self._report_soon(event)
        return self.status, None

    def _report_soon(self, event: evt.Event) -> None:
        if self.reports_to is not None and self.tries == 1:
            self.report(event.action_information)
            return
        if self.reports_to is not None:
            asked, more = event.action_information, {"tries": self.tries}
            threading.Thread(target=self.report, args=(asked,), kwargs=more, daemon=True).start()
            return
        # After the response, on the same association.
        threading.Timer(0.2, self._report_on, (event.assoc, event.action_information)).start()

    def _report_on(self, association: Any, asked: Dataset) -> None:
        for context in association.accepted_contexts:
            context._as_scp = True
        answer, kind = self._answer(asked)
        status, _ = association.send_n_event_report(answer, kind, COMMITMENT, INSTANCE)
        self.heard.append(status.Status)

    def report(self, asked: Dataset, *, calling_ae: str = "", tries: int = 1) -> None:
        """On an association of its own, until it is taken."""
        answer, kind = self._answer(asked)
        for _ in range(tries):
            status = _tell(
                self.reports_to, answer, kind, called=self.called_ae,
                calling=calling_ae or self.ae_title,
            )  # fmt: skip
            self.heard.append(status)
            if status == 0x0000:
                return
            time.sleep(0.5)

    def _answer(self, asked: Dataset) -> tuple[Dataset, int]:
        answer = Dataset()
        answer.TransactionUID = asked.TransactionUID
        kept, failed = [], []
        for item in asked.ReferencedSOPSequence:
            is_failed = self.reason and (
                not self.fails or str(item.ReferencedSOPClassUID) in self.fails
            )
            named = Dataset()
            named.ReferencedSOPClassUID = item.ReferencedSOPClassUID
            named.ReferencedSOPInstanceUID = item.ReferencedSOPInstanceUID
            if is_failed:
                named.FailureReason = self.reason
            (failed if is_failed else kept).append(named)
        if kept:
            answer.ReferencedSOPSequence = kept
        if failed:
            answer.FailedSOPSequence = failed
        return answer, 2 if failed else 1


def _tell(port: int | None, answer: Dataset, kind: int, *, called: str, calling: str) -> int:
    """An N-EVENT-REPORT to a node; its answer, -1 where there was none."""
    entity = AE(ae_title=calling)
    entity.add_requested_context(COMMITMENT)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 10
    assert port is not None
    association = entity.associate(
        "127.0.0.1", port, ae_title=called, ext_neg=[build_role(COMMITMENT, scp_role=True)]
    )
    if not association.is_established:
        return -1
    try:
        status, _ = association.send_n_event_report(answer, kind, COMMITMENT, INSTANCE)
        return int(status.Status) if "Status" in status else -1
    finally:
        association.release()


class Modality:
    """Sends images, asks whether they are kept, and listens for the answer on a port."""

    def __init__(self, ae_title: str = "CT1", *, names_roles: bool = True) -> None:
        self.reports: list[Dataset] = []
        self.kinds: list[int] = []
        self.status = 0x0000  # its answer to reports
        self.refuses: frozenset[str] = frozenset()  # transactions that it knows nothing of
        self._entity = AE(ae_title=ae_title)
        roles = {"scu_role": True, "scp_role": True} if names_roles else {}
        self._entity.add_supported_context(COMMITMENT, **roles)
        self._entity.add_requested_context(COMMITMENT)
        self._entity.acse_timeout = self._entity.dimse_timeout = 10
        server = self._entity.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._hear)]
        )
        assert server is not None
        self.port = int(server.server_address[1])

    def _hear(self, event: evt.Event) -> tuple[int, None]:
        if event.event_information.TransactionUID in self.refuses:
            return 0x0112, None
        if self.status == 0x0000:
            self.reports.append(event.event_information)
            self.kinds.append(int(event.event_type))
        return self.status, None

    def asks(
        self,
        port: int,
        images: Iterable[Dataset],
        *,
        uid: str = "1.2.3.4",
        called: str = "NORTH_AI",
        action: int = 1,
        instance: str = INSTANCE,
    ) -> int | None:
        """The answer to an N-ACTION for these, -1 where none came; None where it may not ask."""
        wanted = Dataset()
        wanted.TransactionUID = uid
        wanted.ReferencedSOPSequence = [_named(image) for image in images]
        association = self._entity.associate("127.0.0.1", port, ae_title=called)
        if not association.is_established:
            return None
        try:
            status, _ = association.send_n_action(wanted, action, COMMITMENT, instance)
            return int(status.Status) if "Status" in status else -1
        finally:
            association.release()

    def close(self) -> None:
        self._entity.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _named(image: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = image.SOPClassUID
    item.ReferencedSOPInstanceUID = image.SOPInstanceUID
    return item


def failures(report: Dataset) -> dict[str, int]:
    """SOP Instance UID -> failure reason."""
    return {
        str(item.ReferencedSOPInstanceUID): int(item.FailureReason)
        for item in report.get("FailedSOPSequence", ())
    }


def kept(report: Dataset) -> set[str]:
    return {str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence", ())}
