"""`vigil infer`: judges readiness, scores what is ready, until it is told to stop."""

import contextvars
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from config import logs
from config.settings import SettingsError, load
from db.engine import engine_for
from db.errors import PermanentError
from db.heartbeat import Heartbeat
from db.lifetime import worker_name
from db.process import Stop, StopSignal
from inference.device import HUNG, Device, watched
from inference.fleet import Fleet, OverrideRefused
from inference.readiness import Readiness
from inference.scheduler import Scheduler
from inference.serving import pick_device


def main(config: Path | None = None) -> int:
    """Run until SIGTERM. Returns 0, 2 when the configuration cannot be used, 1 without its GPU."""
    try:
        settings = load(config)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.set_up("inference", settings.node.log_level)
    stop = StopSignal()
    log = structlog.get_logger()
    try:
        torch_device = pick_device(settings.inference.device)
    except PermanentError as error:
        # It may come back, or its driver be loaded late: tried again, and reception goes on.
        log.error("no_device", device=settings.inference.device)
        sys.stderr.write(f"{error}\n")
        return 1
    engine = engine_for(settings, "node")
    device = Device(torch_device, settings.inference.max_batch)
    fleet = Fleet(engine, settings, device)
    with watched(device, settings.inference.device_timeout_s, lambda: os._exit(HUNG)):
        fleet.first(stop)
    for refused in fleet.refused.values():
        if refused.code == OverrideRefused.code:
            sys.stderr.write(f"{refused.reason}\n")
            return 2
    heartbeat = Heartbeat(engine, "inference", fleet.detail)
    beside = [
        _start("readiness", Readiness(engine, settings, fleet).run, stop),
        _start("models", fleet.run, stop),
    ]
    log.info("ready", device=str(torch_device), n=len(fleet.served))
    worker = worker_name("inference")
    try:
        Scheduler(engine, settings, fleet, device, worker, stop).run()
    finally:
        stop.set()  # a scheduler that failed takes the process down; the supervisor starts it again
        for thread in beside:
            thread.join()
        heartbeat.close()
        engine.dispose()
    log.info("stopped")
    return 0


def _start(name: str, run: Callable[[Stop], None], stop: StopSignal) -> threading.Thread:
    def until_stopped() -> None:
        try:
            run(stop)
        finally:
            stop.set()  # a process that lacks one of its loops must not look healthy

    # In a copy of the context: it has what every log line says of its process.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(until_stopped,), name=name)
    thread.start()
    return thread


if __name__ == "__main__":
    sys.exit(main())
