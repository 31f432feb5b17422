"""A desk with a browser: Chromium, driven by Playwright, against the real dashboard process."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from config.settings import Settings
from dashboard import users
from tests.browser.web import HASH, PASSWORD

DESK = {"width": 1280, "height": 850}
PHONE = {"width": 390, "height": 844}
CONFIG = """
[dashboard]
port = 0
[[tenants]]
id = "north"
ae_titles = ["NORTH_AI"]
[[tenants]]
id = "south"
ae_titles = ["SOUTH_AI"]
"""
_VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", (e) => violations.push(e.violatedDirective));
"""


@dataclass
class Site:
    base: str
    engine: Engine  # as the node
    data_dir: Path
    studies: dict[str, uuid.UUID] = field(default_factory=dict)

    def account(self, name: str, role: str, tenant: str | None, password_hash: str = HASH) -> str:
        """Make an account; returns a one-time link."""
        with Session(self.engine) as session, session.begin():
            user = users.create_user(session, name, role, tenant)
            user.password_hash = password_hash
            return users.login_link(session, user.id, self.base)


@contextmanager
def serving(settings: Settings, folder: Path) -> Iterator[str]:
    """The dashboard as a process of its own; its address."""
    config = folder / "vigil.toml"
    config.write_text(CONFIG)
    environment = os.environ | {
        "VIGIL_CONFIG": str(config),
        "VIGIL_NODE__DATABASE_URL": settings.node.database_url.get_secret_value(),
        "VIGIL_NODE__DATA_DIR": str(settings.node.data_dir),
    }
    command = [sys.executable, "-m", "dashboard"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = json.loads(process.stdout.readline())
            yield f"http://127.0.0.1:{line['port']}"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()  # only where it is still there: a test that failed must not hang


@dataclass
class Desk:
    """A signed-in browser that notes everything that should not happen."""

    page: Page
    troubles: list[str]
    hosts: set[str]

    @property
    def violations(self) -> list[str]:
        """What the page now open did against its policy."""
        return list(self.page.evaluate("window.violations"))


def sit_down(
    chromium: Browser,
    site: Site,
    role: str = "manager",
    tenant: str | None = "north",
    **options: object,
) -> Desk:
    """With a new account."""
    site.account("ann", role, tenant)
    return sign_in(chromium, site, "ann", **options)


def sign_in(chromium: Browser, site: Site, name: str, **options: object) -> Desk:
    context: BrowserContext = chromium.new_context(**{"viewport": DESK, **options})  # type: ignore[arg-type]
    context.add_init_script(_VIOLATIONS)
    desk = Desk(context.new_page(), [], set())
    page = desk.page
    page.set_default_timeout(15_000)

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error" and "404" not in message.text:  # a picture that is not kept
            desk.troubles.append(message.text)

    page.on("console", on_console)
    page.on("pageerror", lambda error: desk.troubles.append(str(error)))
    page.on("request", lambda request: desk.hosts.add(request.url.split("/")[2]))
    page.goto(f"{site.base}/login")
    page.fill("input[name=name]", name)
    page.fill("input[name=password]", PASSWORD)
    page.press("input[name=password]", "Enter")
    page.wait_for_url(f"{site.base}/")
    return desk


def open_study(desk: Desk, site: Site, accession: str = "ACC-88121") -> Page:
    desk.page.goto(f"{site.base}/study/{site.studies[accession]}")
    return desk.page
