"""`vigil scp`: opens the listening sockets, then keeps receivers and their intakes running."""

import argparse
import errno
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import structlog

from config import logs
from config.settings import ScpSettings, SettingsError, load
from db.process import StopSignal
from scp.children import Child, supervise

#: A node whose supervisor was killed ends its receivers within ten seconds; then the port is free.
PORT_WAIT_S = 15.0
log = structlog.get_logger()


def main(config: Path | None = None) -> int:
    try:
        settings = load(config)
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before there is a log
        return 2
    logs.set_up("scp", settings.node.log_level)
    stopping = StopSignal()
    try:
        plain, secure = _sockets(settings.scp)
    except OSError as error:
        where = f"{settings.scp.host}:{settings.scp.port}"
        print(f"cannot listen on {where}: {error.strerror}", file=sys.stderr)  # noqa: T201 - as above
        log.error("not_listening", exc_type=type(error).__name__, port=settings.scp.port)
        return 2
    children = _children(config, settings.scp.processes, plain, secure)

    def reload(_: int, __: FrameType | None) -> None:
        for child in children:
            child.signal(signal.SIGHUP)

    signal.signal(signal.SIGHUP, reload)
    supervise(children, stopping)
    return 0


def _children(
    config: Path | None, processes: int, plain: socket.socket | None, secure: socket.socket | None
) -> list[Child]:
    common = ["--config", str(config)] if config else []
    children = []
    for number in range(processes):
        own = [*common, "--name", f"scp-{number}"]
        children.append(Child("scp.receiver", own, {"--fd": plain, "--tls-fd": secure}))
        children.append(Child("db.drain", own))
    return children


def _sockets(settings: ScpSettings) -> tuple[socket.socket | None, socket.socket | None]:
    """The plain and the TLS socket; with a TLS port, a plain port of 0 means none (DESIGN 3)."""
    secure = _listen(settings.host, settings.tls_port) if settings.tls_port else None
    plain = None if secure and not settings.port else _listen(settings.host, settings.port)
    return plain, secure


def _listen(host: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    deadline = time.monotonic() + PORT_WAIT_S
    while True:
        try:
            listening = socket.create_server((host, port), family=family, backlog=256)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    address, real_port, *_ = listening.getsockname()
    log.info("listening", address=address, port=real_port)
    return listening


def _arguments() -> Path | None:
    parser = argparse.ArgumentParser(prog="vigil scp")
    parser.add_argument("--config", type=Path)
    config: Path | None = parser.parse_args().config
    return config


if __name__ == "__main__":
    sys.exit(main(_arguments()))
