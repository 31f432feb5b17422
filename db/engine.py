"""How the node reaches PostgreSQL: one URL, three roles."""

from pathlib import Path
from typing import Literal

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from config.settings import Settings
from db import embedded
from db.errors import DatabaseAway, PermanentError

Role = Literal["owner", "node", "web"]

#: Held while migrations run, so that two starting processes do not both upgrade.
_UPGRADE_LOCK = 0x76696769  # "vigi"
CONNECT_TIMEOUT_S = 10
#: What reaches PostgreSQL, and ends a connection in half a minute whose other end has vanished (a
#: switch that lost its power sends no FIN). Without them a query waits for it a quarter of an hour.
CONNECT_ARGS = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives": 1,
    "keepalives_idle": 15,  # seconds
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}


#: Lies in a data folder for as long as a backup is read back into it.
UNFINISHED = "restore.unfinished"


class RestoreUnfinished(PermanentError):
    """Reading a backup back was cut off: what lies there is half of a node."""

    code = "restore_unfinished"


def database_url(settings: Settings) -> URL:
    """The configured database, or the embedded one, which is started if it is down."""
    configured = settings.node.database_url.get_secret_value()
    if configured:
        return make_url(configured).set(drivername="postgresql+psycopg2")
    server = embedded.start(settings.node.data_dir)
    return server.set(database=embedded.DATABASE)


def engine_for(settings: Settings, role: Role, *, pool_size: int = 5) -> Engine:
    """An engine whose sessions act as `role`.

    The role is set when a session starts, so that RESET ROLE leads back to it. Owner is whoever
    the URL names: it migrates, and backs up.

    Raises
    ------
    RestoreUnfinished
    """
    _check_whole(settings)
    return engine_at(database_url(settings), role, pool_size=pool_size)


def engine_at(url: URL, role: Role, *, pool_size: int = 5) -> Engine:
    options = "" if role == "owner" else f"-c role=vigil_{role}"
    return create_engine(
        url,
        hide_parameters=True,  # they hold names, and tracebacks print them
        pool_pre_ping=True,  # the server may have been restarted meanwhile
        pool_size=pool_size,
        max_overflow=pool_size,
        connect_args={"options": options, **CONNECT_ARGS},
    )


def upgrade(settings: Settings) -> None:
    """Bring the schema to this version; safe from several processes at once.

    Raises
    ------
    DatabaseAway
        If the server does not answer.
    RestoreUnfinished
    """
    _check_whole(settings)
    url = database_url(settings)
    if not settings.node.database_url.get_secret_value():
        create_database(url)
    upgrade_at(url)


def upgrade_at(url: URL, revision: str = "head") -> None:
    engine = create_engine(url, connect_args=CONNECT_ARGS)
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
            command.upgrade(alembic_config(connection), revision)
    except OperationalError as error:
        raise DatabaseAway("the database does not answer") from error
    finally:
        engine.dispose()


def knows(revision: str) -> bool:
    """Whether this version has the migration that leads to `revision`."""
    scripts = ScriptDirectory.from_config(_scripts())
    return revision in {script.revision for script in scripts.walk_revisions()}


def alembic_config(connection: Connection) -> Config:
    config = _scripts()
    config.attributes["connection"] = connection
    return config


def _scripts() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _check_whole(settings: Settings) -> None:
    folder = settings.node.data_dir
    if (folder / UNFINISHED).exists():
        raise RestoreUnfinished(
            f"a restore into {folder} did not end: empty the folder and restore again"
        )


def create_database(url: URL) -> None:
    server = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    try:
        with server.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _UPGRADE_LOCK})
            known = connection.scalar(
                text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": url.database}
            )
            if not known:
                connection.execute(text(f'CREATE DATABASE "{url.database}"'))
    except OperationalError as error:
        raise DatabaseAway("the database does not answer") from error
    finally:
        server.dispose()
