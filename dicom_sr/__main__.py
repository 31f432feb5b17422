"""`vigil deliver`: builds objects from findings and sends them, until it is told to stop."""

import sys
from importlib.metadata import version
from pathlib import Path

import pydicom
import structlog

from config import logs
from config.settings import SettingsError, load
from db.engine import engine_for
from db.heartbeat import Heartbeat
from db.lifetime import worker_name
from db.process import StopSignal
from db.sandbox import Sandbox
from dicom_sr.deliver import Deliverer

#: Headers and key images: small work beside inference.
READERS, READER_MEMORY_MB, READER_CPU_S = 2, 4096, 60.0


def main(config: Path | None = None) -> int:
    """Run until SIGTERM. Returns 0, or 2 when the configuration cannot be used."""
    try:
        settings = load(config)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.set_up("deliver", settings.node.log_level)
    # Source values that are not what their VR says are passed on or left out by our own rules;
    # pydicom's warnings would print them, and they can hold a name.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    stop = StopSignal()
    log = structlog.get_logger()
    n_destinations = sum(len(tenant.destinations) for tenant in settings.tenants)
    engine = engine_for(settings, "node", pool_size=5 + n_destinations)
    heartbeat = Heartbeat(engine, "deliver", lambda: {"n_destinations": n_destinations})
    sandbox = Sandbox(size=READERS, memory_mb=READER_MEMORY_MB, cpu_s=READER_CPU_S)
    log.info("ready", n=n_destinations)
    try:
        worker = worker_name("deliver")
        Deliverer(engine, settings, sandbox, worker=worker, version=version("vigil")).run(stop)
    finally:
        sandbox.close()
        heartbeat.close()
        engine.dispose()
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
