"""`vigil serve`: start the database and every stage, restart what dies, stop all in order."""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import structlog

from config import logs
from config.settings import Settings, SettingsError, load
from db.errors import DatabaseAway, PermanentError, TransientError
from db.spool import FolderLock, SpoolBusy

log = structlog.get_logger()

#: In the order in which they stop: first nothing new comes in, last the page goes dark.
STAGES = ("scp", "inference", "dicom_sr", "dashboard")
ADDRESS_EVENT = "listening"  # a stage logs it once for each address, with `address` and `port`
READY_EVENT = "ready"  # one without an address logs this when it works
WRONG_CONFIGURATION = 2  # exit status: no restart will cure it
BACKOFF_FIRST_S, BACKOFF_MAX_S = 1.0, 30.0
STEADY_S = 60.0  # alive for this long: what was before is forgotten
CRASH_LOOP = 5  # exits in a row after which it is said loudly
STOP_GRACE_S = 30.0
TICK_S = 0.2
PREPARE_AGAIN_S = 2.0
TEND_S = 5.0
SERVE_LOCK = "serve.lock"  # held for as long as `vigil serve` runs on a data folder


@dataclass(slots=True)
class Stage:
    """One child process and what is known of it."""

    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    reader: threading.Thread | None = None
    started_at: float = 0.0  # monotonic
    start_again_at: float = math.inf  # monotonic
    exits: int = 0  # in a row
    is_ready: bool = False
    is_given_up: bool = False
    is_reloading: bool = False  # was told to read its configuration again, and may end for it
    addresses: list[str] = field(default_factory=list)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """Children of one parent, watched by the thread that starts them: they die with it."""

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        *,
        say: Callable[[str], None],
        prepare: Callable[[], None] = lambda: None,
        on_ready: Callable[[Sequence[Stage]], None] = lambda _: None,
        tend: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] | None = None,
        backoff_first_s: float = BACKOFF_FIRST_S,
    ) -> None:
        self.stages = [Stage(name, command) for name, command in commands.items()]
        self._say = say
        self._prepare, self._on_ready, self._tend = prepare, on_ready, tend
        self._environment = {**os.environ, **(environment or {})}
        self._backoff_first_s = backoff_first_s
        self._lines: queue.SimpleQueue[tuple[Stage, bytes]] = queue.SimpleQueue()
        self._is_stopping = False
        self._was_announced = False
        self.exit_status = 0

    def run(self) -> int:
        """Start all, watch until `stop` is called (a signal handler may), stop all; exit status.

        The first stage, reception, starts before `prepare`: it needs no database.
        """
        try:
            self.stages[0].start_again_at = 0.0
            self._watch()
            self._prepare_all()
            for stage in self.stages[1:]:
                stage.start_again_at = 0.0
            tended_at = time.monotonic()
            while not self._is_stopping:
                self._watch()
                self._pass_on(TICK_S)
                if time.monotonic() - tended_at > TEND_S:
                    self._tend()
                    tended_at = time.monotonic()
        finally:
            self._stop_all()
        return self.exit_status

    def _prepare_all(self) -> None:
        """Call `prepare` until it succeeds; what may pass by itself is waited for."""
        was_said = False
        while not self._is_stopping:
            try:
                self._prepare()
                return
            except TransientError as error:
                if not was_said:
                    self._say(f"{error}; reception goes on, the other stages wait for it")
                    was_said = True
                self._pass_on(PREPARE_AGAIN_S)
                self._watch()

    def stop(self) -> None:
        self._is_stopping = True

    def signal_all(self, number: int) -> None:
        """Pass a signal on to every stage that runs."""
        for stage in self.stages:
            if stage.is_running and stage.process:
                stage.is_reloading = number == signal.SIGHUP
                stage.process.send_signal(number)

    def _start(self, stage: Stage) -> None:
        stage.addresses.clear()
        stage.is_ready = False
        stage.started_at = time.monotonic()
        bound = str(Path(__file__).with_name("bound.py"))
        stage.process = subprocess.Popen(
            [sys.executable, "-I", "-S", bound, str(os.getpid()), *stage.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=self._environment,
            process_group=0,  # Ctrl-C in a terminal is for us; we stop them in order
        )
        stage.reader = threading.Thread(
            target=self._read, args=(stage, stage.process.stdout), daemon=True
        )
        stage.reader.start()

    def _read(self, stage: Stage, output: IO[bytes] | None) -> None:
        if output is None:
            return
        with output:
            for line in output:
                self._lines.put((stage, line))

    def _watch(self) -> None:
        now = time.monotonic()
        for stage in self.stages:
            if stage.process is None:
                if now >= stage.start_again_at and not stage.is_given_up:
                    self._start(stage)
            elif stage.process.poll() is not None:
                self._ended(stage, now)
            elif now - stage.started_at > STEADY_S:
                stage.exits = 0

    def _ended(self, stage: Stage, now: float) -> None:
        """A stage ended by itself: start it again later, and say so."""
        status = stage.process.returncode if stage.process else 0
        if stage.reader:
            stage.reader.join(1.0)  # its last words first
        stage.process = None
        stage.exits += 1
        if status == WRONG_CONFIGURATION and not self._was_announced:
            self._say(f"{stage.name} cannot start with this configuration; stopping")
            stage.is_given_up = True
            self.exit_status = WRONG_CONFIGURATION
            self.stop()
            return
        if stage.is_reloading and status in (
            0,
            -signal.SIGHUP,
        ):  # it ended to start anew, with the new settings
            stage.is_reloading = False
            stage.exits = 0
            stage.start_again_at = now
            log.info("stage_reloaded", worker=stage.name)
            return
        wait = min(self._backoff_first_s * 2.0 ** min(stage.exits - 1, 16), BACKOFF_MAX_S)
        stage.start_again_at = now + wait
        log.error(
            "stage_ended", worker=stage.name, status=status, restarts=stage.exits, wait_s=wait
        )
        if stage.exits == CRASH_LOOP:
            log.critical("stage_keeps_ending", worker=stage.name, restarts=stage.exits)
            self._say(
                f"{stage.name} ended {stage.exits} times in a row (last status {status}); "
                f"the other stages go on, it is tried again every {BACKOFF_MAX_S:.0f} s"
            )

    def _pass_on(self, timeout_s: float) -> None:
        """Hand the children's lines through, and notice which of them say something to us."""
        try:
            stage, line = self._lines.get(timeout=timeout_s)
            while True:
                self._note(stage, line)
                stage, line = self._lines.get_nowait()
        except queue.Empty:
            logs.Output.flush()

    def _note(self, stage: Stage, line: bytes) -> None:
        logs.Output.write(line.decode("utf-8", "replace"))
        fields = _fields(line)
        if fields.get("event") == ADDRESS_EVENT and "port" in fields:
            address = f"{fields.get('address', '')}:{fields['port']}"
            stage.addresses.append(address)
            self._say(f"{stage.name} listening on {address}")
        if fields.get("event") in (ADDRESS_EVENT, READY_EVENT):
            stage.is_ready = True
        if not self._was_announced and all(stage.is_ready for stage in self.stages):
            self._was_announced = True
            self._on_ready(self.stages)
            self._say("ready")

    def _stop_all(self) -> None:
        for stage in self.stages:
            if not (stage.is_running and stage.process):
                continue
            stage.process.terminate()
            deadline = time.monotonic() + STOP_GRACE_S
            while stage.is_running and time.monotonic() < deadline:
                self._pass_on(TICK_S / 4)
            if stage.is_running:
                log.error("stage_killed", worker=stage.name, wait_s=STOP_GRACE_S)
                stage.process.kill()
            stage.process.wait()
            if stage.reader:
                stage.reader.join(1.0)
        self._pass_on(0.01)


def serve(config: Path | None) -> int:
    """Everything on this machine; returns the exit status."""
    settings = load(config)
    logs.set_up("supervisor", settings.node.log_level)
    try:
        lock = FolderLock(settings.node.data_dir, SERVE_LOCK)
    except SpoolBusy:
        _say(f"a node already runs on {settings.node.data_dir}: stop it, or use another folder")
        return WRONG_CONFIGURATION
    supervisor = Supervisor(
        {stage: ["-m", stage] for stage in STAGES},
        say=_say,
        prepare=lambda: _upgrade(settings),
        on_ready=lambda stages: _offer_set_up_link(settings, stages),
        tend=lambda: _tend_database(settings),
        environment={"VIGIL_CONFIG": str(config.resolve())} if config else {},
    )
    _obey_signals(supervisor, config)
    try:
        return supervisor.run()
    finally:
        if _is_embedded(settings):
            from db import embedded

            embedded.stop(settings.node.data_dir)
        lock.close()
        log.info("stopped")


def _is_embedded(settings: Settings) -> bool:
    return not settings.node.database_url.get_secret_value()


def _tend_database(settings: Settings) -> None:
    """Start an embedded server that was killed; a hospital's own is not ours to mend."""
    if not _is_embedded(settings):
        return
    from db import embedded

    if embedded.is_running(settings.node.data_dir):
        return
    log.error("database_started_again")
    try:
        embedded.start(settings.node.data_dir)
    except (embedded.EmbeddedFailed, DatabaseAway) as error:
        _say(str(error))


def _upgrade(settings: Settings) -> None:
    # Imported late: reception is listening by the time that SQLAlchemy is loaded.
    from db import engine

    engine.upgrade(settings)


def _obey_signals(supervisor: Supervisor, config: Path | None) -> None:
    def stop(*_: Any) -> None:
        supervisor.stop()

    def reload(*_: Any) -> None:
        from node.bundles import check_overrides
        from node.models_list import active

        try:
            settings = load(config)
            check_overrides(settings, active(settings))
        except (SettingsError, PermanentError) as error:
            _say(f"not reloaded: {error}")
            return
        supervisor.signal_all(signal.SIGHUP)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, reload)


def _offer_set_up_link(settings: Settings, stages: Sequence[Stage]) -> None:
    """As long as nobody can sign in, each start prints a link by which the first person can."""
    from sqlalchemy.orm import Session

    from dashboard.users import first_link
    from node.database import opened

    pages = [
        address for stage in stages if stage.name == "dashboard" for address in stage.addresses
    ]
    if not pages:
        return
    with opened(settings) as engine, Session(engine) as session, session.begin():
        link = first_link(session, f"http://{pages[0]}")
    if link:
        _say(f"no password is set yet: set the administrator's password at {link}")


def _say(line: str) -> None:
    logs.Output.write(f"{line}\n")
    logs.Output.flush()


def _fields(line: bytes) -> dict[str, Any]:
    if not line.startswith(b"{"):
        return {}
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
