"""Reception and intake killed at every step: what was acknowledged is there, once (H38, H40)."""

import os
import signal
import socket
import threading
from pathlib import Path

import psutil
import pytest
from pynetdicom import AE
from sqlalchemy import create_engine, text

from db.faults import POINTS
from db.tables import ProcessRow
from tests.builders import ct_series
from tests.e2e.reception import assert_whole, count, send, spooled, stored, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("point", [*POINTS["receiver"], *POINTS["intake"]])
def test_h38_killed_at_any_point_everything_acknowledged_is_there_once(
    stage, settings, engine, point
):
    images = ct_series(slices=6)
    broken = stage(fault=point, passes=3 if point in POINTS["receiver"] else 1)
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


def test_a_port_that_a_killed_node_is_about_to_give_up_is_waited_for(stage):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    threading.Timer(6.0, taken.close).start()

    one = stage(changes=("port = 0", f"port = {port}"))

    assert one.port == port


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
