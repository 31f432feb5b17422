"""Child processes that are started again when they die, and stopped together."""

import os
import signal
import socket
import subprocess
import sys
import time

import structlog

from db.process import StopSignal

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 30.0
_HEALTHY_S = 60.0  # running this long clears the back-off
_STOP_S = 10.0
_TICK_S = 0.1
log = structlog.get_logger()


class Child:
    """`python -m module arguments`, with listening sockets by option name."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        sockets: dict[str, socket.socket | None] | None = None,
    ) -> None:
        self._module, self._arguments = module, arguments
        self._sockets = {name: s for name, s in (sockets or {}).items() if s is not None}
        self._process: subprocess.Popen[bytes] | None = None
        self._wait_s = _FIRST_WAIT_S
        self._started = self._due = 0.0

    def tend(self) -> None:
        """Start it, or start it again once its back-off is over."""
        now = time.monotonic()
        if self._process is not None:
            if self._process.poll() is None:
                return
            if now - self._started > _HEALTHY_S:
                self._wait_s = _FIRST_WAIT_S
            self._due = now + self._wait_s
            log.error(
                "child_ended",
                worker=self._module,
                status=self._process.returncode,
                wait_s=self._wait_s,
            )
            self._wait_s = min(self._wait_s * 2, _LONGEST_WAIT_S)
            self._process = None
        if now >= self._due:
            self._start()

    def _start(self) -> None:
        fds = {name: s.fileno() for name, s in self._sockets.items()}
        options = [text for name, fd in fds.items() for text in (name, str(fd))]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                self._module,
                *self._arguments,
                *options,
                "--parent",
                str(os.getpid()),
            ],
            pass_fds=list(fds.values()),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt at the terminal reaches it through us, in order
        )
        self._started = time.monotonic()

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def end(self, timeout_s: float) -> None:
        """Wait for it, then kill it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(timeout_s, 0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def supervise(children: list[Child], stopping: StopSignal) -> None:
    """Keep all of them running until `stopping`; then stop all, within a few seconds."""
    while not stopping.wait(_TICK_S):
        for child in children:
            child.tend()
    for child in children:
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    for child in children:
        child.end(deadline - time.monotonic())
