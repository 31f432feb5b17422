"""Writing down what was done outside the database: it must not be lost because that is away."""

import threading
from collections.abc import Callable

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.orm import Session

from db.process import Stop

log = structlog.get_logger()

RETRY_S = 2.0
#: For a single round, which nobody stops.
NEVER: Stop = threading.Event()


def is_away(error: Exception) -> bool:
    """Whether the database, and not what was asked of it, is at fault.

    It refuses connections, closes one that was in use, or is read-only for the length of a
    failover: each is another class of error.
    """
    ours = (DataError, IntegrityError, ProgrammingError)
    return isinstance(error, DBAPIError) and not isinstance(error, ours)


def record(engine: Engine, write: Callable[[Session], None], stop: Stop) -> None:
    """Run `write` in a transaction of its own, again and again while the database is away.

    `write` must be safe to run twice: a commit whose answer was lost is not known to have happened.

    Raises
    ------
    DBAPIError
        If the database is still away when it is time to stop.
    """
    while True:
        try:
            with Session(engine) as session, session.begin():
                write(session)
        except DBAPIError as error:
            if not is_away(error):
                raise
            log.warning("database_away", exc_type=type(error).__name__)
            if stop.wait(RETRY_S):
                raise
        else:
            return
