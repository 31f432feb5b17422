"""Who is looking, and the short transactions in which the database shows them what is theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

#: No page may keep the database busy longer; the statement is cancelled then.
STATEMENT_TIMEOUT_MS = 15_000


class Role(StrEnum):
    ADMIN = "admin"  # all tenants
    MANAGER = "manager"  # one tenant; may run and send again
    READER = "reader"  # one tenant; looks
    UPLOADER = "uploader"  # own uploads only


@dataclass(frozen=True, slots=True)
class Viewer:
    """The person, or part of the node, on whose behalf a transaction runs."""

    user_id: str
    name: str
    role: str  # a Role, or "login", or "" for nobody: then no row of a tenant is visible
    tenant: str  # empty for administrators

    @property
    def sees_all(self) -> bool:
        return self.role == Role.ADMIN

    @property
    def may_operate(self) -> bool:
        return self.role in (Role.ADMIN, Role.MANAGER)

    @property
    def scope(self) -> tuple[str, str, str]:
        """What decides which rows are visible: the key of anything kept per viewer."""
        user = self.user_id if self.role == Role.UPLOADER else ""
        return self.role, self.tenant, user


#: Before anybody is signed in: may look for an account by name, and sees no study.
DOORMAN = Viewer(user_id="", name="", role="login", tenant="")
#: For liveness: no row that belongs to anybody.
NOBODY = Viewer(user_id="", name="", role="", tenant="")
#: For the node's own counters, which hold numbers only.
COUNTER = Viewer(user_id="", name="metrics", role=Role.ADMIN, tenant="")


@contextmanager
def acting_as(engine: Engine, viewer: Viewer) -> Iterator[Session]:
    """One short transaction under row-level security as `viewer`; committed at the end.

    The three settings are local to the transaction, so a pooled connection never carries one
    person's sight over to the next.
    """
    with Session(engine, expire_on_commit=False) as session, session.begin():
        session.execute(
            select(
                func.set_config("vigil.role", viewer.role, True),
                func.set_config("vigil.tenant", viewer.tenant, True),
                func.set_config("vigil.user", viewer.user_id, True),
                func.set_config("statement_timeout", str(STATEMENT_TIMEOUT_MS), True),
            )
        )
        yield session
