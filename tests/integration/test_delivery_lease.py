"""Who has a delivery: senders that are killed, that take long, that hang (H37, H38)."""

import datetime as dt
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from config.settings import Settings
from db import claims
from db.answers import is_in_doubt
from db.sandbox import Sandbox
from db.study import AnalysisState
from db.tables import DeliveryRow, EventRow
from dicom_sr import lease
from dicom_sr.deliver import Deliverer
from tests.delivery import Node, destination, running, wait_until
from tests.peers import Pacs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=1, memory_mb=4096, cpu_s=60) as pool:
        yield pool


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    """Takes two objects and leaves the third unanswered, until it is let go."""
    with Pacs() as peer:
        peer.stalls, peer.stalls_after = True, 2
        yield peer


@pytest.fixture
def node(engine: Engine, settings: Settings, sandbox: Sandbox, pacs: Pacs) -> Node:
    return Node(engine, settings, sandbox).sends_to(destination(pacs.port))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a second, renewed ten times in it."""
    monkeypatch.setattr(claims, "LEASE_S", 1.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.1)


def another(node: Node) -> Deliverer:
    return Deliverer(node.engine, node.settings, node.sandbox, worker="another", version="0.1.0")


@contextmanager
def stage(node: Node, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`vigil deliver` as a process."""
    config = node.config_file(folder / "vigil.toml")
    with (folder / "deliver.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dicom_sr"],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "VIGIL_CONFIG": str(config)},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """-9 for all of it at once, as a power cut does."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait()


def test_h38_a_sender_killed_in_mid_send_is_relieved_as_soon_as_it_is_back(node, pacs, tmp_path):
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    with stage(node, tmp_path) as first:
        assert pacs.is_stalled.wait(30)
        kill_with_children(first)
    assert node.delivery(result_id).state == "SENDING"
    pacs.let_go()

    with stage(node, tmp_path):
        wait_until(lambda: node.state(analysis_id) == AnalysisState.DELIVERED, timeout_s=20)

    assert len(pacs.instances) == 6
    # Two before the kill, which were written down as they were answered, and then the others.
    assert len(pacs.received) == 2 + 4
    assert node.delivery(result_id).attempts == 2
    assert "sender_died" in node.events()


def test_a_send_that_kills_its_process_waits_longer_each_time_and_goes_out_at_last(node, pacs):
    pacs.let_go()
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    node.builds()
    waits = []
    for n in range(4):
        assert node.claim(worker=f"killed-{n}")
        with Session(node.engine) as session, session.begin():
            assert claims.take_back(session, lambda _: True) == 1
            session.execute(update(DeliveryRow).values(run_after=func.now()))
        assert node.claim() is None  # not at once
        with Session(node.engine) as session:
            waits.append(session.scalar(select(DeliveryRow.run_after - func.now())))
        node.forget_waiting()

    row = node.delivery(result_id)
    assert (row.state, row.attempts, row.error_code) == ("WAITING", 4, "sender_died")
    assert waits == sorted(waits)
    assert dt.timedelta(seconds=1) < waits[0] < dt.timedelta(seconds=3)
    with Session(node.engine) as session:
        alarms = session.scalars(select(EventRow.is_alarm).where(EventRow.kind == "sender_died"))
        assert alarms.all() == [False, True, True, True]
    node.deliverer.run_once()
    assert node.state(analysis_id) == AnalysisState.DELIVERED


def test_a_sender_that_is_to_stop_ends_between_two_objects(node, pacs):
    result_id = node.found(node.study())
    with running(node.deliverer) as stop:
        assert pacs.is_stalled.wait(20)
        stop.set()
        pacs.let_go()

    assert len(pacs.received) == 2  # the third was under way, and no other went
    row = node.delivery(result_id)
    assert (row.state, row.attempts, row.lease_until) == ("WAITING", 0, None)
    assert list(row.statuses.values()) == ["0x0000"] * 3


def test_a_newer_result_does_not_drop_what_a_killed_sender_had_sent(node, pacs):
    analysis_id = node.study()
    older = node.found(analysis_id)
    with running(node.deliverer):
        assert pacs.is_stalled.wait(20)
        with Session(node.engine) as session, session.begin():
            later = func.now() + dt.timedelta(hours=1)
            died = {"state": "WAITING", "worker": "", "run_after": later}
            session.execute(update(DeliveryRow).values(died))
        newer = node.revised(analysis_id)
        wait_until(lambda: len(states(node, older, newer)) == 2)
        assert states(node, older, newer) == ["WAITING", "WAITING"]
        pacs.let_go()
        node.forget_waiting()
        wait_until(lambda: states(node, older, newer) == ["DELIVERED", "DELIVERED"])

    revision = [d for d in pacs.received if d.Modality == "SR"][-1]
    assert "PredecessorDocumentsSequence" in revision


def states(node: Node, *results: uuid.UUID) -> list[str]:
    with Session(node.engine) as session:
        found = select(DeliveryRow.state).where(DeliveryRow.result_id.in_(results))
        return list(session.scalars(found.order_by(DeliveryRow.id)))


def test_a_lease_that_cannot_be_renewed_is_held_until_it_has_run_out(engine, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    is_away = threading.Event()

    def renew(_: Session) -> bool:
        if is_away.is_set():
            raise TimeoutError("no connection is free")
        return True

    with lease.Lease(engine, renew, lease_s=0.5) as held:
        time.sleep(0.8)
        assert held.is_held()
        is_away.set()
        wait_until(lambda: not held.is_held(), timeout_s=2)
        is_away.clear()
        wait_until(held.is_held, timeout_s=2)


def test_a_renewal_that_hangs_does_not_hang_the_sender(engine, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "JOIN_S", 0.2)
    hangs, goes_on = threading.Event(), threading.Event()

    def renew(_: Session) -> bool:
        hangs.set()
        return goes_on.wait(20)

    with lease.Lease(engine, renew, lease_s=0.3) as held:
        assert hangs.wait(5)
        wait_until(lambda: not held.is_held(), timeout_s=2)
    assert held._thread.is_alive()  # it is left behind
    goes_on.set()


def test_a_connection_whose_other_end_has_vanished_is_given_up_soon(engine):
    with engine.connect() as connection:
        told = connection.connection.driver_connection.get_dsn_parameters()

    assert int(told["tcp_user_timeout"]) <= 60_000
    silent_s = int(told["keepalives_idle"])
    silent_s += int(told["keepalives_interval"]) * int(told["keepalives_count"])
    assert (told["keepalives"], silent_s < 60) == ("1", True)


def test_a_killed_sender_of_another_machine_is_relieved_when_its_lease_is_over(node, pacs):
    pacs.let_go()
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    assert node.deliverer._builder.build_once()
    with Session(node.engine) as session, session.begin():
        assert claims.claim_due(session, "north", "pacs", "other-host/deliver/7/x-1-2")

    sender = another(node)
    assert not sender.take_back()
    sender.run_once()
    assert pacs.received == []
    left = node.delivery(result_id).lease_until - node.delivery(result_id).created_at
    assert left.total_seconds() < 60
    with Session(node.engine) as session, session.begin():
        session.execute(update(DeliveryRow).values(lease_until=func.now()))
    sender.run_once()
    assert pacs.received == []
    node.forget_waiting()
    sender.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED


def test_a_lease_lasts_as_long_as_the_sending(node, pacs, quick):
    analysis_id = node.study()
    node.found(analysis_id)
    with running(node.deliverer):
        assert pacs.is_stalled.wait(20)

        until = time.monotonic() + 1.6  # more than a lease
        while time.monotonic() < until:
            another(node).run_once()

        pacs.let_go()
        wait_until(lambda: node.state(analysis_id) == AnalysisState.DELIVERED)
    assert len(pacs.calling) == 1  # the other found nothing to send


def test_who_lost_the_lease_stops_before_the_next_object_and_writes_nothing(node, pacs, quick):
    result_id = node.found(node.study())
    with running(node.deliverer):
        assert pacs.is_stalled.wait(20)
        with Session(node.engine) as session, session.begin():
            session.execute(
                update(DeliveryRow).values(
                    worker="another", lease_until=func.now() + func.make_interval(0, 0, 0, 1)
                )
            )
        wait_until(lambda: "lease" not in {thread.name for thread in threading.enumerate()})
        pacs.let_go()

    assert len(pacs.received) == 2  # the third was under way, and no other went
    row = node.delivery(result_id)
    assert (row.state, row.worker) == ("SENDING", "another")
    # What was under way was called in doubt before it left; what became of it is not written.
    assert sorted(map(is_in_doubt, row.statuses.values())) == [False, False, True]


def test_a_sender_that_hangs_does_not_keep_its_delivery_for_ever(node, pacs, quick, monkeypatch):
    allow = lease.Lease.allow
    monkeypatch.setattr(lease.Lease, "allow", lambda held, _: allow(held, 2.0))
    analysis_id = node.study()
    node.found(analysis_id)
    with running(node.deliverer):
        assert pacs.is_stalled.wait(20)
        pacs.stalls = False  # for whoever comes next; the first still waits

        wait_until(lambda: relieved(node, analysis_id))

        pacs.let_go()
    assert len(pacs.instances) == 6


def relieved(node: Node, analysis_id: int) -> bool:
    another(node).run_once()
    return node.state(analysis_id) == AnalysisState.DELIVERED


def test_of_two_senders_that_start_together_one_sends(node, pacs):
    pacs.let_go()
    node.found(node.study())
    assert node.deliverer._builder.build_once()
    both = [threading.Thread(target=d.run_once) for d in (node.deliverer, another(node))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()

    assert len(pacs.received) == 6
    assert len(pacs.calling) == 1
