"""A whole node whose processes and database are killed: nobody can tell afterwards (H38, H40, H42).

All points, alone and in any order, with outages between them: `make soak`.
"""

import ast
import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from db.faults import POINTS, arm
from db.tables import AnalysisRow, JobRow
from tests.e2e import disturbed
from tests.e2e.disturbed import DEADLINE_S, KINDS, ORDINARY, Disturbed, Outcome, Study
from tests.e2e.server import Server

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
PACKAGES = ("config", "db", "scp", "inference", "dicom_sr", "dashboard", "node")
SEED = int(os.environ.get("VIGIL_FAULT_SEED", "38"))
N_PASSAGES = 3


#: By hand for longer: VIGIL_OUTAGE_S=120.
OUTAGE_S = float(os.environ.get("VIGIL_OUTAGE_S", "10"))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def node(tmp_path_factory, server) -> Iterator[Disturbed]:
    with disturbed.running(tmp_path_factory.mktemp("faults"), database_url=server.url) as found:
        yield found


@pytest.fixture(scope="module")
def expected(node) -> dict[str, Outcome]:
    """What an undisturbed study of each kind ends as."""
    outcomes = {}
    for kind in KINDS:
        study = node.study(kind)
        assert node.send(study) == 1
        outcomes[kind] = node.wait(study)
        assert node.wrongs(study) == []
        assert node.n_sent_again(study) == 0
    return outcomes


def points_in_code() -> list[str]:
    """The name in each call of `point`."""
    names = []
    for path in itertools.chain(*((ROOT / package).rglob("*.py") for package in PACKAGES)):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "point":
                (name,) = call.args
                assert isinstance(name, ast.Constant), f"{path.name}: a point has a plain name"
                names.append(name.value)
    return names


def passages() -> list[list[str]]:
    """One point of each process a passage, in a seeded order."""
    chance = random.Random(SEED)
    stages = dict.fromkeys(ORDINARY.values())
    columns = [chance.sample(sorted(POINTS[one]), len(POINTS[one])) for one in stages]
    rows = [[column[n % len(column)] for column in columns] for n in range(N_PASSAGES)]
    return [[name for name in row if name != "notice_drawn"] for row in rows]


def test_every_point_is_in_the_list_and_called_once():
    assert sorted(points_in_code()) == sorted(name for one in POINTS.values() for name in one)


def test_every_point_is_passed_in_an_ordinary_run(node, expected):
    assert node.passed() == set(ORDINARY)


def test_undisturbed_studies_end_in_the_three_ways_there_are(expected):
    found, clear, refused = (expected[kind] for kind in ("found", "clear", "refused"))
    assert found.state == clear.state == "DELIVERED"
    assert found.received == {"summary": 1, "overlay": 3, "sr": 1, "ko": 1}
    assert clear.received == {"summary": 1, "sr": 1}
    assert (refused.state, refused.reason_code) == ("NOT_ANALYSED", "kernel")
    assert refused.received == {"summary": 1}


@pytest.mark.parametrize("names", passages(), ids=lambda names: "-".join(names))
def test_h38_killed_at_named_points_a_study_ends_as_if_it_had_not_been(node, expected, names):
    for name in names:
        arm(node.faults, name, 3 if name in POINTS["receiver"] else 1)
    study = node.study("found")

    node.send(study)

    assert node.wait(study) == expected["found"]
    assert node.armed() == []
    assert node.wrongs(study) == []
    assert node.leftovers() == []


def test_h38_a_killed_supervisor_is_started_again_at_once_and_loses_nothing(node, expected):
    study = node.study("found")
    hospital = node.hospital
    below = psutil.Process(hospital.node.process.pid).children(recursive=True)
    node.send(study)

    os.kill(hospital.node.process.pid, signal.SIGKILL)
    hospital.node.stop()
    hospital.start()

    assert psutil.wait_procs(below, timeout=60)[1] == []
    assert node.wait(study) == expected["found"]
    assert node.wrongs(study) == []


@pytest.mark.parametrize("outage_s", [1.0, OUTAGE_S], ids=["a second", "longer"])
def test_h40_reception_goes_on_while_the_database_is_down_and_the_rest_resumes(
    node, expected, server, outage_s
):
    under_way = node.study("found")
    node.send(under_way)

    server.stop()
    begun, sent = time.monotonic(), []
    while not sent or time.monotonic() - begun < outage_s:
        study = node.study("clear")
        assert node.send(study) == 1  # at the first try, every instance 0x0000
        sent.append(study)
        time.sleep(outage_s / 20)  # what comes in must be analysed afterwards
    server.start()

    assert node.wait(under_way) == expected["found"]
    for study in sent:
        assert node.wait(study, DEADLINE_S + outage_s) == expected["clear"]
    for study in (under_way, *sent):
        assert node.wrongs(study) == []
        assert node.n_sent_again(study) == 0


def test_h40_a_server_that_crashes_in_mid_transaction_costs_nothing(node, expected, server):
    study = node.study("clear")

    sender = threading.Thread(target=node.send, args=(study,))
    sender.start()
    for _ in range(3):
        time.sleep(1.0)
        server.kill_backend()  # PostgreSQL ends every connection then, and recovers
    sender.join()

    assert node.wait(study) == expected["clear"]
    assert node.wrongs(study) == []


def test_h42_a_study_that_kills_its_worker_every_time_fails_with_a_reason_and_others_flow(
    node, expected, server
):
    poison, other = node.study("found"), node.study("clear")
    killer = Killer(node, poison)

    node.send(poison)
    killer.start()
    node.send(other)

    assert node.wait(other) == expected["clear"]
    assert node.wait(poison).reason_code == "worker_died"
    (analysis,) = node.hospital.study_rows(AnalysisRow, poison.uid, poison.kind)
    assert (analysis.state, analysis.reason) == (
        "FAILED", "the worker died 3 times on this study",
    )  # fmt: skip
    killer.join()
    assert killer.n_kills >= 3
    assert node.received(poison) == {}
    after = node.study("found")
    node.send(after)
    assert node.wait(after) == expected["found"]


class Killer(threading.Thread):
    """Whoever analyses that study dies of it."""

    def __init__(self, node: Disturbed, poison: Study) -> None:
        super().__init__(daemon=True)
        self._node, self._poison = node, poison
        self.n_kills = 0

    def run(self) -> None:
        killed: set[str] = set()
        while not self._is_over():
            for worker in self._workers() - killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(worker.split("/")[2]), signal.SIGKILL)
                killed.add(worker)
                self.n_kills += 1
            time.sleep(0.02)

    def _jobs(self) -> list[JobRow]:
        analyses = self._node.hospital.study_rows(AnalysisRow, self._poison.uid, self._poison.kind)
        return [
            job
            for one in analyses
            for job in self._node.hospital.query(
                select(JobRow).where(JobRow.analysis_id == one.id, JobRow.kind == "INFER")
            )
        ]

    def _workers(self) -> set[str]:
        return {job.worker for job in self._jobs() if job.state == "DOING"}

    def _is_over(self) -> bool:
        return any(job.state in ("DONE", "FAILED") for job in self._jobs())
