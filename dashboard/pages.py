"""Rendering a template with what every page has: who looks, the token of its forms, our words."""

from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dashboard import happenings, words
from dashboard.context import Context

HERE = Path(__file__).parent
VERSION = "0.1.0"


def templates() -> Jinja2Templates:
    """Every value is escaped, whatever the file's ending; an unknown name is an error."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= words.FILTERS
    environment.filters |= {"event": happenings.event, "particulars": happenings.particulars}
    return Jinja2Templates(env=environment)


def page(
    request: Request, context: Context, name: str, status: int = 200, /, **values: Any
) -> Response:
    found = getattr(request.state, "signed_in", None)
    shared = {
        "viewer": found.viewer if found else None,
        "csrf": found.csrf if found else "",
        "path": request.url.path,
        "version": VERSION,
    }
    return context.templates.TemplateResponse(request, name, shared | values, status_code=status)
