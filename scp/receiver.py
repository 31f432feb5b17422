"""One receiver process: accepts on inherited sockets, keeps into its own spool folder."""

import argparse
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType

import structlog

from config import logs
from config.settings import Settings, SettingsError, load
from db.errors import TransientError
from db.process import StopSignal, die_with_parent
from db.spool import Spool
from scp import tls
from scp.door import Door
from scp.server import Listener, application_entity, serve, stop
from scp.upper_layer import configure

_RETRY_S = 1.0
log = structlog.get_logger()


def main() -> None:
    given = _arguments()
    die_with_parent(given.parent)
    settings = load(given.config)
    logs.set_up("scp", settings.node.log_level)
    threading.excepthook = _log_crash
    stopping = StopSignal()
    configure()
    spool = _own_folder(settings, given.name, stopping)
    if spool is None:
        return
    door = Door(settings, spool, settings.scp.processes)
    signal.signal(signal.SIGHUP, lambda _, __: _reload(door, given.config, _, __))
    listeners = _listeners(door, given.fd, given.tls_fd)
    for listener in listeners:
        serve(listener)
    log.info("receiver_started", worker=given.name)
    while not stopping.wait(1.0):
        pass
    stop(listeners, door)
    spool.close()
    log.info("receiver_stopped", worker=given.name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scp.receiver")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parent", type=int, default=os.getppid())
    parser.add_argument("--fd", type=int, default=-1)
    parser.add_argument("--tls-fd", type=int, default=-1)
    return parser.parse_args()


def _own_folder(settings: Settings, name: str, stopping: StopSignal) -> Spool | None:
    """Our spool folder, waited for while a predecessor still holds it or the disk refuses."""
    while not stopping.is_set():
        try:
            return Spool(settings.node.data_dir, name, min_free_mb=settings.node.min_free_mb)
        except TransientError as error:
            log.warning("spool_not_opened", worker=name, exc_code=error.code)
            time.sleep(_RETRY_S)
    return None


def _listeners(door: Door, fd: int, tls_fd: int) -> list[Listener]:
    scp = door.settings.scp
    ae = application_entity(scp, door.settings.tenants[0].ae_titles[0])
    found = []
    if fd >= 0:
        found.append(Listener(ae, socket.socket(fileno=fd), door))
    if tls_fd >= 0:
        found.append(Listener(ae, socket.socket(fileno=tls_fd), door, tls.context(scp)))
    return found


def _reload(door: Door, config: Path | None, _: int, __: FrameType | None) -> None:
    """Tenants, their peers and the disk's watermark change without dropping an association; the
    rest of what reception heeds needs a restart."""
    try:
        fresh = load(config)
    except SettingsError:
        log.error("settings_not_reloaded", exc_code="settings_error")
        return
    door.reload(fresh.tenants, fresh.node.min_free_mb)
    log.info("settings_reloaded", n=len(fresh.tenants))


def _log_crash(args: threading.ExceptHookArgs) -> None:
    log.error("thread_crashed", exc_type=args.exc_type.__name__)  # its message may hold a name


if __name__ == "__main__":
    main()
