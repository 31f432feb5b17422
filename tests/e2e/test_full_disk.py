"""Disks that fill, run out of inodes or turn read-only under a node that works (H39)."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pynetdicom import AE
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError

from config.settings import load
from db.engine import database_url
from node.running import free_port
from tests.builders import ct_series
from tests.e2e import disturbed, small_disk
from tests.e2e.disturbed import Disturbed, Outcome
from tests.e2e.hospital import eventually
from tests.e2e.reception import ROOT, assert_whole, send, spooled, stored, wait_for

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FULL, SUCCESS = 0xA700, 0x0000


@contextlib.contextmanager
def association(port: int, image) -> Iterator:
    ae = AE(ae_title="CT1")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 60
    ae.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
    ae.add_requested_context("1.2.840.10008.1.1")
    peer = ae.associate("127.0.0.1", port, ae_title="VIGIL")
    assert peer.is_established
    yield peer
    peer.release()


@contextlib.contextmanager
def file_size_limit(stage, size_kb: int) -> Iterator[None]:
    """The receiver's writes fail in mid-file: without any privilege, and with another errno."""
    (receiver,) = (one for one in stage.children() if "scp.receiver" in one.cmdline())
    before = receiver.rlimit(psutil.RLIMIT_FSIZE)
    receiver.rlimit(psutil.RLIMIT_FSIZE, (size_kb * 1024, before[1]))
    try:
        yield
    finally:
        receiver.rlimit(psutil.RLIMIT_FSIZE, before)


@pytest.fixture
def spool(settings) -> Iterator[Path]:
    """The spool on a disk of its own, which holds two dozen of these images."""
    folder = settings.node.data_dir / "spool"
    with small_disk.mounted(folder, size_kb=300, inodes=60):
        yield folder


def images_to_send():
    return ct_series(slices=6, matrix=64)  # 8 KiB of pixels each


def parts(settings) -> list[Path]:
    return list(settings.node.data_dir.rglob("*.part"))


def assert_refused_and_taken_again(stage, settings, engine, condition) -> None:
    """Refused as long as `condition` holds, on an association that stays; then all of it taken."""
    images = images_to_send()
    with association(stage.port, images[0]) as peer:
        assert peer.send_c_store(images[0]).Status == SUCCESS
        with condition:
            assert [peer.send_c_store(one).Status for one in images[1:3]] == [FULL, FULL]
            assert peer.send_c_echo().Status == SUCCESS
            assert parts(settings) == []
        assert [peer.send_c_store(one).Status for one in images[1:]] == [SUCCESS] * 5
    wait_for(lambda: len(stored(engine)) == 6)
    wait_for(lambda: not spooled(settings))
    assert_whole(engine, settings, images)


def test_h11_h39_a_disk_that_is_full_in_mid_object_is_answered_a700_until_there_is_room(
    spool, stage, settings, engine
):
    one = stage()

    assert_refused_and_taken_again(one, settings, engine, small_disk.full(spool, spare_kb=4))


def test_h39_a_write_that_fails_in_mid_object_is_answered_a700_until_it_works_again(
    stage, settings, engine
):
    one = stage()
    wait_for(lambda: one.lines("receiver_started"))

    assert_refused_and_taken_again(one, settings, engine, file_size_limit(one, 4))


def test_h39_without_inodes_the_answer_is_a700_until_there_are_some(spool, stage, settings, engine):
    one = stage()

    assert_refused_and_taken_again(one, settings, engine, small_disk.no_inodes(spool))


def test_h39_a_read_only_spool_is_answered_a700_until_it_can_be_written(
    spool, stage, settings, engine
):
    one = stage()
    wait_for(lambda: one.lines("receiver_started"))
    send(one.port, images_to_send()[:1])  # makes the tenant's folder
    folder = spool / "scp-0" / "default"

    images = images_to_send()[1:]
    with small_disk.read_only(folder), association(one.port, images[0]) as peer:
        assert [image.Status for image in map(peer.send_c_store, images[:2])] == [FULL, FULL]
    acknowledged = send(one.port, images)

    assert len(acknowledged) == 5
    wait_for(lambda: len(stored(engine)) == 6)
    assert_whole(engine, settings, [*images_to_send()])


def test_h39_a_full_store_leaves_images_in_the_spool_and_nothing_half_written(
    stage, settings, engine
):
    images = images_to_send()
    store = settings.node.data_dir / "store"
    with small_disk.mounted(store, size_kb=200):
        one = stage()
        with small_disk.full(store, spare_kb=12):
            assert len(send(one.port, images)) == 6  # reception has a disk of its own
            wait_for(lambda: one.lines("intake_waits"))
            assert {line["exc_code"] for line in one.lines("intake_waits")} == {"disk_full"}
            # Some may have found their place; what has not is there in the spool alone.
            assert len(spooled(settings)) > 0
            assert parts(settings) == []
            for path in store.rglob("*.dcm"):
                assert path.read_bytes() == (find(settings, path.name)).read_bytes()
        wait_for(lambda: len(stored(engine)) == 6)
        wait_for(lambda: not spooled(settings))
        assert_whole(engine, settings, images)
        assert one.stop() == 0


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def find(settings, name: str) -> Path:
    (path,) = (settings.node.data_dir / "spool").rglob(name)
    return path


def test_h39_a_log_that_cannot_be_written_stops_neither_reception_nor_intake(
    settings, engine, tmp_path
):
    port, config = free_port(), tmp_path / "vigil.toml"
    url = settings.node.database_url.get_secret_value()
    config.write_text(
        f'[node]\ndata_dir = "{settings.node.data_dir}"\ndatabase_url = "{url}"\nmin_free_mb = 0\n'
        f"[scp]\nport = {port}\n"
    )
    images = images_to_send()

    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "scp", "--config", str(config)],
            stdout=full, stderr=full, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        wait_for(lambda: listens(port))
        assert len(send(port, images)) == 6
        wait_for(lambda: len(stored(engine)) == 6)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert_whole(engine, settings, images)


# A whole node, with results and its database on small disks of their own.


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[Disturbed]:
    folder = tmp_path_factory.mktemp("disks")
    (folder / "var").mkdir(mode=0o755)
    with (
        small_disk.mounted(folder / "var" / "results", size_kb=64 * 1024),
        small_disk.mounted(folder / "var" / "database", size_kb=200 * 1024),
        disturbed.running(folder) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def expected(node) -> dict[str, Outcome]:
    outcomes = {}
    for kind in ("found", "clear"):
        study = node.study(kind)
        node.send(study)
        outcomes[kind] = node.wait(study)
    return outcomes


@pytest.mark.parametrize(
    ("kind", "event"),
    [("found", "job_failed"), ("clear", "build_failed")],  # heat maps; objects
)
def test_h39_results_wait_while_their_disk_is_full_and_come_by_themselves(
    node, expected, kind, event
):
    study = node.study(kind)
    before = (node.hospital.folder / "node.log").stat().st_size

    with small_disk.full(node.var / "results"):
        node.send(study)
        eventually(lambda: said_since(node, before, event, "disk_full"))
        assert not list((node.var / "results").rglob("*.part"))

    assert node.wait(study) == expected[kind]
    assert node.wrongs(study) == []
    assert node.leftovers() == []


def write_until_it_fails(server: Engine) -> None:
    """Until the server wants a new file of 16 MB for its log."""
    with server.connect() as connection:
        for _ in range(50):
            connection.execute(text("SELECT pg_logical_emit_message(true, '', '')"))
            connection.execute(text("SELECT pg_switch_wal()"))
            connection.commit()


def said_since(node: Disturbed, offset: int, *words: str) -> bool:
    with open(node.hospital.folder / "node.log", "rb") as file:
        file.seek(offset)
        log = file.read().decode()
    return any(all(word in line for word in words) for line in log.splitlines())


def test_h39_h40_a_database_whose_disk_is_full_comes_back_and_nothing_is_lost(node, expected):
    folder = node.var / "database"
    first, during = node.study("found"), node.study("clear")
    server = create_engine(database_url(load(node.hospital.config)))

    node.send(first)
    with small_disk.full(folder):
        assert node.send(during) == 1  # reception asks no database
        until = time.monotonic() + 20
        while time.monotonic() < until:  # each time that it has come up meanwhile
            with contextlib.suppress(DBAPIError):
                write_until_it_fails(server)
            time.sleep(0.5)
        assert node.hospital.node.process.poll() is None
        log = "".join(path.read_text() for path in (folder / "cluster" / "log").iterdir())
        assert "PANIC" in log
        assert "No space left on device" in log
    server.dispose()

    assert node.wait(first) == expected["found"]
    assert node.wait(during) == expected["clear"]
    assert node.wrongs(first) == node.wrongs(during) == []


def test_h39_a_database_folder_that_turns_read_only_does_not_end_the_node(node, expected):
    study = node.study("clear")

    with small_disk.read_only(node.var / "database"):
        pid = int((node.var / "database/cluster/postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGQUIT)  # so that the supervisor has something to tend
        assert node.send(study) == 1
        time.sleep(15)
        assert node.hospital.node.process.poll() is None

    assert node.wait(study) == expected["clear"]
    assert node.wrongs(study) == []


def test_h40_the_embedded_server_killed_under_a_study_costs_it_nothing(node, expected):
    study = node.study("clear")
    pid_file = node.var / "database" / "cluster" / "postmaster.pid"
    before = int(pid_file.read_text().splitlines()[0])

    node.send(study)
    os.kill(before, signal.SIGKILL)

    assert node.wait(study) == expected["clear"]
    assert int(pid_file.read_text().splitlines()[0]) != before
    assert node.wrongs(study) == []
