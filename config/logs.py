"""Logs: JSON lines on stdout, one event per fact, and only fields from an allow-list."""

import atexit
import contextlib
import logging
import os
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, WrappedLogger

# What may be logged. Everything else is dropped and its name counted, so that patient data
# cannot slip out by a new field. UIDs are pseudonyms the PACS administrator needs.
LOGGABLE = frozenset(
    {
        "event",
        "level",
        "timestamp",
        "stage",
        "pid",
        "worker",
        "exc_code",
        "exc_type",
        "reason_code",
        "outcome",
        "status",
        "address",
        "port",
        "tenant",
        "origin",
        "sender",
        "called_ae",
        "calling_ae",
        "association",
        "destination",
        "bundle",
        "lane",
        "state",
        "move",
        "study_uid",
        "series_uid",
        "sop_uid",
        "sop_class_uid",
        "transfer_syntax_uid",
        "instance_id",
        "analysis_id",
        "job_id",
        "delivery_id",
        "result_id",
        "result_no",
        "attempts",
        "n",
        "n_instances",
        "n_images",
        "n_objects",
        "n_waiting",
        "size_bytes",
        "duration_s",
        "wait_s",
        "limit",
        "value",
        "free_mb",
        "path_kind",
        "version",
        "device",
        "numerics",
        "signal",
        "restarts",
        "dropped_fields",
    }
)


class Output:
    """Standard output; what it does not take is lost, and nothing else.

    A log on a full disk must not stop the work that it tells of.
    """

    @staticmethod
    def write(text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stdout.write(text)

    @staticmethod
    def flush() -> None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()


def _let_go() -> None:
    """What is left in the buffer at the end is lost, too; Python would make it a failure."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_allowed(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    """Drop every field that is not on the list, and say which."""
    kept = {name: value for name, value in fields.items() if name in LOGGABLE}
    if dropped := sorted(fields.keys() - LOGGABLE):
        kept["dropped_fields"] = dropped
    return kept


def set_up(stage: str, level: str = "INFO") -> None:
    """Configure this process's logs; called once, in each `__main__`."""
    atexit.register(_let_go)
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s", force=True)
    for name in ("pynetdicom", "pydicom", "sqlalchemy", "uvicorn", "alembic", "apscheduler", "PIL"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their messages can hold identifiers
    structlog.contextvars.bind_contextvars(stage=stage)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            keep_allowed,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, Output)),
        cache_logger_on_first_use=False,
    )
