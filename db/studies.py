"""Moving analyses: compare-and-swap on `row_version`, with the job and the event it causes."""

import datetime as dt
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from config.tenants import Tenant
from db.answers import has_something
from db.errors import StaleAnalysis
from db.job import JobKind, JobState
from db.study import NEXT_JOB, AnalysisEvent, AnalysisState, advance, study_state
from db.tables import AnalysisRow, DeliveryRow, EventRow, JobRow, NoticeRow, StudyRow

#: Why an archive's studies are not analysed; a migration must not annotate an archive.
STUDY_TOO_OLD = "study_too_old"


@dataclass(frozen=True, slots=True)
class Analysis:
    """An analysis as it was read; `row_version` says which reading."""

    id: int
    study_id: int
    tenant: str
    origin: str
    bundle: str
    is_shadow: bool
    state: AnalysisState
    row_version: int
    result_no: int
    analysed_ids: tuple[str, ...]
    analysed_sha256: str
    is_partial: bool
    is_applicable: bool
    reason_code: str
    bundle_folder: str  # of the version that chose or refused the images
    lane: int


def load(session: Session, analysis_id: int) -> Analysis:
    """Read an analysis; `StaleAnalysis` if it is gone."""
    row = session.execute(
        select(AnalysisRow, StudyRow.lane)
        .join(StudyRow, StudyRow.id == AnalysisRow.study_id)
        .where(AnalysisRow.id == analysis_id)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if row is None:
        raise StaleAnalysis(f"analysis row {analysis_id} is gone")
    found, lane = row
    return Analysis(
        id=found.id,
        study_id=found.study_id,
        tenant=found.tenant,
        origin=found.origin,
        bundle=found.bundle,
        is_shadow=found.is_shadow,
        state=AnalysisState(found.state),
        row_version=found.row_version,
        result_no=found.result_no,
        analysed_ids=tuple(found.analysed_ids),
        analysed_sha256=found.analysed_sha256,
        is_partial=found.is_partial,
        is_applicable=found.is_applicable,
        reason_code=found.reason_code,
        bundle_folder=found.bundle_folder,
        lane=lane,
    )


def lock(session: Session, study_id: int) -> None:
    """Hold a study until the transaction ends; whoever writes below it comes here first.

    One order for all, the study before anything below it, so that none waits for another in a
    circle. FOR NO KEY UPDATE: rows that only refer to the study do not wait.
    """
    session.execute(
        select(StudyRow.id).where(StudyRow.id == study_id).with_for_update(key_share=True)
    )


def last_arrival(session: Session, study: StudyRow) -> dt.datetime:
    """When a study's last instance came; `study` is locked.

    Now, where that lies ahead: the clock was set back since, and waits begin anew.
    """
    now: dt.datetime = session.execute(select(func.now())).scalar_one()
    if study.last_instance_at > now:
        study.last_instance_at = now
        study.row_version += 1
        session.flush()
    return study.last_instance_at


def move(
    session: Session,
    analysis: Analysis,
    event: AnalysisEvent,
    *,
    detail: dict[str, Any] | None = None,
    is_alarm: bool = False,
    **changes: Any,
) -> Analysis:
    """Advance an analysis, enqueue what follows and record it; all or nothing is committed.

    `changes` are further columns of the analysis row, written by the same swap.

    Raises
    ------
    IllegalMove
        If the table of moves has no such move.
    StaleAnalysis
        If somebody else moved it meanwhile.
    """
    lock(session, analysis.study_id)
    after = replace(
        analysis, state=advance(analysis.state, event), row_version=analysis.row_version + 1
    )
    moved = session.scalar(
        update(AnalysisRow)
        # By version: meanwhile it may have left this state and come back to it.
        .where(AnalysisRow.id == analysis.id, AnalysisRow.row_version == analysis.row_version)
        .values(
            state=after.state,
            row_version=after.row_version,
            updated_at=func.now(),
            # A reason is of the state it came with.
            **{"reason_code": "", "reason": "", **changes},
        )
        .returning(AnalysisRow.id)
    )
    if moved is None:
        raise StaleAnalysis(f"analysis row {analysis.id} is past version {analysis.row_version}")
    after = load(session, analysis.id)
    _void_jobs(session, after)
    _drop_notices(session, after)
    if after.state is not analysis.state:
        enqueue(session, after)
    record(
        session,
        event.lower(),
        tenant=analysis.tenant,
        origin=analysis.origin,
        study_id=analysis.study_id,
        analysis_id=analysis.id,
        is_alarm=is_alarm,
        bundle=analysis.bundle,
        state=str(after.state),
        **(detail or {}),
    )
    refresh_state(session, analysis.study_id)
    return after


def choose_anew(session: Session, analysis: Analysis, bundle_folder: str) -> None:
    """Another version is to analyse than chose the images: let it choose by its own rules.

    No part of the swap, as the job under way is the one that does it.
    """
    lock(session, analysis.study_id)
    session.execute(
        update(AnalysisRow)
        .where(AnalysisRow.id == analysis.id, AnalysisRow.row_version == analysis.row_version)
        .values(bundle_folder=bundle_folder, analysed_ids=[], is_partial=False)
    )


def _void_jobs(session: Session, after: Analysis) -> None:
    # What still waits was meant for an earlier version; what runs will find itself stale.
    session.execute(
        update(JobRow)
        .where(JobRow.analysis_id == after.id, JobRow.state == JobState.TODO)
        .values(state=JobState.DONE, error_code="superseded", finished_at=func.now())
    )


def _drop_notices(session: Session, after: Analysis) -> None:
    # Whatever a notice said of an earlier version is over; what was sent cannot be called back.
    session.execute(
        update(DeliveryRow)
        .where(
            DeliveryRow.analysis_id == after.id,
            DeliveryRow.result_id.in_(
                select(NoticeRow.id).where(NoticeRow.analysis_id == after.id)
            ),
            DeliveryRow.state == "WAITING",  # db.outbox, which builds on this module
            ~has_something(),
        )
        .values(state="DROPPED", finished_at=func.now())
    )


def enqueue(session: Session, analysis: Analysis) -> bool:
    """Make the job that the analysis' state asks for; False where it asks for none."""
    kind = NEXT_JOB.get(analysis.state)
    if kind is None or (kind is JobKind.NOTICE and _is_silent(analysis)):
        return False
    session.add(
        JobRow(
            analysis_id=analysis.id,
            tenant=analysis.tenant,
            origin=analysis.origin,
            kind=kind,
            lane=analysis.lane,
            analysis_version=analysis.row_version,
        )
    )
    session.flush()
    notify(session)
    return True


def _is_silent(analysis: Analysis) -> bool:
    """Nobody waits for what nobody was promised: no page says that there is no result."""
    return analysis.is_shadow or not analysis.is_applicable or analysis.reason_code == STUDY_TOO_OLD


def notify(session: Session) -> None:
    """An empty hint that there is work; workers poll as well, for a hint can be lost."""
    session.execute(select(func.pg_notify("vigil_work", "")))


def ensure_analyses(session: Session, study: StudyRow, tenant: Tenant) -> None:
    """Make the analyses that the tenant's bundles owe this study, and let readiness look at all.

    Called whenever instances were accepted: each bundle judges the study again once nothing has
    arrived for the tenant's quiet period.
    """
    judge_at = func.now() + dt.timedelta(seconds=tenant.quiet_period_s)
    rows = [
        {
            "study_id": study.id,
            "tenant": study.tenant,
            "origin": study.origin,
            "bundle": bundle,
            "is_shadow": bundle in tenant.shadow,
            "judge_at": judge_at,
        }
        for bundle in (*tenant.models, *tenant.shadow)
    ]
    if rows:
        statement = insert(AnalysisRow).values(rows)
        session.execute(
            statement.on_conflict_do_update(
                index_elements=["study_id", "bundle"], set_={"judge_at": judge_at}
            )
        )
    refresh_state(session, study.id)


def refresh_state(session: Session, study_id: int) -> None:
    """Derive the study's state from its analyses and write it down for lists."""
    session.flush()
    # Locked, so that two analyses of one study that move at once do not both miss the other.
    study = session.execute(
        select(StudyRow).where(StudyRow.id == study_id).with_for_update(key_share=True)
    ).scalar_one()
    states = session.scalars(
        select(AnalysisRow.state).where(
            AnalysisRow.study_id == study_id, AnalysisRow.is_shadow.is_(False)
        )
    )
    state = study_state((AnalysisState(name) for name in states), is_held=study.is_held)
    if study.state != state:
        study.state = state
        study.row_version += 1
    session.flush()


def record(
    session: Session,
    kind: str,
    *,
    tenant: str,
    origin: str,
    study_id: int | None = None,
    analysis_id: int | None = None,
    is_alarm: bool = False,
    **detail: Any,
) -> None:
    """Write one line of the timeline; `detail` holds no patient data."""
    session.add(
        EventRow(
            tenant=tenant,
            origin=origin,
            study_id=study_id,
            analysis_id=analysis_id,
            kind=kind,
            is_alarm=is_alarm,
            detail=detail,
        )
    )


def analysed_digest(instance_ids: Iterable[str]) -> str:
    """The identity of an analysed set, whatever its order."""
    return hashlib.sha256("\n".join(sorted(instance_ids)).encode("ascii")).hexdigest()
