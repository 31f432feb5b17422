"""What balancers and scripts ask: is the process up, is the node ready, what can it do."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dashboard import health
from dashboard.context import Ctx
from dashboard.pages import page

router = APIRouter(tags=["probes"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process is up."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(context: Ctx) -> JSONResponse:
    """200 when database, spool and model are ready, else 503; each with a word on it."""
    checks = health.readiness(context.engine, context.settings)
    is_ready = all(check.is_ok for check in checks)
    body = {check.name: {"ok": check.is_ok, "words": check.words} for check in checks}
    return JSONResponse({"ready": is_ready, "checks": body}, 200 if is_ready else 503)


@router.get("/docs", include_in_schema=False)
def docs(request: Request, context: Ctx) -> Response:
    """The API described by its own OpenAPI document, without anybody else's script."""
    routes = [
        {"method": method.upper(), "path": path, **operation}
        for path, operations in request.app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]
    return page(request, context, "docs.html", routes=routes)
