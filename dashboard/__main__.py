"""`vigil dashboard`: serve the pages until told to stop."""

import socket
import sys
import threading
from pathlib import Path

import structlog
import uvicorn

from config.logs import set_up
from config.settings import Settings, SettingsError, load
from dashboard.app import THREADS, create_app
from db.engine import engine_for
from db.process import StopSignal
from db.sandbox import Sandbox

log = structlog.get_logger()

GRACE_S = 3
SANDBOX_CHILDREN = 2


def main(config: Path | None = None) -> int:
    """Serve until SIGTERM. Returns 0, 1 when it cannot listen, or 2 on a bad configuration."""
    try:
        settings = load(config)
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before there is a log
        return 2
    set_up("dashboard", settings.node.log_level)
    stop = StopSignal()
    try:
        listener = _listen(settings)
    except OSError as error:
        log.error("cannot_listen", port=settings.dashboard.port, exc_type=type(error).__name__)
        return 1
    engine = engine_for(settings, "web", pool_size=THREADS)
    with listener, Sandbox(SANDBOX_CHILDREN) as sandbox:
        app = create_app(settings, engine, sandbox, stop)
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, lifespan="on",
                forwarded_allow_ips="127.0.0.1", timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=15, limit_concurrency=500,
            )
        )  # fmt: skip
        has_served = _serve(server, listener, stop)
    engine.dispose()
    return 0 if has_served else 1


def _serve(server: uvicorn.Server, listener: socket.socket, stop: StopSignal) -> bool:
    """Serve in a thread, so that signals stay ours: streams must hear of the end first."""
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()
    is_announced = False
    while thread.is_alive() and not stop.wait(0.05 if not is_announced else 1.0):
        if server.started and not is_announced:
            address, port = listener.getsockname()[:2]
            log.info("listening", address=address, port=port)
            is_announced = True
    server.should_exit = True
    thread.join()
    return is_announced


def _listen(settings: Settings) -> socket.socket:
    host, port = settings.dashboard.host, settings.dashboard.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=256)


if __name__ == "__main__":
    sys.exit(main())
