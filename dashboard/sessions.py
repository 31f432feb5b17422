"""Signed-in browsers and one-time links: of their tokens the database holds only the SHA-256."""

import datetime as dt
import hashlib
import secrets
import uuid
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from dashboard.tenancy import Viewer
from db.tables import LoginLinkRow, SessionRow, UserRow

_SEEN_EVERY = dt.timedelta(minutes=1)  # a row is not written at every request


@dataclass(frozen=True, slots=True)
class SignedIn:
    """One browser's session, read anew at every request: a change of role counts at once."""

    viewer: Viewer
    csrf: str
    token_sha256: str


def digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def viewer_of(user: UserRow) -> Viewer:
    return Viewer(user_id=str(user.id), name=user.name, role=user.role, tenant=user.tenant or "")


def open_session(session: Session, user_id: uuid.UUID, hours: float) -> str:
    """Make a session for `user_id`; returns the cookie's token, which is kept nowhere else."""
    token = secrets.token_urlsafe(32)
    session.add(
        SessionRow(
            token_sha256=digest(token),
            user_id=user_id,
            csrf=secrets.token_urlsafe(32),
            expires_at=func.now() + dt.timedelta(hours=hours),
        )
    )
    session.execute(delete(SessionRow).where(SessionRow.expires_at < func.now()))
    return token


def find(session: Session, token: str) -> SignedIn | None:
    """The live session of a cookie; None when it ended, or its user is disabled."""
    found = session.execute(
        select(SessionRow, UserRow)
        .join(UserRow, UserRow.id == SessionRow.user_id)
        .where(
            SessionRow.token_sha256 == digest(token),
            SessionRow.expires_at > func.now(),
            UserRow.is_disabled.is_(False),
        )
    ).one_or_none()
    if found is None:
        return None
    row, user = found
    if dt.datetime.now(dt.UTC) - row.seen_at > _SEEN_EVERY:
        row.seen_at = func.now()
    return SignedIn(viewer_of(user), row.csrf, row.token_sha256)


def close(session: Session, token: str) -> None:
    session.execute(delete(SessionRow).where(SessionRow.token_sha256 == digest(token)))


def close_all(session: Session, user_id: uuid.UUID) -> None:
    """End every session of a user: a new password, or a revocation."""
    session.execute(delete(SessionRow).where(SessionRow.user_id == user_id))


def user_named(session: Session, name: str) -> UserRow | None:
    if not name.isprintable():  # PostgreSQL's text holds no NUL
        return None
    return session.scalar(
        select(UserRow).where(UserRow.name == name, UserRow.is_disabled.is_(False))
    )


def user_of_link(session: Session, token: str) -> UserRow | None:
    """Whom a link would sign in; it is not used up by looking."""
    return session.scalar(
        select(UserRow)
        .join(LoginLinkRow, LoginLinkRow.user_id == UserRow.id)
        .where(*_usable(token), UserRow.is_disabled.is_(False))
    )


def use_link(session: Session, token: str) -> bool:
    """Use a link up; False when somebody was faster or it is too late."""
    used = session.scalar(
        update(LoginLinkRow)
        .where(*_usable(token))
        .values(used_at=func.now())
        .returning(LoginLinkRow.user_id)
    )
    return used is not None


def _usable(token: str) -> tuple[ColumnElement[bool], ...]:
    return (
        LoginLinkRow.token_sha256 == digest(token),
        LoginLinkRow.used_at.is_(None),
        LoginLinkRow.expires_at > func.now(),
    )


def set_password(session: Session, user_id: uuid.UUID, password_hash: str) -> None:
    """Store a new password; every session opened with the old one ends."""
    session.execute(
        update(UserRow).where(UserRow.id == user_id).values(password_hash=password_hash)
    )
    close_all(session, user_id)
