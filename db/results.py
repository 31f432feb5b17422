"""Persisting what an analysis found, in one transaction with the move it causes."""

import uuid
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db import queue, studies
from db.faults import point
from db.result import Eligibility, Finding
from db.study import AnalysisEvent
from db.tables import NoticeRow, ResultRow, WithdrawalRow


def store_finding(
    session: Session, job: queue.ClaimedJob, finding: Finding, instance_ids: Sequence[str]
) -> studies.Analysis:
    """Keep the numbers, move the analysis to FOUND and end the job.

    instance_ids : the analysed set as it was chosen; the volume may have left out repeated
        positions, and readiness compares what it would choose.

    Raises
    ------
    StaleAnalysis
        If the analysis was reopened meanwhile: an old inference never finishes it.
    """
    analysis = queue.analysis_of(session, job)
    result_no = next_no(session, analysis)
    probability = finding.primary.probability
    session.add(
        ResultRow(
            id=uuid.UUID(finding.result_uuid),
            analysis_id=analysis.id,
            study_id=analysis.study_id,
            tenant=analysis.tenant,
            origin=analysis.origin,
            bundle=analysis.bundle,
            result_no=result_no,
            finding=finding.to_json(),
            is_positive=finding.is_positive,
            urgency=finding.urgency,
            probability=probability.value if probability else None,
        )
    )
    moved = studies.move(
        session,
        analysis,
        AnalysisEvent.FINDINGS_STORED,
        detail={"n_images": len(finding.images), "result_no": result_no},
        result_no=result_no,
        analysed_ids=list(instance_ids),
        analysed_sha256=studies.analysed_digest(instance_ids),
        is_partial=finding.is_partial,
    )
    queue.finish(session, job)
    point("finding_stored")
    return moved


def store_refusal(
    session: Session, job: queue.ClaimedJob, refusal: Eligibility
) -> studies.Analysis:
    """The bundle cannot judge the study: NOT_ANALYSED with rule, value and limit; ends the job."""
    analysis = queue.analysis_of(session, job)
    moved = refuse(session, analysis, refusal, bundle_folder=analysis.bundle_folder)
    queue.finish(session, job)
    return moved


def refuse(
    session: Session,
    analysis: studies.Analysis,
    refusal: Eligibility,
    *,
    bundle_folder: str = "",
) -> studies.Analysis:
    """Move an analysis to NOT_ANALYSED, with the reason.

    bundle_folder : of the version that refuses, as in `db.activations.Version`
    """
    return studies.move(
        session,
        analysis,
        AnalysisEvent.NOT_ELIGIBLE,
        detail={"rule": refusal.rule, "value": refusal.value, "limit": refusal.limit},
        reason_code=refusal.rule,
        reason=refusal.reason,
        is_applicable=refusal.is_applicable,
        bundle_folder=bundle_folder,
    )


def next_no(session: Session, analysis: studies.Analysis) -> int:
    """The number of what is issued next; results, notices and withdrawals share one sequence."""
    studies.lock(session, analysis.study_id)  # nobody else draws meanwhile
    drawn = (
        session.scalar(select(func.max(table.result_no)).where(table.analysis_id == analysis.id))
        for table in (ResultRow, NoticeRow, WithdrawalRow)
    )
    return 1 + max(number or 0 for number in drawn)


def latest(session: Session, analysis_id: int) -> ResultRow | None:
    """The newest result of an analysis."""
    return session.scalar(
        select(ResultRow)
        .where(ResultRow.analysis_id == analysis_id)
        .order_by(ResultRow.result_no.desc())
        .limit(1)
    )
