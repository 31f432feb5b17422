"""The application: routes, the guard before them, and one answer for everything that goes wrong."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from threading import Event

import anyio.to_thread
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from config.settings import Settings
from dashboard import api, audit, live, login, metrics, pictures, probes, views
from dashboard.context import Context, LoginNeeded, NotThere, Refused, Stopping
from dashboard.guard import Guard, allowed_hosts
from dashboard.images import ImageCache, NoPicture
from dashboard.pages import HERE, VERSION, page, templates
from dashboard.tenancy import Viewer, acting_as
from db.sandbox import Sandbox

log = structlog.get_logger()

#: Threads for pages; each holds at most one connection of the pool at a time.
THREADS = 16
_NOTHING = "There is nothing here, or it is not yours to see."
_MAY_NOT = "Your account may not do this."
_AWAY = "The database does not answer. Studies are still received; the pages come back with it."


def create_app(
    settings: Settings, engine: Engine, sandbox: Sandbox, stopping: Stopping | None = None
) -> FastAPI:
    """The dashboard over an engine with the role vigil_web; `stopping` ends its streams."""
    app = FastAPI(
        title="Vigil", version=VERSION, docs_url=None, redoc_url=None, lifespan=_lifespan,
        description="Research use only.",
    )  # fmt: skip
    context = Context(
        settings, engine, sandbox, templates(), ImageCache(), stopping=stopping or Event()
    )
    app.state.context = context
    app.state.registry = metrics.registry(context)
    for part in (probes, metrics, api, login, live, pictures, views):
        app.include_router(part.router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    _add_handlers(app)
    app.add_middleware(metrics.Timed, registry=app.state.registry)
    app.add_middleware(
        Guard,
        hosts=allowed_hosts(settings.dashboard),
        is_secure=settings.dashboard.secure_cookies,
    )
    return app


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(LoginNeeded)
    def _login_needed(request: Request, _: LoginNeeded) -> Response:
        if "hx-request" in request.headers:
            return Response(status_code=401, headers={"HX-Redirect": "/login"})
        if not _wants_page(request):
            return JSONResponse({"detail": "Sign in first."}, 401)
        return RedirectResponse(f"/login?next={request.url.path}", 303)

    @app.exception_handler(NotThere)
    def _not_there(request: Request, error: NotThere) -> Response:
        _refused(request, error.viewer, "not_found", error.target)
        return _problem(request, 404, _NOTHING)

    @app.exception_handler(Refused)
    def _may_not(request: Request, error: Refused) -> Response:
        _refused(request, error.viewer, error.action, request.url.path)
        return _problem(request, 403, _MAY_NOT)

    @app.exception_handler(NoPicture)
    def _no_picture(_: Request, error: NoPicture) -> Response:
        return PlainTextResponse(str(error), 404)

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: RequestValidationError) -> Response:
        # An address that cannot be one is an address where nothing is.
        if any(problem["loc"][0] == "path" for problem in error.errors()):
            return _problem(request, 404, _NOTHING)
        return _problem(request, 400, "The address or form holds a value that is not understood.")

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Response:
        words = _NOTHING if error.status_code == 404 else str(error.detail)
        return _problem(request, error.status_code, words)

    @app.exception_handler(SQLAlchemyError)
    def _database(request: Request, error: SQLAlchemyError) -> Response:
        log.error("database_failed", exc_type=type(error).__name__)
        is_away = isinstance(error, (PoolTimeout, DBAPIError))
        return _problem(request, 503 if is_away else 500, _AWAY if is_away else "Something broke.")

    @app.exception_handler(Exception)
    def _broken(request: Request, error: Exception) -> Response:
        log.error("request_failed", exc_type=type(error).__name__)
        return _problem(request, 500, "Something broke. It is in the log.")


def _refused(request: Request, viewer: Viewer, action: str, target: str) -> None:
    """A refusal is recorded in a transaction of its own: the one that found it is gone."""
    context: Context = request.app.state.context
    with acting_as(context.engine, viewer) as session:
        audit.record(session, viewer, action, target=target[:200], outcome="refused")


def _problem(request: Request, status: int, words: str) -> Response:
    if not _wants_page(request):
        return JSONResponse({"detail": words}, status)
    return page(request, request.app.state.context, "problem.html", status, words=words)


def _wants_page(request: Request) -> bool:
    return not request.url.path.startswith(("/api/", "/live", "/healthz", "/readyz", "/metrics"))
