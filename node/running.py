"""A whole node as a child process: for the demo, `vigil bench` and the end-to-end tests."""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from db.errors import PermanentError

_ADDRESS = re.compile(r"^(\w+) listening on (.+):(\d+)$")
STOP_GRACE_S = 90.0


class NodeFailed(PermanentError):
    """The node did not start; its log says why."""

    code = "node_failed"


class RunningNode:
    """`vigil serve` with this configuration; its output goes to `log`."""

    def __init__(
        self, config: Path, log: Path, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.addresses: dict[str, list[tuple[str, int]]] = {}
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        bound = str(Path(__file__).with_name("bound.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", bound, str(os.getpid()),
             "-m", "node.cli", "serve", "--config", str(config.resolve())],
            cwd=Path(__file__).parents[1],  # where `-m` finds the packages of a source tree
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            process_group=0,
            text=True,
            errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the node has said `ready`.

        Raises
        ------
        NodeFailed
            If it ends before that, or takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                line = self._said.get(timeout=0.1)
            except queue.Empty:
                if self.process.poll() is not None:
                    raise NodeFailed(
                        f"the node ended with {self.process.returncode}; see {self.log}"
                    ) from None
                continue
            if line == "ready":
                return
            if "times in a row" in line:  # node.supervisor: it will not get better by waiting
                raise NodeFailed(f"{line}; see {self.log}")
        raise NodeFailed(f"the node was not ready within {timeout_s:.0f} s; see {self.log}")

    def stop(self) -> int:
        """SIGTERM, and SIGKILL after the grace; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(2.0)
        if self.process.stdout:
            self.process.stdout.close()
        return self.process.returncode

    def _read(self, output: IO[str] | None) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            for line in output or ():
                file.write(line)
                file.flush()
                said = line.rstrip("\n")
                if found := _ADDRESS.match(said):
                    stage, host, port = found.groups()
                    self.addresses.setdefault(stage, []).append((host, int(port)))
                if not said.startswith("{"):
                    self._said.put(said)


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
