"""A whole node between real peers: three tenants that send, and an archive (dcmtk) for each."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil
import pydicom
from pydicom import Dataset
from sqlalchemy import select
from sqlalchemy.orm import Session

from config.settings import load
from db import embedded
from db.engine import engine_for
from db.tables import AnalysisRow, InstanceRow, ResultRow, StudyRow
from node.running import NodeFailed, RunningNode, free_port
from tests import validators
from tests.e2e.raw_sender import store

QUIET_S = 2
DEADLINE_S = 120  # shared 2-core machines: the promise itself is measured by hand
ENDED = ("DELIVERED", "DELIVERED_IN_PART", "NOT_ANALYSED", "FAILED")
# What each has beside its names; the third one gives up waiting for missing images soon.
TENANTS = {"north": "", "south": "", "east": f"max_wait_s = {QUIET_S + 4}"}
PEER_ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}


class Archive:
    """A tenant's PACS, dcmtk's storescp: one file for each C-STORE, also of the same instance."""

    def __init__(self, tenant: str, folder: Path) -> None:
        self.folder, self.port = folder / f"{tenant}_pacs", free_port()
        self._command = [
            validators.need("storescp"), "-uf", "-aet", f"{tenant.upper()}_PACS",
            "-od", str(self.folder), str(self.port),
        ]  # fmt: skip
        self.folder.mkdir()
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            env=PEER_ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        self.kill()
        try:
            yield
        finally:
            self.start()

    def received(self, study_uid: str) -> list[Dataset]:
        found = []
        for path in self.folder.iterdir():
            try:
                dataset = pydicom.dcmread(path)
            except (pydicom.errors.InvalidDicomError, EOFError):
                continue  # storescp is still writing it
            if dataset.get("StudyInstanceUID") == study_uid:
                found.append(dataset)
        return found


class Hospital:
    """The node and its archives, and what a tester asks of them."""

    def __init__(
        self, folder: Path, archives: dict[str, Archive], environment: Mapping[str, str]
    ) -> None:
        self.folder, self.archives, self._environment = folder, archives, environment
        self._begin(folder / "vigil.toml")

    def _begin(self, config: Path) -> None:
        self.config = config
        self.start()
        try:
            self.node.wait_ready(600)
        except NodeFailed:
            self.node.stop()
            raise
        # Made once: asking for the embedded database's URL would start it where it is down.
        self._engine = engine_for(load(self.config), "node")

    def start(self) -> None:
        """The node; once more after it was stopped or killed."""
        log = self.folder / "node.log"
        self.node = RunningNode(self.config, log, environment=self._environment)

    def move_to(self, config: Path) -> None:
        """Another node takes the place of this one."""
        self.close()
        self._begin(config)

    def close(self) -> None:
        self._engine.dispose()
        self.node.stop()

    @property
    def port(self) -> int:
        """Where reception listens; with port 0 another one after a restart."""
        return self.node.addresses["scp"][-1][1]

    def is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def storescu(self, paths: Sequence[Path], tenant: str, *options: str) -> list[str]:
        """dcmtk's sender as a scanner of that tenant; later options win."""
        return [
            validators.need("storescu"), "-R", "-aet", f"{tenant.upper()}_CT",
            "-aec", f"{tenant.upper()}_AI", *options,
            "127.0.0.1", str(self.port), *map(str, paths),
        ]  # fmt: skip

    def send(
        self, paths: Sequence[Path], tenant: str = "north", *options: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.storescu(paths, tenant, *options),
            env=PEER_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=120,
        )  # fmt: skip

    def store(self, image: Dataset, body: bytes, tenant: str = "north") -> int:
        """The answer to these very bytes under the image's UIDs."""
        titles = {"called": f"{tenant.upper()}_AI", "calling": f"{tenant.upper()}_CT"}
        return store(self.port, image, body, **titles)

    def received(self, tenant: str, study_uid: str) -> list[Dataset]:
        return self.archives[tenant].received(study_uid)

    def query(self, statement) -> list:
        with Session(self._engine) as session:
            return list(session.scalars(statement))

    def study_rows(self, table, study_uid: str, tenant: str = "north") -> list:
        """Rows of a table that names its study, oldest first."""
        return self.query(
            select(table)
            .join(StudyRow, StudyRow.id == table.study_id)
            .where(StudyRow.study_instance_uid == study_uid, StudyRow.tenant == tenant)
            .order_by(*table.__mapper__.primary_key)
        )

    def stored(self, study_uid: str, tenant: str = "north") -> list[str]:
        """SOP Instance UIDs of what has a row and a file, one an instance, sorted."""
        rows = self.study_rows(InstanceRow, study_uid, tenant)
        return sorted(row.sop_instance_uid for row in rows if row.stored_at is not None)

    def outcome(self, study_uid: str, tenant: str = "north", result_no: int = 0) -> AnalysisRow:
        """The study's analysis, once it is settled with that result or a later one."""

        def settled() -> AnalysisRow | None:
            rows = self.study_rows(AnalysisRow, study_uid, tenant)
            is_settled = rows and rows[0].state in ENDED and rows[0].result_no >= result_no
            return rows[0] if is_settled else None

        return eventually(settled)

    def results(self, study_uid: str, tenant: str = "north") -> list[ResultRow]:
        rows = self.study_rows(ResultRow, study_uid, tenant)
        return sorted(rows, key=lambda row: row.result_no)

    def quarantined(self, sop_instance_uid: str) -> list[dict]:
        """What `vigil quarantine list` says of an instance."""
        entries = json.loads(self.vigil("quarantine", "list", "--json"))
        return [entry for entry in entries if entry["sop_instance_uid"] == sop_instance_uid]

    def vigil(self, *arguments: str) -> str:
        """What the command says on stdout; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "node.cli", *arguments, "--config", str(self.config)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"vigil {' '.join(arguments)}: {done.stderr.strip()}"
        return done.stdout

    @contextlib.contextmanager
    def database_stopped(self) -> Iterator[None]:
        """It keeps its connections and answers nothing: worse than one that is gone."""
        pid = int((self.folder / "var/database/cluster/postmaster.pid").read_text().split()[0])
        server = psutil.Process(pid)
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def spooled(self) -> list[Path]:
        return [
            path
            for path in (self.folder / "var" / "spool").rglob("*")
            if path.suffix in (".dcm", ".part")
        ]

    def stage(self, name: str) -> psutil.Process:
        children = psutil.Process(self.node.process.pid).children()
        return next(child for child in children if name in child.cmdline())

    def kill_stage(self, name: str) -> None:
        """-9 for all of it at once, as a power cut does."""
        stage = self.stage(name)
        for process in [*stage.children(recursive=True), stage]:
            process.send_signal(signal.SIGKILL)

    def processes(self) -> set[int]:
        """The supervisor, its stages, and the receiver and intake below one of them."""
        supervisor = psutil.Process(self.node.process.pid)
        below = [supervisor, *supervisor.children(), *self.stage("scp").children()]
        return {process.pid for process in below}


def eventually(condition: Callable, seconds: float = DEADLINE_S):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return value


def written(datasets: Sequence[Dataset], folder: Path) -> list[Path]:
    """The data sets as files, in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, dataset in enumerate(datasets):
        paths.append(folder / f"{number:03}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def tenant_toml(name: str, more: str, sender: str, archive: Archive) -> str:
    title = name.upper()
    return f"""
[[tenants]]
id = "{name}"
ae_titles = ["{title}_AI"]
quiet_period_s = {QUIET_S}
{more}
[[tenants.senders]]
ae_title = "{title}_CT"
{sender}
[[tenants.destinations]]
name = "pacs"
ae_title = "{title}_PACS"
host = "127.0.0.1"
port = {archive.port}
"""


@contextlib.contextmanager
def running(
    folder: Path,
    *,
    tenants: Mapping[str, str] = TENANTS,
    senders: Mapping[str, str] = MappingProxyType({}),
    destinations: Mapping[str, str] = MappingProxyType({}),
    scp_port: int = 0,
    database_url: str = "",
    inference: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Hospital]:
    """A node that is ready, with its peers; the shipped bundle and embedded database if not told.

    tenants, senders, destinations : by tenant, what each, its sender and its destination have
        beside their names
    """
    archives: dict[str, Archive] = {}
    hospital = None
    try:
        for name in tenants:
            archives[name] = Archive(name, folder)
        parts = [
            tenant_toml(name, tenants[name], senders.get(name, ""), archive)
            + destinations.get(name, "")
            for name, archive in archives.items()
        ]
        (folder / "vigil.toml").write_text(
            f'[node]\ndata_dir = "{folder}/var"\ndatabase_url = "{database_url}"\n'
            f"min_free_mb = 0\n[scp]\nport = {scp_port}\n[dashboard]\nport = 0\n"
            f"[inference]\n{inference}\n" + "".join(parts)
        )
        hospital = Hospital(folder, archives, environment)
        yield hospital
    finally:
        if hospital:
            hospital.close()
        for archive in archives.values():
            archive.kill()
        embedded.stop(folder / "var")
