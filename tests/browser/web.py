"""A dashboard over a test's database, in this process, and people who use it."""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from config.settings import Settings
from dashboard import passwords, users
from dashboard.app import create_app
from db.sandbox import Sandbox
from db.tables import AuditRow, UserRow
from tests.browser.seed import Case, add, settings_for

PASSWORD = "correct horse battery"
HASH = passwords.hashed(PASSWORD)
BASE = "http://localhost"
_TOKEN = re.compile(r'name="(csrf|before)" value="([^"]+)"')


@dataclass
class Person:
    """Somebody with a browser: keeps cookies, fills in the hidden fields of forms."""

    client: TestClient

    def get(self, path: str, **options: Any) -> Response:
        return self.client.get(path, **options)

    def post(self, path: str, page: str = "/account", **fields: str) -> Response:
        """Post as the form on `page` would."""
        hidden = dict(_TOKEN.findall(self.client.get(page).text))
        return self.client.post(path, data=hidden | fields)

    def log_in(self, name: str, password: str = PASSWORD) -> Response:
        return self.post("/login", page="/login", name=name, password=password)


@dataclass
class Web:
    app: FastAPI
    settings: Settings
    engine: Engine  # as the node

    @property
    def data_dir(self) -> Path:
        return self.settings.node.data_dir

    def visitor(self, **options: Any) -> Person:
        options.setdefault("base_url", BASE)
        return Person(TestClient(self.app, follow_redirects=False, **options))

    def person(self, role: str, tenant: str | None = None, name: str = "") -> Person:
        """A new account, signed in."""
        made = self.account(role, tenant, name)
        person = self.visitor()
        assert person.log_in(made).status_code == 303
        return person

    def account(self, role: str, tenant: str | None = None, name: str = "") -> str:
        name = name or f"{role}-{tenant or 'all'}"
        with Session(self.engine) as session, session.begin():
            users.create_user(session, name, role, tenant).password_hash = HASH
        return name

    def link(self, name: str) -> str:
        with Session(self.engine) as session, session.begin():
            user = session.scalars(select(UserRow).where(UserRow.name == name)).one()
            return users.login_link(session, user.id, "").removeprefix(BASE)

    def audit(self, action: str) -> list[AuditRow]:
        with Session(self.engine) as session:
            query = select(AuditRow).where(AuditRow.action == action).order_by(AuditRow.id)
            return list(session.scalars(query))


def positive(web: Web, **changes: object) -> uuid.UUID:
    """A study with a small stack and, unless `changes` say otherwise, something suspected."""
    case = Case(**{"probability": 0.93, "slices": 6, "matrix": 32, **changes})  # type: ignore[arg-type]
    return add(web.engine, web.data_dir, case)


@contextmanager
def running(
    settings: Settings, engine: Engine, web_engine: Engine, **dashboard: Any
) -> Iterator[Web]:
    ours = settings_for(settings, **dashboard)
    (ours.node.data_dir / "spool").mkdir(parents=True, exist_ok=True)
    with Sandbox(1) as sandbox:
        yield Web(create_app(ours, web_engine, sandbox), ours, engine)
