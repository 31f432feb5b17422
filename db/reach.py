"""Whether a destination can be reached: why not, and how long it is left alone."""

import datetime as dt
import random
from enum import StrEnum

from sqlalchemy import ColumnElement, exists, func, select, update
from sqlalchemy.orm import Session

from db.job import backoff_s
from db.tables import DeliveryRow, DestinationRow

MAX_BACKOFF_S = 900.0
PAUSE_S = 2.0


class Unreachable(StrEnum):
    """Why nothing could be sent: the destination's state, never one object's doing."""

    NO_CONNECTION = "no_connection"  # no such host, nobody listens, or no answer to the SYN
    ASSOCIATION_REJECTED = "association_rejected"
    TLS_FILES_UNUSABLE = "tls_files_unusable"  # ours: tls_cert, tls_key or tls_ca cannot be read
    TLS_NOT_SPOKEN = "tls_not_spoken"  # no answer in TLS: a plain-text port behind tls = true
    TLS_TIMEOUT = "tls_timeout"  # connected, and then the handshake did not end
    TLS_REFUSED = "tls_refused"  # the peer wants a certificate, another one, or another version
    CERTIFICATE_NOT_TRUSTED = "certificate_not_trusted"  # not signed by tls_ca
    CERTIFICATE_EXPIRED = "certificate_expired"
    CERTIFICATE_WRONG_NAME = "certificate_wrong_name"  # it does not name the configured host


_UNREACHABLE = frozenset(map(str, Unreachable))


def is_unreachable(error_code: str) -> bool:
    """Whether an error means that the destination as a whole is away."""
    return error_code in _UNREACHABLE


def backoff(failures: int) -> dt.timedelta:
    return dt.timedelta(seconds=backoff_s(failures, random.random(), MAX_BACKOFF_S))


def back_off(session: Session, tenant: str, destination: str, error_code: str) -> None:
    """Nothing goes there for a while, longer each time."""
    failures = session.scalar(
        update(DestinationRow)
        .where(*_is(tenant, destination))
        .values(failures=DestinationRow.failures + 1, last_error=error_code)
        .returning(DestinationRow.failures)
    )
    session.execute(
        update(DestinationRow)
        .where(*_is(tenant, destination))
        .values(retry_at=func.now() + backoff(failures or 1))
    )


def pause(session: Session, tenant: str, destination: str) -> None:
    """A breath before the next delivery, where one was upset."""
    soon = func.now() + dt.timedelta(seconds=PAUSE_S)
    session.execute(
        update(DestinationRow)
        .where(*_is(tenant, destination))
        .values(retry_at=func.greatest(DestinationRow.retry_at, soon))
    )


def answered(session: Session, tenant: str, destination: str) -> None:
    """It is there: whatever waits for it may go now."""
    session.execute(
        update(DestinationRow)
        .where(*_is(tenant, destination))
        .values(failures=0, retry_at=func.now(), last_success_at=func.now(), last_error="")
    )


def is_missed(session: Session, tenant: str, destination: str) -> bool:
    """Whether it was away as a whole, is left alone for now, and something waits for it."""
    waits = exists().where(
        DeliveryRow.tenant == tenant,
        DeliveryRow.destination == destination,
        DeliveryRow.state == "WAITING",
    )
    query = select(DestinationRow.name).where(
        *_is(tenant, destination),
        DestinationRow.last_error.in_(_UNREACHABLE),
        DestinationRow.retry_at > func.now(),
        waits,
    )
    return session.scalar(query) is not None


def is_back(session: Session, tenant: str, destination: str) -> None:
    """It answers again, though nothing was sent yet: its wait is over."""
    session.execute(
        update(DestinationRow)
        .where(*_is(tenant, destination))
        .values(failures=0, retry_at=func.now(), last_error="")
    )


def _is(tenant: str, destination: str) -> tuple[ColumnElement[bool], ...]:
    return DestinationRow.tenant == tenant, DestinationRow.name == destination
