"""The pages. Each reads in one short transaction as its viewer, and records that it was read."""

import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from pydantic import ValidationError
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from dashboard import audit, health, images, overview, report, stack, study_page, worklist
from dashboard.auth import CurrentViewer, FromOurPage, Operator
from dashboard.context import Context, Ctx, NotThere, Refused
from dashboard.looking import Bundle, viewed, visible_study
from dashboard.pages import page
from dashboard.tenancy import Viewer, acting_as
from db import paint
from db.study import AnalysisEvent, StudyState
from db.tables import RequestRow

router = APIRouter(include_in_schema=False)

_ACTIONS = {"rerun": AnalysisEvent.RERUN, "resend": AnalysisEvent.RESEND}


@router.get("/")
def overview_page(request: Request, context: Ctx, viewer: CurrentViewer) -> Response:
    with acting_as(context.engine, viewer) as session:
        figures = overview.read(session, by_tenant=viewer.sees_all)
        processes = health.processes(session) if viewer.may_operate else ()
        viewed(context, session, viewer, "overview_viewed")
    is_part = "hx-request" in request.headers
    name = "overview_part.html" if is_part else "overview.html"
    ports = _addresses(context, viewer, request)
    return page(request, context, name, figures=figures, processes=processes, **ports)


@router.get("/worklist")
def worklist_page(
    request: Request,
    context: Ctx,
    viewer: CurrentViewer,
    filters: Annotated[worklist.Filters, Query()],
) -> Response:
    return _worklist(request, context, viewer, worklist.Query(**filters.model_dump()))


@router.post("/worklist")
async def worklist_search(request: Request, context: Ctx, found: FromOurPage) -> Response:
    try:
        query = worklist.Query.model_validate(dict(await request.form()))
    except ValidationError:
        raise HTTPException(400, "The form holds a value that is not understood.") from None
    return await run_in_threadpool(_worklist, request, context, found.viewer, query)


def _worklist(
    request: Request, context: Context, viewer: Viewer, query: worklist.Query
) -> Response:
    with acting_as(context.engine, viewer) as session:
        found = worklist.find(session, query)
        used = [name for name in ("q", "state", "outcome", "tenant") if getattr(query, name)]
        viewed(context, session, viewer, "worklist_viewed", filters=",".join(used))
    is_part = "hx-request" in request.headers
    name = "worklist_part.html" if is_part else "worklist.html"
    tenants = [tenant.id for tenant in context.settings.tenants] if viewer.sees_all else []
    values = {"found": found, "query": query, "tenants": tenants, "states": list(StudyState)}
    return page(request, context, name, **values, **_addresses(context, viewer, request))


@router.get("/study/{study_id}")
def study(
    request: Request,
    context: Ctx,
    viewer: CurrentViewer,
    study_id: uuid.UUID,
    bundle: Bundle = "",
    asked: Literal["", "rerun", "resend", "late"] = "",
) -> Response:
    data_dir = context.settings.node.data_dir
    with acting_as(context.engine, viewer) as session:
        row = visible_study(session, viewer, study_id)
        view = study_page.read(session, row)
        chosen = view.chosen(bundle)
        finding = chosen.finding if chosen else None
        found = stack.stack(session, data_dir, row, finding)
        viewed(context, session, viewer, "study_viewed", target=str(study_id))
    values: dict[str, Any] = {"view": view, "chosen": chosen, "finding": finding, "asked": asked}
    values["viewer_data"] = _viewer_data(study_id, chosen, found) if found else None
    values["presets"] = images.presets(finding.output if finding else None)
    values["report"] = report
    is_part = "hx-request" in request.headers
    return page(request, context, "study_part.html" if is_part else "study.html", **values)


def _viewer_data(
    study_id: uuid.UUID,
    chosen: study_page.Analysis | None,
    found: tuple[stack.StackImage, ...],
) -> dict[str, Any]:
    """What the page's script needs to show the stack."""
    finding = chosen.finding if chosen else None
    keys = finding.key_images if finding else ()
    middle = keys[len(keys) // 2].image if keys else len(found) // 2
    if finding and keys:  # open on the strongest key image
        middle = max(keys, key=lambda key: key.raw.logit).image
    return {
        "base": f"/study/{study_id}",
        "bundle": chosen.bundle if chosen else "",
        "start": middle,
        "numbers": [image.instance_number for image in found],
        "positions": [image.position_mm for image in found],
        "keys": [{"image": key.image, "label": key.label} for key in keys],
        "opacity": round(paint.opacity(finding.primary), 2) if finding else 0.0,
        "word": finding.output.image_word if finding else "image",
    }


@router.post("/study/{study_id}/{action}")
def ask(
    context: Ctx, found: FromOurPage, study_id: uuid.UUID, action: str, bundle: Bundle = ""
) -> Response:
    """Ask for another run or another sending; the node's own loops carry it out."""
    viewer = found.viewer
    if action not in _ACTIONS:
        raise NotThere(viewer, str(study_id))
    if not viewer.may_operate:
        raise Refused(viewer, action)
    with acting_as(context.engine, viewer) as session:
        row = visible_study(session, viewer, study_id)
        chosen = study_page.read(session, row).chosen(bundle)
        is_possible = chosen is not None and chosen.may(_ACTIONS[action])
        if chosen and is_possible and not _is_asked(session, chosen.id, action):
            session.execute(
                insert(RequestRow).values(
                    id=uuid.uuid4(), tenant=row.tenant, origin=row.origin, analysis_id=chosen.id,
                    action=action, user_name=viewer.name,
                )
            )  # fmt: skip
        outcome = "ok" if is_possible else "refused"
        audit.record(
            session,
            viewer,
            f"{action}_asked",
            target=str(study_id),
            tenant=row.tenant,
            outcome=outcome,
        )
    asked = action if is_possible else "late"
    return RedirectResponse(f"/study/{study_id}?bundle={bundle}&asked={asked}", 303)


@router.get("/health")
def health_page(request: Request, context: Ctx, viewer: Operator) -> Response:
    with acting_as(context.engine, viewer) as session:
        found = health.read(session, context.settings)
        viewed(context, session, viewer, "health_viewed")
    is_part = "hx-request" in request.headers
    name = "health_part.html" if is_part else "health.html"
    return page(request, context, name, health=found)


def _is_asked(session: Session, analysis_id: int, action: str) -> bool:
    return bool(
        session.scalar(
            select(RequestRow.id)
            .where(
                RequestRow.analysis_id == analysis_id,
                RequestRow.action == action,
                RequestRow.done_at.is_(None),
            )
            .limit(1)
        )
    )


def _addresses(context: Context, viewer: Viewer, request: Request) -> dict[str, Any]:
    """Where studies are sent to, for pages that have nothing to show yet."""
    scp = context.settings.scp
    host = request.url.hostname if scp.host in ("0.0.0.0", "::") else scp.host
    titles = [
        (tenant.id, title)
        for tenant in context.settings.tenants
        if viewer.sees_all or tenant.id == viewer.tenant
        for title in tenant.ae_titles
    ]
    return {"scp_host": host, "scp_port": scp.port or scp.tls_port, "titles": titles}
