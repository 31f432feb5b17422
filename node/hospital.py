"""The demo's hospitals: two tenants, their senders and archives, and the sample studies."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from pydicom.filereader import dcmread

from node import send
from node.phantom import Kind, Phantom, instances, write

QUIET_PERIOD_S = 2.0  # a demo is watched; real sites wait longer
MAX_WAIT_S = 10.0

_CONFIG = """\
# Written by `vigil demo`: two hospitals on one node.
[node]
data_dir = "{data}"
serial = "demo"
min_free_mb = 0
[scp]
host = "127.0.0.1"
port = {scp_port}
[inference]
models = [{model}]
[dashboard]
host = "127.0.0.1"
port = {web_port}
"""
_TENANT = """
[[tenants]]
id = "{id}"
ae_titles = ["{id_upper}_AI"]
quiet_period_s = {quiet}
max_wait_s = {wait}
models = [{model_name}]
[[tenants.senders]]
ae_title = "{id_upper}_CT"
hosts = ["127.0.0.1"]
[[tenants.destinations]]
name = "pacs"
ae_title = "{id_upper}_PACS"
host = "127.0.0.1"
port = {pacs_port}
"""
TENANTS = ("north", "south")


def configuration(
    data: Path, *, scp_port: int, web_port: int, pacs_port: int, model: str = "ich"
) -> str:
    """The TOML of a node for both hospitals."""
    tenants = [
        _TENANT.format(
            id=tenant,
            id_upper=tenant.upper(),
            quiet=QUIET_PERIOD_S,
            wait=MAX_WAIT_S,
            model_name=f'"{Path(model).name}"',
            pacs_port=pacs_port,
        )
        for tenant in TENANTS
    ]
    head = _CONFIG.format(data=data, scp_port=scp_port, web_port=web_port, model=f'"{model}"')
    return head + "".join(tenants)


@dataclass(slots=True)
class Visit:
    """One sample study on its way; the fields below `expected` change while it travels."""

    tenant: str
    truth: str
    source: Phantom | Path
    expected: str  # "result", "reason", or "either" where the truth is not known
    patient: str = "?"
    study_instance_uid: str = ""
    stage: str = "waits for its turn"
    sent: list[send.Sent] = field(default_factory=list)
    acknowledged_at: float | None = None  # monotonic, when the last instance was
    settled_after_s: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # node.demo fills it from the database

    @property
    def called(self) -> str:
        return f"{self.tenant.upper()}_AI"

    @property
    def calling(self) -> str:
        return f"{self.tenant.upper()}_CT"

    @property
    def pacs(self) -> str:
        return f"{self.tenant.upper()}_PACS"

    @property
    def outcome(self) -> str:
        """`result`, `reason`, or empty while there is neither."""
        state = self.facts.get("state", "")
        if state in ("DELIVERED", "DELIVERED_IN_PART"):
            return "result"
        return "reason" if state in ("NOT_ANALYSED", "FAILED") and self.facts["reason"] else ""

    @property
    def is_as_expected(self) -> bool:
        if self.facts.get("state") in ("FAILED", "DELIVERED_IN_PART"):
            return False
        return bool(self.outcome) and self.expected in ("either", self.outcome)


def visits(folders: Sequence[Path]) -> list[Visit]:
    """The sample studies of both hospitals, and the visitor's own for the first."""
    samples = [
        ("north", Phantom(kind=Kind.LESION, seed=11), "result"),
        ("north", Phantom(kind=Kind.PLAIN, seed=12), "result"),
        ("south", Phantom(kind=Kind.LESION, seed=21, tilt_deg=12.0), "result"),
        ("south", Phantom(kind=Kind.PLAIN, seed=22), "result"),
        ("north", Phantom(kind=Kind.CONTRAST, seed=13), "reason"),
        ("south", Phantom(kind=Kind.CHEST, seed=23), "reason"),
        ("south", Phantom(kind=Kind.LOCALISER, seed=24), "reason"),
    ]
    own = [Visit("north", "not known", folder, "either") for folder in folders]
    return own + [Visit(tenant, str(p.kind), p, expected) for tenant, p, expected in samples]


class Scanners(threading.Thread):
    """Makes each study and sends it, one after the other, beside the one who watches."""

    def __init__(self, visits: Sequence[Visit], port: int, folder: Path) -> None:
        super().__init__(name="scanners", daemon=True)
        self._visits, self._port, self._folder = visits, port, folder
        self.problem = ""

    def run(self) -> None:
        for number, visit in enumerate(self._visits, 1):
            try:
                self._examine(visit, self._folder / f"{number:02d}")
            except (OSError, ValueError) as error:
                visit.stage = f"could not be sent: {type(error).__name__}"
                self.problem = visit.stage

    def _examine(self, visit: Visit, folder: Path) -> None:
        visit.stage = "is being scanned"
        if isinstance(visit.source, Phantom):
            write(instances(visit.source), folder)
        else:
            folder = visit.source
        with send.opened(folder) as opened:
            files, _ = send.gather(opened)
            if not files:
                raise ValueError("no DICOM file")
            _introduce(visit, files[0].path)
            visit.stage = f"sends {len(files)} images"
            peer = send.Peer("127.0.0.1", self._port, visit.called, visit.calling)
            visit.sent = send.send(files, peer)
        visit.acknowledged_at = monotonic()
        refused = [one for one in visit.sent if one.outcome not in send.GOOD]
        visit.stage = f"{len(refused)} not taken: {refused[0].reason}" if refused else "is received"


def _introduce(visit: Visit, path: Path) -> None:
    header = dcmread(path, stop_before_pixels=True)
    visit.patient = str(header.get("PatientName", "")) or "(no name)"
    visit.study_instance_uid = str(header.StudyInstanceUID)
