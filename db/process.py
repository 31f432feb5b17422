"""What every process of ours owes its parent: to die with it, and to stop when asked."""

import ctypes
import os
import select
import signal
from types import FrameType
from typing import Protocol

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when process `parent` ends; call it first.

    Linux sends it when the *thread* that started us ends (prctl 2): start children from a
    main thread.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)


class Stop(Protocol):
    """What tells a loop to stop: a StopSignal, or a threading.Event in tests."""

    def is_set(self) -> bool: ...

    def wait(self, timeout_s: float, /) -> bool: ...


class StopSignal:
    """Set by SIGTERM, SIGINT or SIGHUP. No threading.Event: a handler might wait for its lock."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_set = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)
        # Reloading is starting anew, with nothing lost: whoever watches starts it again.
        signal.signal(signal.SIGHUP, self._ask)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.set()

    def set(self) -> None:
        self._is_set = True
        os.eventfd_write(self._fd, 1)

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Sleep until it is set, `timeout_s` at most; whether it is."""
        if not self._is_set:
            select.select([self._fd], [], [], max(timeout_s, 0))
        return self._is_set
