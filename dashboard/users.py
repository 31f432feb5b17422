"""Accounts, as the `vigil users` command and the demo manage them; called with the node's role."""

import datetime as dt
import re
import secrets
import uuid
from collections.abc import Sequence

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from dashboard import sessions
from dashboard.tenancy import Role
from db.errors import PermanentError
from db.tables import AuditRow, LoginLinkRow, UserRow

LINK_HOURS = 24.0
_NAME = re.compile(r"[a-z0-9][a-z0-9._@+-]{0,63}")


class BadAccount(PermanentError):
    """The account cannot be made or found; the message says why."""

    code = "bad_account"


def create_user(session: Session, name: str, role: str, tenant: str | None) -> UserRow:
    """Add an account without a password; `login_link` lets its owner set one.

    Raises
    ------
    BadAccount
        For a bad or taken name, an unknown role, an administrator with a tenant or anybody else
        without one.
    """
    name = name.strip().lower()
    if not _NAME.fullmatch(name):
        raise BadAccount(
            "a user name has 1 to 64 of: a-z 0-9 . _ @ + -, and starts with a letter or digit"
        )
    if role not in set(Role):
        raise BadAccount(f"no such role; choose one of {', '.join(Role)}")
    if (role == Role.ADMIN) != (not tenant):
        raise BadAccount("an admin has no tenant, and everybody else has exactly one")
    if session.scalar(select(UserRow.id).where(UserRow.name == name)):
        raise BadAccount(f"the user name {name} is taken")
    user = UserRow(name=name, role=role, tenant=tenant or None)
    session.add(user)
    session.flush()
    _audit(session, user, "user_created", role=role)
    return user


def list_users(session: Session) -> Sequence[UserRow]:
    return session.scalars(select(UserRow).order_by(UserRow.name)).all()


def find_user(session: Session, name: str) -> UserRow:
    """The account of that name. Raises BadAccount when there is none."""
    user = session.scalar(select(UserRow).where(UserRow.name == name.strip().lower()))
    if user is None:
        raise BadAccount("there is no such user")
    return user


def disable_user(session: Session, name: str) -> None:
    """Shut an account: its sessions end, its links die, nothing of its history goes."""
    user = find_user(session, name)
    user.is_disabled = True
    _revoke(session, user)
    _audit(session, user, "user_disabled")


def enable_user(session: Session, name: str) -> None:
    user = find_user(session, name)
    user.is_disabled = False
    _audit(session, user, "user_enabled")


def reset_user(session: Session, name: str, base_url: str) -> str:
    """Forget the password and end all sessions; returns a one-time link to set a new one."""
    user = find_user(session, name)
    user.password_hash = ""
    _revoke(session, user)
    _audit(session, user, "user_reset")
    return login_link(session, user.id, base_url)


def login_link(
    session: Session, user_id: uuid.UUID, base_url: str, *, hours: float = LINK_HOURS
) -> str:
    """A link that signs this user in once, and asks for a password where there is none."""
    token = secrets.token_urlsafe(32)
    session.add(
        LoginLinkRow(
            token_sha256=sessions.digest(token),
            user_id=user_id,
            expires_at=func.now() + dt.timedelta(hours=hours),
        )
    )
    session.flush()
    return f"{base_url.rstrip('/')}/login/link/{token}"


def first_link(session: Session, base_url: str) -> str | None:
    """At the first start: an administrator `admin` and the link to set it up; None later on.

    As long as nobody has set a password, each start prints a new link.
    """
    if session.scalar(select(UserRow.id).where(UserRow.password_hash != "").limit(1)):
        return None
    admin = session.scalar(
        select(UserRow).where(UserRow.role == Role.ADMIN).order_by(UserRow.created_at)
    )
    if admin is None:
        if session.scalar(select(UserRow.id).limit(1)):
            return None  # somebody manages accounts already
        admin = create_user(session, "admin", Role.ADMIN, None)
    return login_link(session, admin.id, base_url)


def _revoke(session: Session, user: UserRow) -> None:
    sessions.close_all(session, user.id)
    session.execute(
        update(LoginLinkRow)
        .where(LoginLinkRow.user_id == user.id, LoginLinkRow.used_at.is_(None))
        .values(used_at=func.now())
    )


def _audit(session: Session, user: UserRow, action: str, **detail: str) -> None:
    session.execute(
        insert(AuditRow)
        .inline()
        .values(
            tenant=user.tenant or "",
            actor="node",
            action=action,
            target=f"user {user.name}",
            detail=detail,
        )
    )
