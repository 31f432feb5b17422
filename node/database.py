"""The node's database for a command that comes and goes beside a running or a stopped node."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, text

from config.settings import Settings
from db import embedded, engine
from db.errors import PermanentError
from db.spool import FolderLock, SpoolBusy
from node.supervisor import SERVE_LOCK


class NeverStarted(PermanentError):
    """There is no database yet, and the command has no reason to make one."""

    code = "never_started"


@contextmanager
def opened(settings: Settings, *, create: bool = False) -> Iterator[Engine]:
    """An engine with the stages' role; an embedded server that was down is stopped again.

    Parameters
    ----------
    create : make or upgrade the database first

    Raises
    ------
    NeverStarted
        If there is none and `create` is not set.
    """
    data_dir = settings.node.data_dir
    is_embedded = not settings.node.database_url.get_secret_value()
    if is_embedded and not create and not (data_dir / "database" / "cluster").exists():
        raise NeverStarted(f"no node has run in {data_dir} yet: start it with `vigil serve`")
    was_down = is_embedded and not embedded.is_running(data_dir) and not is_served(data_dir)
    if create:
        engine.upgrade(settings)
    opened_engine = engine.engine_for(settings, "node", pool_size=2)
    try:
        yield opened_engine
        is_alone = was_down and not _has_others(opened_engine)
    except BaseException:
        is_alone = was_down
        raise
    finally:
        opened_engine.dispose()
        if is_alone:
            embedded.stop(data_dir)


def is_served(data_dir: Path) -> bool:
    """Whether a `vigil serve` runs on this folder; the server is its business then."""
    if not data_dir.exists():
        return False
    try:
        FolderLock(data_dir, SERVE_LOCK).close()
    except SpoolBusy:
        return True
    return False


def _has_others(opened_engine: Engine) -> bool:
    """Whether somebody, such as a node started meanwhile, uses the server as well."""
    with opened_engine.connect() as connection:
        others = connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        )
    return bool(others)
