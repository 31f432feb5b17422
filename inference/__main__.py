"""`vigil infer`: judges readiness, scores what is ready, until it is told to stop."""

import sys
import threading
from pathlib import Path
from typing import Any

import structlog

from config import logs
from config.settings import SettingsError, load
from db.engine import engine_for
from db.errors import PermanentError
from db.heartbeat import Heartbeat, process_name
from db.process import StopSignal
from inference.bundle import check_overrides
from inference.device import Device
from inference.readiness import Readiness
from inference.scheduler import Scheduler
from inference.serving import load_served, pick_device


def main(config: Path | None = None) -> int:
    """Run until SIGTERM. Returns 0, or 2 when the configuration cannot be used."""
    try:
        settings = load(config)
        device = pick_device(settings.inference.device)
    except (SettingsError, PermanentError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.set_up("inference", settings.node.log_level)
    stop = StopSignal()
    log = structlog.get_logger()
    engine = engine_for(settings, "node")
    served, refused = load_served(settings.inference.models, device)
    try:
        for tenant in settings.tenants:
            for one in served.values():
                check_overrides(one.bundle, tenant.thresholds, tenant.prevalence)
    except PermanentError as error:
        sys.stderr.write(f"{error}\n")
        return 2

    def detail() -> dict[str, Any]:
        return {
            "device": str(device),
            "models": {name: one.bundle.manifest.version for name, one in served.items()},
            "refused": {one.name: {"code": one.code, "reason": one.reason} for one in refused},
        }

    heartbeat = Heartbeat(engine, "inference", detail)
    manifests = {name: one.bundle.manifest for name, one in served.items()}
    sweep = Readiness(engine, settings, manifests)

    def judge() -> None:
        try:
            sweep.run(stop)
        finally:
            stop.set()  # a process that no longer judges must not look healthy

    readiness = threading.Thread(target=judge, name="readiness")
    readiness.start()
    log.info("ready", device=str(device), n=len(served))
    worker = process_name("inference")
    try:
        runner = Device(device, settings.inference.max_batch)
        Scheduler(engine, settings, served, runner, worker, stop).run()
    finally:
        stop.set()  # a scheduler that failed takes the process down; the supervisor starts it again
        readiness.join()
        heartbeat.close()
        engine.dispose()
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
