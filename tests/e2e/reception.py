"""`vigil scp` as a process of its own, a sender, and what must have come of what was sent."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from pynetdicom import AE
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.faults import VARIABLE
from db.spool import scan
from db.tables import InstanceRow, QuarantineRow, StudyRow

ROOT = Path(__file__).parents[2]


class Stage:
    """`vigil scp` as a process, with its children."""

    def __init__(self, config, log, faults=""):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: str(faults)}
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scp", "--config", str(config)],
                stdout=out, stderr=out, env=environment, cwd=ROOT,
            )  # fmt: skip
        wait_for(lambda: self.lines("listening"))
        self.port = self.lines("listening")[0]["port"]

    def lines(self, event):
        found = []
        for line in self.log.read_text().splitlines():
            if line.startswith("{") and line.endswith("}"):
                entry = json.loads(line)
                found += [entry] if entry["event"] == event else []
        return found

    def children(self):
        return psutil.Process(self.process.pid).children()

    def kill(self):
        """-9 for all of it at once, as a power cut does."""
        family = [psutil.Process(self.process.pid), *self.children()]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=60)
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(60)


def wait_for(condition, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def send(port, images):
    """The SOP Instance UIDs that were acknowledged; one association each, as some scanners do."""
    acknowledged = set()
    for image in images:
        ae = AE(ae_title="CT1")
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
        ae.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
        peer = ae.associate("127.0.0.1", port, ae_title="VIGIL")
        if not peer.is_established:
            continue
        status = peer.send_c_store(image)
        if status and status.Status == 0x0000:
            acknowledged.add(image.SOPInstanceUID)
        peer.release()
    return acknowledged


def stored(engine):
    with Session(engine) as session:
        rows = select(InstanceRow.sop_instance_uid).where(InstanceRow.stored_at.is_not(None))
        return set(session.scalars(rows))


def count(engine, table):
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(table))


def spooled(settings):
    return scan(settings.node.data_dir / "spool" / "scp-0")


def assert_whole(engine, settings, images):
    """Each instance once, in the database and in the store; nothing anywhere else."""
    with Session(engine) as session:
        study = session.scalars(select(StudyRow)).one()
        ids = {str(key) for key in session.scalars(select(InstanceRow.id))}
    assert study.n_instances == study.inputs_version == len(images)
    files = list((settings.node.data_dir / "store").rglob("*.dcm"))
    assert {path.stem for path in files} == ids
    assert len(files) == len(images)
    assert count(engine, QuarantineRow) == 0
    assert not list((settings.node.data_dir / "spool").rglob("*.part"))
