"""Which processes have ended: a wrong yes would let two senders work at once."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from db.lifetime import is_gone, worker_name

NAMED = "from db.lifetime import worker_name; print(worker_name('deliver'), flush=True); input()"


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", NAMED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.kill()


def test_a_process_that_lives_is_not_gone(other):
    assert not is_gone(other.stdout.readline().strip())
    assert not is_gone(worker_name("deliver"))


def test_a_killed_process_is_gone_even_before_its_parent_has_asked_for_it(other):
    name = other.stdout.readline().strip()

    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)

    assert is_gone(name)  # a zombie
    other.wait()
    assert is_gone(name)


def test_a_pid_that_is_used_again_belongs_to_somebody_else():
    host, stage, pid, identity = worker_name("deliver").split("/")
    here, _, started = identity.rpartition("-")

    assert is_gone(f"{host}/{stage}/{pid}/{here}-{int(started) - 1}")


@pytest.mark.parametrize("part", ["boot", "namespace"])
def test_what_cannot_be_seen_from_here_is_not_called_gone(part):
    """Another machine, or another container: no pid says anything."""
    host, stage, _, identity = worker_name("deliver").split("/")
    boot, namespace, started = identity.rsplit("-", 2)
    boot, namespace = (boot[::-1], namespace) if part == "boot" else (boot, f"{namespace}1")

    assert not is_gone(f"{host}/{stage}/4194303/{boot}-{namespace}-{started}")


@pytest.mark.parametrize("name", ["", "test", "host/deliver/12", "a/b/c/d-e-f", "////"])
def test_a_name_of_another_kind_is_not_called_gone(name):
    assert not is_gone(name)
