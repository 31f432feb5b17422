"""Receivers in threads of the test: their listener, their door and their spool."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom.config
from pynetdicom import _config

from config.settings import NodeSettings, ScpSettings, Settings
from config.tenants import Tenant
from db.spool import Spool
from scp.door import Door
from scp.server import Listener, application_entity, serve, stop
from scp.upper_layer import configure


@contextmanager
def receivers(data_dir: Path) -> Iterator[Callable[..., SimpleNamespace]]:
    """Starts receivers with settings of one's own; all are stopped at the end."""
    library = pydicom.config.settings
    modes = library.reading_validation_mode, library.writing_validation_mode
    validators = dict(_config.VALIDATORS)
    configure()
    started: list[tuple[Listener, Door]] = []

    def start(
        tls_context: Any = None, min_free_mb: int = 0, tenants: tuple[Tenant, ...] = (), **scp: Any
    ) -> SimpleNamespace:
        settings = Settings(
            node=NodeSettings(data_dir=data_dir, min_free_mb=min_free_mb),
            scp=ScpSettings(**scp),
            tenants=tenants,
        )
        box = Spool(data_dir, f"scp-{len(started)}", min_free_mb=min_free_mb)
        door = Door(settings, box)
        listening = socket.create_server(("127.0.0.1", 0))
        listener = Listener(application_entity(settings.scp, "VIGIL"), listening, door, tls_context)
        serve(listener)
        started.append((listener, door))
        port = listener.server_address[1]
        return SimpleNamespace(port=port, box=box, door=door, listener=listener)

    try:
        yield start
    finally:
        for listener, door in started:
            stop([listener], door)
            door.spool.close()
        library.reading_validation_mode, library.writing_validation_mode = modes
        _config.VALIDATORS.update(validators)
