"""What the pages share: made once in `create_app`, reached through the request."""

from dataclasses import dataclass, field
from threading import Event
from typing import Annotated, Protocol

from fastapi import Depends, Request
from fastapi.templating import Jinja2Templates
from sqlalchemy import Engine

from config.settings import Settings
from dashboard.audit import Once
from dashboard.images import ImageCache
from dashboard.tenancy import Viewer
from dashboard.throttle import Throttle
from db.sandbox import Sandbox


class Stopping(Protocol):
    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Context:
    settings: Settings
    engine: Engine  # role vigil_web
    sandbox: Sandbox
    templates: Jinja2Templates
    images: ImageCache
    throttle: Throttle = field(default_factory=Throttle)
    once: Once = field(default_factory=Once)
    stopping: Stopping = field(default_factory=Event)


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(context_of)]


class LoginNeeded(Exception):
    """Nobody is signed in: pages lead to the login, the API answers 401."""


class Refused(Exception):
    """Somebody is signed in and may not do this; `action` is what is audited."""

    def __init__(self, viewer: Viewer, action: str) -> None:
        super().__init__(action)
        self.viewer, self.action = viewer, action


class NotThere(Exception):
    """Not there, or not yours: the same answer to both."""

    def __init__(self, viewer: Viewer, target: str) -> None:
        super().__init__(target)
        self.viewer, self.target = viewer, target
