"""Many senders, idle ones and probes at a receiver process of its own, measured from outside."""

import os
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from pydicom.uid import generate_uid
from sqlalchemy import select
from sqlalchemy.orm import Session

from db.spool import scan
from db.tables import InstanceRow
from tests.builders import changed, ct_image
from tests.e2e.reception import Stage, wait_for
from tests.raw_peer import CT, EXPLICIT, VERIFICATION, Gone, RawPeer, item
from tests.stage import encoded

#: `VIGIL_PROBES=10000` for the figures in docs/hazards.md.
N_PROBES = int(os.environ.get("VIGIL_PROBES", "1500"))
ASYNCHRONOUS_WINDOW = 0x53  # PS3.7 D.3.3.3


@pytest.fixture
def reception(settings, tmp_path):
    """Starts `vigil scp` with these keys of [scp], with the test's database or with none."""
    started = []

    def start(*keys, has_database=True, min_free_mb=0):
        url = settings.node.database_url.get_secret_value()
        if not has_database:
            url = url.rpartition("/")[0] + "/nowhere"
        config = tmp_path / "vigil.toml"
        config.write_text(
            f'[node]\ndata_dir = "{settings.node.data_dir}"\ndatabase_url = "{url}"\n'
            f"min_free_mb = {min_free_mb}\n[scp]\nport = 0\n" + "\n".join(keys) + "\n"
            '[[tenants]]\nid = "north"\nae_titles = ["NORTH_AI"]\n'
        )
        started.append(Stage(config, tmp_path / "log"))
        wait_for(lambda: started[-1].lines("receiver_started"), 120)
        return started[-1]

    yield start
    for stage in started:
        stage.kill()


def receiver_of(stage):
    return next(child for child in stage.children() if "scp.receiver" in child.cmdline())


def images(n):
    """`n` instances of one series, told apart by position and UID."""
    base = ct_image()
    return [
        changed([base], SOPInstanceUID=generate_uid(), ImagePositionPatient=[0, 0, 5.0 * i])[0]
        for i in range(n)
    ]


def stored(engine):
    with Session(engine) as session:
        done = select(InstanceRow.sop_instance_uid).where(InstanceRow.stored_at.is_not(None))
        return set(session.scalars(done))


def store_alone(port, image, *, calling="CT1"):
    """One association for one image, as some scanners do; tried again where it is refused."""
    while True:
        try:
            with RawPeer(port, timeout_s=240).associate(calling=calling) as peer:
                status = peer.store(CT, str(image.SOPInstanceUID), encoded(image))
                peer.release()
                return status
        except Gone:
            time.sleep(0.2)


def test_h15_300_associations_of_one_image_each_make_one_whole_study(reception, engine):
    stage = reception()
    sent = images(300)

    with ThreadPoolExecutor(4) as senders:
        answers = Counter(senders.map(lambda image: store_alone(stage.port, image), sent))

    assert answers == {0x0000: 300}
    wait_for(lambda: len(stored(engine)) == 300, 240)
    assert stored(engine) == {image.SOPInstanceUID for image in sent}
    assert len(stage.lines("association_ended")) == 300


def test_h15_20_senders_at_once_lose_nothing(reception, engine):
    stage = reception()
    batches = [images(3) for _ in range(20)]

    def send(number, batch):
        with RawPeer(stage.port, timeout_s=240).associate(calling=f"CT{number}") as peer:
            found = [peer.store(CT, str(one.SOPInstanceUID), encoded(one)) for one in batch]
            peer.release()
            return found

    with ThreadPoolExecutor(20) as senders:
        answers = list(senders.map(send, range(20), batches))

    assert answers == [[0x0000] * 3] * 20
    wait_for(lambda: len(stored(engine)) == 60, 240)
    assert not scan(stage.log.parent / "var" / "spool" / "scp-0")


def test_h11_h15_50_idle_associations_take_every_slot_and_an_echo_is_answered(reception):
    stage = reception("idle_timeout_s = 600", "max_per_sender = 50")
    image = ct_image()
    idle = [RawPeer(stage.port).associate() for _ in range(50)]

    with pytest.raises(Gone, match="03 00020302"):  # local limit exceeded, for now
        RawPeer(stage.port).associate()
    with RawPeer(stage.port).associate([(VERIFICATION, (EXPLICIT,))]) as probe:
        assert probe.echo() == 0x0000

    idle.pop().release()
    assert store_alone(stage.port, image) == 0x0000
    for peer in idle:
        peer.close()


def test_h15_50_idle_associations_are_timed_out(reception):
    stage = reception("idle_timeout_s = 3", "max_per_sender = 50")
    idle = [RawPeer(stage.port).associate() for _ in range(50)]

    for peer in idle:
        assert [kind for kind, _ in peer.rest()] == [0x07]  # A-ABORT
        peer.close()

    process = receiver_of(stage)
    wait_for(lambda: process.num_threads() <= 3, 120)


def test_h11_an_echo_is_answered_while_the_disk_is_full_and_nothing_is_taken(reception):
    stage = reception(min_free_mb=2**40)
    image = ct_image()

    with RawPeer(stage.port).associate([(CT, (EXPLICIT,)), (VERIFICATION, (EXPLICIT,))]) as peer:
        assert peer.store(CT, str(image.SOPInstanceUID), encoded(image)) == 0xA700
        assert peer.echo(context=3) == 0x0000
        peer.release()


def test_h11_an_echo_is_answered_while_the_database_is_down(reception):
    stage = reception(has_database=False)
    image = ct_image()
    wait_for(lambda: stage.lines("intake_waits"), 120)

    with RawPeer(stage.port).associate([(CT, (EXPLICIT,)), (VERIFICATION, (EXPLICIT,))]) as peer:
        assert peer.echo(context=3) == 0x0000
        assert peer.store(CT, str(image.SOPInstanceUID), encoded(image)) == 0x0000
        peer.release()


def test_h18_an_offered_asynchronous_window_is_left_alone_or_answered_with_one(reception):
    """PS3.7 D.3.3.3: who does not support it leaves it out of the answer, which means 1 and 1."""
    stage = reception()
    sent = images(3)

    for window in ((8, 8), (0, 0), (1, 1)):
        offer = item(ASYNCHRONOUS_WINDOW, struct.pack(">HH", *window))
        with RawPeer(stage.port).associate(user=offer) as peer:
            answered = peer.user.get(ASYNCHRONOUS_WINDOW)
            assert answered in (None, struct.pack(">HH", 1, 1))
            for image in sent:
                assert peer.store(CT, str(image.SOPInstanceUID), encoded(image)) == 0x0000
            peer.release()


def measured(process):
    return process.num_threads(), process.num_fds(), process.memory_info().rss / 2**20


def probe(port, number):
    """A TCP connection that says nothing, or no DICOM, or is reset."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as line:
        if number % 3 == 1:
            line.sendall(b"GET / HTTP/1.0\r\n\r\n")
        if number % 3 == 2:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.timeout(3600)
def test_h16_connects_without_a_word_leave_no_thread_socket_or_memory(reception, record_property):
    stage = reception("max_per_minute = 100000")
    process = receiver_of(stage)
    for number in range(300):  # what is made once, by the first of them
        probe(stage.port, number)
    wait_for(lambda: process.num_threads() <= 3, 120)
    threads, files, megabytes = measured(process)

    for number in range(N_PROBES):
        probe(stage.port, number)

    wait_for(lambda: process.num_threads() <= threads and process.num_fds() <= files, 120)
    after = measured(process)
    figures = f"{N_PROBES} connects: {threads}, {files}, {megabytes:.1f} MB before, {after} after"
    record_property("threads, files, resident", figures)
    assert after[2] - megabytes < 16  # it settles there: no more after 100,000 than after 30,000
    with RawPeer(stage.port).associate([(VERIFICATION, (EXPLICIT,))]) as peer:
        assert peer.echo() == 0x0000
    assert psutil.pid_exists(process.pid)
    assert stage.lines("thread_crashed") == stage.lines("child_ended") == []
