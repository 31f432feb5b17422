"""The JSON twins of the pages under /api/v1, for scripts; the same sessions, the same sight."""

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query

from dashboard import health, outcomes, overview, study_page, worklist
from dashboard.auth import CurrentViewer, Operator
from dashboard.context import Ctx
from dashboard.looking import viewed, visible_study
from dashboard.tenancy import acting_as

router = APIRouter(prefix="/api/v1", tags=["api"])


@dataclass(frozen=True, slots=True)
class AnalysisTwin:
    bundle: str
    state: str
    result_no: int
    outcome: outcomes.Outcome
    refusal: study_page.Refusal | None
    finding: dict[str, Any] | None  # db.result.Finding
    updated_at: dt.datetime


@dataclass(frozen=True, slots=True)
class StudyTwin:
    study: outcomes.Line
    is_held: bool
    first_received_at: dt.datetime
    analyses: list[AnalysisTwin]
    deliveries: list[study_page.DeliveryLine]
    timeline: list[study_page.TimelineEntry]


@router.get("/overview")
def overview_twin(context: Ctx, viewer: CurrentViewer) -> overview.Overview:
    """Totals, positivity, turnaround, queue, trend and alarms."""
    with acting_as(context.engine, viewer) as session:
        viewed(context, session, viewer, "overview_viewed")
        return overview.read(session, by_tenant=viewer.sees_all)


@router.get("/studies")
def worklist_twin(
    context: Ctx, viewer: CurrentViewer, filters: Annotated[worklist.Filters, Query()]
) -> worklist.Page:
    """The worklist by urgency and age, 50 studies a page."""
    with acting_as(context.engine, viewer) as session:
        viewed(context, session, viewer, "worklist_viewed")
        return worklist.find(session, worklist.Query(**filters.model_dump()))


@router.get("/studies/{study_id}")
def study_twin(context: Ctx, viewer: CurrentViewer, study_id: uuid.UUID) -> StudyTwin:
    """One study: every analysis with its numbers, deliveries, timeline."""
    with acting_as(context.engine, viewer) as session:
        view = study_page.read(session, visible_study(session, viewer, study_id))
        viewed(context, session, viewer, "study_viewed", target=str(study_id))
    analyses = [
        AnalysisTwin(
            one.bundle, one.state, one.result_no, one.outcome, one.refusal,
            one.finding.to_json() if one.finding else None, one.updated_at,
        )
        for one in view.analyses
    ]  # fmt: skip
    return StudyTwin(
        view.line,
        view.is_held,
        view.first_received_at,
        analyses,
        list(view.deliveries),
        list(view.timeline),
    )


@router.get("/health")
def health_twin(context: Ctx, viewer: Operator) -> health.Health:
    """Processes, database, disk, queue, senders and destinations; for admins and managers."""
    with acting_as(context.engine, viewer) as session:
        viewed(context, session, viewer, "health_viewed")
        return health.read(session, context.settings)
