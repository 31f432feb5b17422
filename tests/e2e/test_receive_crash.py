"""Reception and intake killed at every step: what was acknowledged is there, once (H38, H40)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pynetdicom import AE
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import Session

from db.spool import scan
from db.tables import InstanceRow, ProcessRow, QuarantineRow, StudyRow
from tests.builders import ct_series

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[2]
RECEIVER_POINTS = ("spool_synced", "spool_renamed", "store_kept")
INTAKE_POINTS = ("intake_rows_committed", "intake_linked", "intake_stored")


class Stage:
    """`vigil scp` as a process, with its children."""

    def __init__(self, config, log, fault=""):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "VIGIL_FAULT": fault}
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
        psutil.wait_procs(family, timeout=10)
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(20)


@pytest.fixture
def stage(settings, tmp_path):
    """Starts the stage; whatever still runs at the end is stopped."""
    url = settings.node.database_url.get_secret_value()
    config = tmp_path / "vigil.toml"
    config.write_text(
        f'[node]\ndata_dir = "{settings.node.data_dir}"\ndatabase_url = "{url}"\nmin_free_mb = 0\n'
        "[scp]\nport = 0\nprocesses = 1\n"
    )
    started = []

    def start(fault="", changes=None):
        if changes:
            config.write_text(config.read_text().replace(*changes))
        started.append(Stage(config, tmp_path / f"log{len(started)}", fault))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


def wait_for(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def send(port, images):
    """The SOP Instance UIDs that were acknowledged; one association each, as some scanners do."""
    acknowledged = set()
    for image in images:
        ae = AE(ae_title="CT1")
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 5
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


@pytest.mark.parametrize("point", [*RECEIVER_POINTS, *INTAKE_POINTS])
def test_h38_killed_at_any_point_everything_acknowledged_is_there_once(
    stage, settings, engine, point
):
    images = ct_series(slices=6)
    broken = stage(fault=f"{point}:3" if point in RECEIVER_POINTS else point)
    acknowledged = send(broken.port, images)
    wait_for(lambda: broken.lines("child_ended"))
    broken.kill()

    healed = stage()
    wait_for(lambda: stored(engine) >= acknowledged)
    acknowledged |= send(healed.port, images)  # a modality sends again what was not acknowledged
    wait_for(lambda: not spooled(settings))

    assert acknowledged == stored(engine) == {image.SOPInstanceUID for image in images}
    assert_whole(engine, settings, images)


def test_h38_a_child_that_dies_is_started_again(stage, settings, engine):
    images = ct_series(slices=4)
    one = stage()
    wait_for(lambda: send(one.port, images[:1]))
    for child in one.children():
        child.kill()
    wait_for(lambda: len(one.lines("child_ended")) == 2)

    acknowledged = send(one.port, images)  # the listening socket never went away

    assert len(acknowledged) == 4
    wait_for(lambda: stored(engine) == acknowledged)
    assert_whole(engine, settings, images)


def test_h40_reception_goes_on_while_the_database_is_away(stage, settings, engine, database_url):
    images = ct_series(slices=3)
    wrong = database_url.set(database="nowhere").render_as_string(hide_password=False)
    right = database_url.render_as_string(hide_password=False)
    one = stage(changes=(right, wrong))

    acknowledged = send(one.port, images)
    wait_for(lambda: one.lines("intake_waits"))

    assert len(acknowledged) == len(spooled(settings)) == 3
    assert one.stop() == 0
    stage(changes=(wrong, right))
    wait_for(lambda: stored(engine) == acknowledged)
    assert_whole(engine, settings, images)


def test_h40_connections_cut_in_the_middle_are_made_again(stage, settings, engine, database_url):
    images = ct_series(slices=6)
    one = stage()
    send(one.port, images[:3])
    wait_for(lambda: len(stored(engine)) == 3)

    admin = create_engine(database_url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
        connection.execute(text(cut), {"name": database_url.database})
    admin.dispose()
    send(one.port, images[3:])
    engine.dispose()

    wait_for(lambda: len(stored(engine)) == 6)
    assert_whole(engine, settings, images)


def test_sigterm_stops_all_of_it_cleanly(stage, engine):
    one = stage()
    send(one.port, ct_series(slices=2))
    wait_for(lambda: len(stored(engine)) == 2)
    family = one.children()

    assert one.stop() == 0

    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert one.lines("receiver_stopped")
    assert count(engine, ProcessRow) == 0


def test_the_children_end_when_their_parent_is_killed(stage):
    one = stage()
    wait_for(lambda: one.lines("receiver_started"))
    family = one.children()

    os.kill(one.process.pid, signal.SIGKILL)
    one.process.wait()

    assert psutil.wait_procs(family, timeout=15)[1] == []


def test_several_receivers_share_one_port(stage, settings, engine):
    images = ct_series(slices=12)
    one = stage(changes=("processes = 1", "processes = 3"))
    wait_for(lambda: len(one.lines("receiver_started")) == 3)

    acknowledged = send(one.port, images)

    assert len(acknowledged) == 12
    wait_for(lambda: stored(engine) == acknowledged)
    assert_whole(engine, settings, images)


def test_sighup_reloads_tenants_without_dropping_an_association(stage):
    one = stage()
    wait_for(lambda: one.lines("receiver_started"))
    image = ct_series(slices=2)[0]
    ae = AE(ae_title="CT1")
    ae.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
    peer = ae.associate("127.0.0.1", one.port, ae_title="VIGIL")
    config = Path(one.process.args[-1])
    config.write_text(config.read_text() + '[[tenants]]\nid = "new"\nae_titles = ["NEW_AI"]\n')

    one.process.send_signal(signal.SIGHUP)
    wait_for(lambda: one.lines("settings_reloaded"))

    assert peer.send_c_store(image).Status == 0x0000
    peer.release()
    late = ae.associate("127.0.0.1", one.port, ae_title="NEW_AI")
    assert late.is_established
    late.release()
