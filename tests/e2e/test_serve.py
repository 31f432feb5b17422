"""The supervisor and `vigil serve`: children that die, that loop, that are stopped in order."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from db import embedded
from db.errors import DatabaseAway
from node import send
from node.running import NodeFailed, RunningNode, free_port
from node.supervisor import Supervisor
from tests.bundles.make import make_bundle

# A stage as small as one can be: says that it is ready, then waits to be stopped.
STAGE = """
import json, signal, sys, time
def stop(*_):
    print(json.dumps({"event": "stopped", "name": NAME}), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGHUP, lambda *_: print(json.dumps({"event": "reloaded"}), flush=True))
print(json.dumps({"event": "listening", "address": "127.0.0.1", "port": 104}), flush=True)
while True:
    time.sleep(0.05)
"""


def stage(name: str) -> list[str]:
    return ["-c", f"NAME = {name!r}\n{STAGE}"]


def crashing(status: int) -> list[str]:
    return ["-c", f"import sys; sys.exit({status})"]


class Watched:
    """A supervisor that runs in the main thread while a second one plays the operator."""

    def __init__(self, commands: dict[str, list[str]]) -> None:
        self.said: list[str] = []
        self.supervisor = Supervisor(commands, say=self.said.append, backoff_first_s=0.05)
        self.problem: BaseException | None = None

    def run(self, act: Callable[[], None]) -> int:
        operator = threading.Thread(target=self._operate, args=(act,))
        operator.start()
        status = self.supervisor.run()
        operator.join()
        if self.problem:
            raise self.problem
        return status

    def _operate(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            self.problem = error
        finally:
            self.supervisor.stop()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_ready_is_said_once_every_stage_is_and_names_their_addresses():
    watched = Watched({"one": stage("one"), "two": stage("two")})

    status = watched.run(lambda: wait_for(lambda: "ready" in watched.said))

    assert status == 0
    assert sorted(watched.said[:2]) == [
        "one listening on 127.0.0.1:104",
        "two listening on 127.0.0.1:104",
    ]
    assert watched.said[2:] == ["ready"]


def test_stages_stop_in_order_and_their_last_words_are_passed_on(capfd):
    watched = Watched({name: stage(name) for name in ("one", "two", "three")})

    watched.run(lambda: wait_for(lambda: "ready" in watched.said))

    stops = [line for line in capfd.readouterr().out.splitlines() if '"stopped"' in line]
    assert [name in line for name, line in zip(("one", "two", "three"), stops, strict=True)] == [
        True
    ] * 3


def test_a_killed_stage_is_started_again_and_the_others_are_left_alone():
    watched = Watched({"one": stage("one"), "two": stage("two")})
    one, two = watched.supervisor.stages

    def act() -> None:
        wait_for(lambda: "ready" in watched.said)
        before, other = one.process.pid, two.process.pid
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: one.is_running and one.process.pid != before)
        assert two.process.pid == other

    assert watched.run(act) == 0


def test_a_crash_loop_is_said_and_the_other_stage_goes_on():
    watched = Watched({"broken": crashing(3), "good": stage("good")})
    good = watched.supervisor.stages[1]

    def act() -> None:
        wait_for(lambda: any("5 times in a row (last status 3)" in line for line in watched.said))
        assert good.is_running

    assert watched.run(act) == 0
    assert "ready" not in watched.said


def test_a_stage_that_refuses_its_configuration_stops_the_start():
    watched = Watched({"good": stage("good"), "misled": crashing(2)})

    status = watched.supervisor.run()

    assert status == 2
    assert not any(one.is_running for one in watched.supervisor.stages)


def test_sighup_reaches_every_stage(capfd):
    watched = Watched({"one": stage("one"), "two": stage("two")})
    seen: list[str] = []

    def act() -> None:
        wait_for(lambda: "ready" in watched.said)
        watched.supervisor.signal_all(signal.SIGHUP)
        wait_for(
            lambda: (
                bool(seen.append(capfd.readouterr().out)) or "".join(seen).count("reloaded") == 2
            )
        )

    watched.run(act)


def test_a_stage_that_ends_to_reload_is_started_again_at_once():
    ends = STAGE.replace('print(json.dumps({"event": "reloaded"}), flush=True)', "sys.exit(0)")
    watched = Watched({"one": ["-c", f"NAME = 'one'\n{ends}"]})
    watched.supervisor._backoff_first_s = 3600.0  # an end that counts would wait this long
    (one,) = watched.supervisor.stages

    def act() -> None:
        wait_for(lambda: "ready" in watched.said)
        before = one.process.pid
        watched.supervisor.signal_all(signal.SIGHUP)
        wait_for(lambda: one.is_running and one.process.pid != before)

    assert watched.run(act) == 0
    assert one.exits == 0


def test_children_end_when_the_supervisor_is_killed(tmp_path):
    script = (
        "from node.supervisor import Supervisor\n"
        f"Supervisor({{'one': {stage('one')!r}}}, say=print).run()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert b"listening" in parent.stdout.readline()
        (child,) = psutil.Process(parent.pid).children()

        parent.kill()

        child.wait(timeout=10)


@pytest.fixture
def node_config(tmp_path):
    """A node with an untrained bundle and its own embedded database."""
    bundle = make_bundle(tmp_path / "head", "head")
    path = tmp_path / "vigil.toml"
    path.write_text(
        f'[node]\ndata_dir = "{tmp_path / "var"}"\nmin_free_mb = 0\n'
        f"[scp]\nport = {free_port()}\n[dashboard]\nport = {free_port()}\n"
        f'[inference]\nmodels = ["{bundle}"]\ndevice = "cpu"\n'
        '[[tenants]]\nid = "default"\nae_titles = ["VIGIL"]\nmodels = ["head"]\n'
    )
    return path


def test_serve_answers_echo_when_ready_and_stops_its_database(node_config, tmp_path):
    with RunningNode(node_config, tmp_path / "log") as node:
        node.wait_ready(120)
        (address,) = node.addresses["scp"]
        answer = send.echo(send.Peer(*address, "VIGIL", "ANYONE"))
        status = node.stop()

    log = (tmp_path / "log").read_text()
    assert (answer, status) == ("", 0)
    assert "no password is set yet: set the administrator's password at http://127.0.0.1:" in log
    assert not embedded.is_running(tmp_path / "var")


def test_serve_refuses_a_wrong_configuration_at_once(tmp_path):
    path = tmp_path / "vigil.toml"
    path.write_text('[[tenants]]\nid = "Not Allowed"\nae_titles = ["X"]\n')

    with (
        RunningNode(path, tmp_path / "log") as node,
        pytest.raises(NodeFailed, match="ended with 2"),
    ):
        node.wait_ready(30)

    assert "vigil.toml:2: tenants.0.id" in (tmp_path / "log").read_text()


def test_reception_starts_first_and_goes_on_while_the_database_is_away():
    tries: list[bool] = []
    supervisor: Supervisor

    def prepare() -> None:
        tries.append(supervisor.stages[0].is_running)
        if len(tries) < 2:
            raise DatabaseAway("the database does not answer")
        supervisor.stop()

    said: list[str] = []
    supervisor = Supervisor(
        {"scp": stage("scp"), "other": stage("other")}, say=said.append, prepare=prepare
    )

    supervisor.run()

    assert tries == [True, True]
    assert "the database does not answer; reception goes on, the other stages wait for it" in said
    assert supervisor.stages[1].process is None


def test_a_second_node_on_the_same_folder_is_refused_and_the_first_goes_on(node_config, tmp_path):
    with RunningNode(node_config, tmp_path / "first.log") as first:
        first.wait_ready(180)

        second = subprocess.run(
            [sys.executable, "-m", "node.cli", "serve", "--config", str(node_config)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

        assert second.returncode == 2
        assert "a node already runs on" in second.stdout
        assert embedded.is_running(tmp_path / "var")


def test_h40_a_killed_database_server_is_started_again(node_config, tmp_path):
    with RunningNode(node_config, tmp_path / "node.log") as node:
        node.wait_ready(180)
        pid_file = tmp_path / "var" / "database" / "cluster" / "postmaster.pid"
        before = int(pid_file.read_text().splitlines()[0])

        os.kill(before, signal.SIGKILL)

        wait_for(lambda: not psutil.pid_exists(before))
        wait_for(
            lambda: (
                embedded.is_running(tmp_path / "var")
                and int(pid_file.read_text().splitlines()[0]) != before
            ),
            60.0,
        )
