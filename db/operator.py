"""An operator's hands: run an analysis again, send its objects again, end a conflict."""

import uuid

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session

from db import answers, studies
from db.errors import CutOff, IllegalMove, NodeError, PermanentError
from db.outbox import DeliveryState
from db.study import AnalysisEvent, AnalysisState
from db.tables import (
    AnalysisRow,
    AuditRow,
    DeliveryRow,
    DestinationRow,
    QuarantineRow,
    RequestRow,
    ResultRow,
    StudyRow,
)


def rerun(session: Session, analysis_id: int, *, actor: str) -> studies.Analysis:
    """Analyse again, over the set that is there now; the new result supersedes the old one."""
    studies.lock(session, studies.load(session, analysis_id).study_id)
    analysis = studies.load(session, analysis_id)
    moved = studies.move(
        session,
        analysis,
        AnalysisEvent.RERUN,
        detail={"by": actor},
        # The set is chosen anew by whoever takes the job.
        analysed_ids=[],
        is_partial=False,
        reason="",
        reason_code="",
        is_applicable=True,
    )
    _audit(session, analysis, "rerun", actor)
    return moved


def resend(session: Session, analysis_id: int, *, actor: str) -> studies.Analysis:
    """Send the stored objects once more, the same bytes, to every destination.

    What is on its way already goes at once, whatever it waits for: a destination may have been
    mended since it refused.

    Raises
    ------
    IllegalMove
        If nothing is to be sent.
    """
    studies.lock(session, studies.load(session, analysis_id).study_id)
    analysis = studies.load(session, analysis_id)
    if analysis.state is AnalysisState.BUILT:
        _hurry(session, analysis)
        _audit(session, analysis, "resend", actor)
        return analysis
    if analysis.state is AnalysisState.WITHDRAWN:
        raise IllegalMove("the result was withdrawn and is never sent again; `rerun` makes another")
    if analysis.state not in (AnalysisState.DELIVERED, AnalysisState.DELIVERED_IN_PART):
        raise IllegalMove(f"nothing to send again: the analysis is {analysis.state}")
    result_id = session.scalar(
        select(ResultRow.id).where(
            ResultRow.analysis_id == analysis.id, ResultRow.result_no == analysis.result_no
        )
    )
    owed = session.scalars(select(DeliveryRow).where(DeliveryRow.result_id == result_id)).all()
    for row in owed:
        row.state = DeliveryState.WAITING
        row.statuses = answers.to_send_again(row.statuses)
        row.attempts = row.refusals = 0
        row.run_after = func.now()
        # As much time as it had at first.
        row.expires_at = func.now() + (row.expires_at - row.created_at)
        row.created_at = func.now()
        row.finished_at = None
        row.error_code = ""
    if not owed:  # no destination, an upload, a shadow bundle
        raise IllegalMove("nothing was sent anywhere")
    session.execute(
        update(DestinationRow)
        .where(DestinationRow.tenant == analysis.tenant)
        .values(retry_at=func.now())
    )
    moved = studies.move(session, analysis, AnalysisEvent.RESEND, detail={"by": actor})
    _audit(session, analysis, "resend", actor)
    studies.notify(session)
    return moved


def _hurry(session: Session, analysis: studies.Analysis) -> None:
    session.execute(
        update(DeliveryRow)
        .where(DeliveryRow.analysis_id == analysis.id, DeliveryRow.state == DeliveryState.WAITING)
        .values(run_after=func.now())
    )
    session.execute(
        update(DestinationRow)
        .where(DestinationRow.tenant == analysis.tenant)
        .values(retry_at=func.now())
    )
    studies.record(
        session,
        "delivery_hurried",
        tenant=analysis.tenant,
        origin=analysis.origin,
        study_id=analysis.study_id,
        analysis_id=analysis.id,
    )
    studies.notify(session)


def discard(session: Session, quarantined: uuid.UUID, *, actor: str) -> None:
    """The newcomer is wrong and the first stays; a study without another open conflict goes on.

    So does one that waits for an image that came cut off: it is no more missed.

    The file stays where it is: only the decision is written.

    Raises
    ------
    NotOpen
        If nothing open goes by that id.
    """
    row = session.get(QuarantineRow, quarantined)
    if row is not None and row.study_id is not None:
        studies.lock(session, row.study_id)
    # As it is now: it may have been released meanwhile.
    row = session.get(QuarantineRow, quarantined, with_for_update=True, populate_existing=True)
    if row is None or row.state != "OPEN":
        raise NotOpen("nothing that is open in the quarantine goes by this id")
    row.state, row.decided_at, row.decided_by = "DISCARDED", func.now(), actor
    session.flush()
    if row.study_id is not None:
        hold_while_open(session, row.study_id)
        if row.code == CutOff.code:
            _judge_anew(session, row.study_id)
    studies.record(
        session,
        "quarantine_discarded",
        tenant=row.tenant,
        origin=row.origin,
        study_id=row.study_id,
        instance_id=str(row.id),
    )
    session.add(
        AuditRow(tenant=row.tenant, actor=actor, action="quarantine_discard", target=str(row.id))
    )


def hold_while_open(session: Session, study_id: int) -> None:
    """Hold a study as long as a conflict is open, and no longer."""
    is_open = session.scalar(
        select(
            exists().where(
                QuarantineRow.study_id == study_id,
                QuarantineRow.is_conflict,
                QuarantineRow.state == "OPEN",
            )
        )
    )
    study = session.get_one(StudyRow, study_id, populate_existing=True)
    study.is_held = bool(is_open)
    study.row_version += 1
    studies.refresh_state(session, study_id)
    studies.notify(session)


def _judge_anew(session: Session, study_id: int) -> None:
    # Only what waits: fewer images missing is no reason to issue a result again.
    session.execute(
        update(AnalysisRow)
        .where(AnalysisRow.study_id == study_id, AnalysisRow.state == AnalysisState.WAITING)
        .values(judge_at=func.now())
    )


class NotOpen(PermanentError):
    """There is nothing to decide."""

    code = "not_open"


def carry_out_requests(session: Session) -> int:
    """Do what operators asked for on a page; returns how many requests were answered."""
    requests = session.scalars(
        select(RequestRow)
        .where(RequestRow.done_at.is_(None))
        .order_by(RequestRow.at)
        .with_for_update(skip_locked=True)
    ).all()
    # All before the first: below a study lie the destinations, which every study shares.
    wanted = [request.analysis_id for request in requests]
    owners = select(AnalysisRow.study_id).where(AnalysisRow.id.in_(wanted)).distinct()
    for study_id in session.scalars(owners.order_by(AnalysisRow.study_id)).all():
        studies.lock(session, study_id)
    for request in requests:
        act = rerun if request.action == "rerun" else resend
        try:
            with session.begin_nested():
                _check_owner(session, request)
                act(session, request.analysis_id, actor=request.user_name)
            request.outcome = "done"
        except NodeError as error:
            request.outcome = error.code
        request.done_at = func.now()
    return len(requests)


class NotYours(PermanentError):
    """A request names another tenant's analysis."""

    code = "not_yours"


def _check_owner(session: Session, request: RequestRow) -> None:
    """A page's role may write what it likes into a request of its own tenant: compare."""
    analysis = studies.load(session, request.analysis_id)
    if (analysis.tenant, analysis.origin) != (request.tenant, request.origin):
        raise NotYours("the request's tenant is not the analysis'")


def _audit(session: Session, analysis: studies.Analysis, action: str, actor: str) -> None:
    session.add(
        AuditRow(
            tenant=analysis.tenant, actor=actor, action=action, target=f"analysis {analysis.id}"
        )
    )
