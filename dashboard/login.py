"""The door: signing in by password or one-time link, signing out, a new password."""

import hmac
import secrets
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from dashboard import audit, passwords, sessions
from dashboard.auth import FromOurPage, Session, cookie_name, set_cookie
from dashboard.context import Context, Ctx
from dashboard.pages import page
from dashboard.tenancy import DOORMAN, Viewer, acting_as
from db.tables import UserRow

router = APIRouter(include_in_schema=False)

_BEFORE = "vigil_before"  # ties a login form to the browser that fetched it
_WRONG = "User name or password is wrong, or the account is disabled."
_LINK_DEAD = "This link was used already or has expired. Ask your administrator for a new one."


@router.get("/login")
def login_page(request: Request, context: Ctx, next: str = "/") -> Response:
    return _login_form(request, context, next)


@router.post("/login")
def login(
    request: Request,
    context: Ctx,
    name: Annotated[str, Form(max_length=64)] = "",
    password: Annotated[str, Form(max_length=1024)] = "",
    before: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "/",
) -> Response:
    name, address = name.strip().lower(), _address(request)
    if not _is_same_browser(request, before):
        return _login_form(
            request, context, next, "The page was open too long. Please try again.", 403
        )
    if wait := context.throttle.wait_s(name, address):
        if context.once.is_new("login_throttled", name, address):
            _audit_refusal(context, name, "login_throttled")
        words = f"Too many failed log-ins. Try again in {int(wait // 60) + 1} min."
        return _login_form(request, context, next, words, 429)
    user = _checked(context, name, password)
    if user is None:
        context.throttle.failed(name, address)
        _audit_refusal(context, name, "login")
        return _login_form(request, context, next, _WRONG, 401)
    context.throttle.succeeded(name, address)
    return _enter(request, context, user, "login", next)


def _checked(context: Context, name: str, password: str) -> UserRow | None:
    with acting_as(context.engine, DOORMAN) as session:
        user = sessions.user_named(session, name)
    # Outside the transaction: Argon2 takes its time, and a connection is not kept for it.
    is_right = passwords.is_right(password, user.password_hash if user else "")
    return user if is_right else None


@router.get("/login/link/{token}")
def link_page(request: Request, context: Ctx, token: str) -> Response:
    # Looking does not use the link up: mail gateways and chat previews look, too.
    return _link_form(request, context, token)


@router.post("/login/link/{token}")
def use_link(
    request: Request,
    context: Ctx,
    token: str,
    password: Annotated[str, Form(max_length=1024)] = "",
    again: Annotated[str, Form(max_length=1024)] = "",
    before: Annotated[str, Form()] = "",
) -> Response:
    if not _is_same_browser(request, before):
        return _link_form(request, context, token, "The page was open too long. Please try again.")
    with acting_as(context.engine, DOORMAN) as session:
        user = sessions.user_of_link(session, token)
    if user is None:
        return _link_form(request, context, token)
    is_new = not user.password_hash
    if is_new and (words := _objection(user.name, password, again)):
        return _link_form(request, context, token, words)
    stored = passwords.hashed(password) if is_new else ""
    with acting_as(context.engine, DOORMAN) as session:
        is_first = sessions.use_link(session, token)
        if is_first and is_new:
            sessions.set_password(session, user.id, stored)
            audit.record(session, sessions.viewer_of(user), "password_set")
    if not is_first:
        return _link_form(request, context, token)
    return _enter(request, context, user, "login_by_link", "/")


@router.post("/logout")
def logout(request: Request, context: Ctx, found: FromOurPage) -> Response:
    with acting_as(context.engine, found.viewer) as session:
        sessions.close(session, request.cookies.get(cookie_name(context), ""))
        audit.record(session, found.viewer, "logout")
    response = RedirectResponse("/login", 303)
    response.delete_cookie(cookie_name(context), path="/", httponly=True, samesite="strict")
    return response


@router.get("/account")
def account_page(request: Request, context: Ctx, found: Session) -> Response:
    return page(request, context, "account.html", words="")


@router.post("/account")
def change_password(
    request: Request,
    context: Ctx,
    found: FromOurPage,
    current: Annotated[str, Form(max_length=1024)] = "",
    password: Annotated[str, Form(max_length=1024)] = "",
    again: Annotated[str, Form(max_length=1024)] = "",
) -> Response:
    viewer, address = found.viewer, _address(request)
    # The throttle counts here as well: an open browser is no oracle for the password.
    if context.throttle.wait_s(viewer.name, address):
        return page(
            request, context, "account.html", 429, words="Too many failures. Try again later."
        )
    user = _checked(context, viewer.name, current)
    if user is None:
        context.throttle.failed(viewer.name, address)
        _audit_refusal(context, viewer.name, "password_change")
        return page(request, context, "account.html", 403, words="The current password is wrong.")
    if words := _objection(user.name, password, again):
        return page(request, context, "account.html", 400, words=words)
    stored = passwords.hashed(password)
    with acting_as(context.engine, viewer) as session:
        sessions.set_password(session, user.id, stored)
        audit.record(session, viewer, "password_changed")
    return _enter(request, context, user, "login", "/account?changed=1")


def _enter(request: Request, context: Context, user: UserRow, action: str, to: str) -> Response:
    """Start a session under a new token, whatever cookie came along."""
    with acting_as(context.engine, DOORMAN) as session:
        sessions.close(session, request.cookies.get(cookie_name(context), ""))
        token = sessions.open_session(session, user.id, context.settings.dashboard.session_hours)
        audit.record(session, sessions.viewer_of(user), action)
    response = RedirectResponse(_local(to), 303)
    set_cookie(context, response, cookie_name(context), token)
    response.delete_cookie(_BEFORE, path="/login", httponly=True, samesite="strict")
    return response


def _login_form(
    request: Request, context: Context, to: str, words: str = "", status: int = 200
) -> Response:
    return _form(request, context, "login.html", status, words=words, next=_local(to))


def _link_form(request: Request, context: Context, token: str, words: str = "") -> Response:
    with acting_as(context.engine, DOORMAN) as session:
        user = sessions.user_of_link(session, token)
    if user is None:
        return _form(request, context, "link.html", 404, user=None, words=_LINK_DEAD)
    status = 400 if words else 200
    return _form(request, context, "link.html", status, user=user, words=words, token=token)


def _form(request: Request, context: Context, name: str, status: int, **values: object) -> Response:
    before = request.cookies.get(_BEFORE) or secrets.token_urlsafe(16)
    response = page(request, context, name, status, before=before, **values)
    response.set_cookie(
        _BEFORE, before, path="/login", httponly=True, samesite="strict",
        secure=context.settings.dashboard.secure_cookies,
    )  # fmt: skip
    return response


def _is_same_browser(request: Request, before: str) -> bool:
    cookie = request.cookies.get(_BEFORE, "")
    return bool(cookie) and hmac.compare_digest(cookie.encode(), before.encode())


def _audit_refusal(context: Context, name: str, action: str) -> None:
    """Record a refusal; a name that is no account may be a mistyped password and is left out."""
    with acting_as(context.engine, DOORMAN) as session:
        user = sessions.user_named(session, name)
        viewer = sessions.viewer_of(user) if user else Viewer("", "", "login", "")
        audit.record(session, viewer, action, outcome="refused")


def _objection(name: str, password: str, again: str) -> str:
    if password != again:
        return "The two passwords differ."
    return passwords.objection(password, name)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _local(path: str) -> str:
    """A path of ours; anything that leads elsewhere becomes the overview."""
    is_ours = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if is_ours else "/"
