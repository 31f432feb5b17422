"""A PostgreSQL that a test stops, starts and wounds, as a hospital's own server beside the node."""

import os
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from sqlalchemy import create_engine, text

from db import embedded


class Server:
    """Reached by `url`, whether it runs or not."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        os.chmod(data_dir, 0o711)
        address = embedded.start(data_dir)
        engine = create_engine(address, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("CREATE DATABASE hospital"))
        engine.dispose()
        self.url = address.set(database="hospital").render_as_string(hide_password=False)

    def start(self) -> None:
        embedded.start(self._data_dir)

    def stop(self) -> None:
        """At once, as a crash does: whatever was not committed is lost (SIGQUIT: immediate)."""
        process = self._process()
        process.send_signal(signal.SIGQUIT)
        process.wait(60)

    def kill(self) -> None:
        self._process().kill()
        while embedded.is_running(self._data_dir):
            time.sleep(0.1)

    def kill_backend(self) -> str:
        """One connection's process, in mid-transaction if there is one: all others end with it."""
        backends = [
            child
            for child in self._process().children()
            if "hospital" in (title := " ".join(child.cmdline())) and "postgres:" in title
        ]
        busy = [one for one in backends if "idle" not in " ".join(one.cmdline())[-12:]]
        for one in (busy or backends)[:1]:
            one.send_signal(signal.SIGKILL)
        return "a connection under way" if busy else "an idle connection"

    def _process(self) -> psutil.Process:
        pid_file = self._data_dir / "database" / "cluster" / "postmaster.pid"
        return psutil.Process(int(pid_file.read_text().splitlines()[0]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        embedded.stop(self._data_dir)
