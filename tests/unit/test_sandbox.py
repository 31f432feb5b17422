"""The sandbox: whatever bytes do to a child, the node gets an answer or a ChildDied."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from db.errors import ChildDied, NotDicom
from db.sandbox import Sandbox, Unreadable

sys.path.insert(0, str(Path(__file__).parent))  # the child inherits it
import sandboxed


@pytest.fixture(scope="module")
def box():
    with Sandbox(1, memory_mb=1024, cpu_s=2, max_answer_mb=2) as box:
        yield box


def still_works(box):
    return box.run(sandboxed.echo, 1, timeout_s=10)[0]["value"] == 1


def test_an_answer_travels_as_json_and_arrays(box):
    value, arrays = box.run(sandboxed.arrays, timeout_s=10)

    assert value == {}
    assert [array.shape for array in arrays] == [(2, 3), (0, 3), ()]
    assert [array.dtype for array in arrays] == [np.int16, np.float32, np.float64]
    assert arrays[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays[2] == 1.5


def test_children_stay_warm(box):
    pids = {box.run(sandboxed.echo, 1, timeout_s=10)[0]["pid"] for _ in range(5)}

    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.parametrize(
    "function", [sandboxed.spin, sandboxed.swallow_memory, sandboxed.crash, sandboxed.leave]
)
def test_a_child_past_a_limit_is_replaced(box, function):
    with pytest.raises(ChildDied):
        box.run(function, timeout_s=20)

    assert still_works(box)


def test_a_child_that_hangs_is_killed_in_time(box):
    with pytest.raises(ChildDied, match="TimeoutError"):
        box.run(sandboxed.sleep, 3600, timeout_s=0.5)

    assert still_works(box)


def test_cpu_time_is_allowed_per_call(box):
    for _ in range(3):  # of a second each, in a child that may use two
        box.run(sandboxed.echo, 1, timeout_s=10)

    assert still_works(box)


def test_our_own_errors_keep_their_class(box):
    with pytest.raises(NotDicom, match="the data set is cut off"):
        box.run(sandboxed.refuse, timeout_s=10)


def test_other_errors_say_their_type_and_no_name_of_a_patient(box):
    with pytest.raises(Unreadable) as caught:
        box.run(sandboxed.fail, timeout_s=10)

    assert str(caught.value) == "ValueError"


def test_a_child_writes_no_file(box, tmp_path):
    with pytest.raises(Unreadable):
        box.run(sandboxed.write_file, str(tmp_path / "x"), timeout_s=10)


def test_an_answer_over_the_cap_is_not_taken(box):
    with pytest.raises(ChildDied):
        box.run(sandboxed.huge_answer, timeout_s=10)

    assert still_works(box)


def test_objects_never_travel(box):
    with pytest.raises((ChildDied, Unreadable)):
        box.run(sandboxed.objects, timeout_s=10)

    assert still_works(box)


def test_a_child_inherits_no_secret_and_no_torch(box, monkeypatch):
    monkeypatch.setenv("VIGIL_NODE__DATABASE_URL", "postgresql://secret")

    with Sandbox(1) as fresh:
        inherited, _ = fresh.run(sandboxed.environment, timeout_s=10)
        found, _ = fresh.run(sandboxed.stdin_is_empty, timeout_s=10)

    assert not [name for name in inherited if name.startswith("VIGIL")]
    assert found == {"read": "", "torch": False}


def test_only_functions_of_modules_can_be_asked(box):
    with pytest.raises(ValueError, match="not a function of a module"):
        box.run(lambda: ({}, []), timeout_s=1)


def test_several_threads_share_the_children():
    with Sandbox(2) as box, ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda n: box.run(sandboxed.echo, n, timeout_s=20)[0]["value"], range(64))
        )

    assert found == list(range(64))


def test_closing_ends_the_children_and_says_so():
    box = Sandbox(1)
    pid = box.run(sandboxed.echo, 1, timeout_s=10)[0]["pid"]

    box.close()

    assert not psutil.pid_exists(pid)
    with pytest.raises(RuntimeError, match="closed"):
        box.run(sandboxed.echo, 1, timeout_s=1)


def test_a_child_outlives_the_thread_that_first_used_it():
    with Sandbox(1) as box:
        pids = []
        for _ in range(2):
            ask = threading.Thread(
                target=lambda: pids.append(box.run(sandboxed.echo, 1, timeout_s=10)[0]["pid"])
            )
            ask.start()
            ask.join()

    assert pids[0] == pids[1]


def test_a_child_dies_with_its_parent(tmp_path):
    sign = tmp_path / "started"
    code = (
        "import sys, os; sys.path[:0] = sys.argv[2:];"
        "import sandboxed; from db.sandbox import Sandbox;"
        "box = Sandbox(1); print(box.run(sandboxed.echo, 1, timeout_s=10)[0]['pid'], flush=True);"
        "box.run(sandboxed.parent_file, sys.argv[1], timeout_s=60)"
    )
    root = Path(__file__).parents[2]
    paths = [str(Path(__file__).parent), str(root)]
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(sign), *paths], stdout=subprocess.PIPE, text=True
    )
    with parent:
        pid = int(parent.stdout.readline())
        wait_for(sign.exists)

        parent.kill()
    wait_for(lambda: not psutil.pid_exists(pid))


def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
