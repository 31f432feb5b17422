"""Which process is which, and whether one has surely ended.

A name and a pid are not enough: pids are used again, and containers that share a host's name each
have a pid 1. A boot, a pid namespace, a pid and a start time together are never used twice.
"""

import os
from pathlib import Path

from db.heartbeat import process_name

_DEAD = "ZX"  # proc(5): a zombie runs no more, though its parent has not asked for it yet


def worker_name(stage: str) -> str:
    """A name of this process that no other ever has: host/stage/pid/identity."""
    _, started = _stat(os.getpid())
    return f"{process_name(stage)}/{_here()}-{started}"


def is_gone(worker: str) -> bool:
    """Whether the process of that name has ended; False where that cannot be known from here."""
    process, _, identity = worker.rpartition("/")
    here, _, started = identity.rpartition("-")
    number = process.rpartition("/")[2]
    if here != _here() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
        state, since = _stat(int(number))
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or hidden from us
        return False
    return state in _DEAD or since != started


def _here() -> str:
    """This boot of this machine, and this pid namespace: where a pid means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"


def _stat(pid: int) -> tuple[str, str]:
    """State, and start in clock ticks since boot (proc(5), fields 3 and 22)."""
    line = Path(f"/proc/{pid}/stat").read_bytes()
    fields = line.rpartition(b")")[2].split()  # the name before it can hold anything
    return fields[0].decode(), fields[19].decode()
