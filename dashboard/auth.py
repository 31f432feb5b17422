"""Who is signed in, and what that allows: the dependencies of every page."""

import hmac
from typing import Annotated

from fastapi import Depends, Form, Header, Request, Response

from dashboard import sessions
from dashboard.context import Context, Ctx, LoginNeeded, Refused
from dashboard.sessions import SignedIn
from dashboard.tenancy import DOORMAN, Viewer, acting_as


def cookie_name(context: Context) -> str:
    """With the __Host- prefix browsers take the cookie over TLS only, for this host only."""
    secure = context.settings.dashboard.secure_cookies
    return "__Host-vigil_session" if secure else "vigil_session"


def set_cookie(context: Context, response: Response, name: str, value: str) -> None:
    response.set_cookie(
        name,
        value,
        path="/",
        httponly=True,
        samesite="strict",
        secure=context.settings.dashboard.secure_cookies,
        max_age=int(context.settings.dashboard.session_hours * 3600),
    )


def look_up(context: Context, token: str) -> SignedIn | None:
    with acting_as(context.engine, DOORMAN) as session:
        return sessions.find(session, token)


def signed_in(request: Request, context: Ctx) -> SignedIn:
    """The session of this request. Raises LoginNeeded when there is none."""
    token = request.cookies.get(cookie_name(context), "")
    found = look_up(context, token) if token else None
    if found is None:
        raise LoginNeeded
    request.state.signed_in = found
    return found


Session = Annotated[SignedIn, Depends(signed_in)]


def current_viewer(found: Session) -> Viewer:
    return found.viewer


def operator(found: Session) -> Viewer:
    """A viewer who runs things: admin or manager."""
    if not found.viewer.may_operate:
        raise Refused(found.viewer, "operator_page")
    return found.viewer


def from_our_page(
    found: Session,
    csrf: Annotated[str, Form()] = "",
    x_csrf_token: Annotated[str, Header()] = "",
) -> SignedIn:
    """A change asked for by one of our own pages: the session's token came with it."""
    given = csrf or x_csrf_token
    if not hmac.compare_digest(given.encode(), found.csrf.encode()):
        raise Refused(found.viewer, "csrf")
    return found


CurrentViewer = Annotated[Viewer, Depends(current_viewer)]
Operator = Annotated[Viewer, Depends(operator)]
FromOurPage = Annotated[SignedIn, Depends(from_our_page)]
