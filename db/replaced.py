"""What an operator has replaced: set aside for good, and what rested on it opened again."""

import uuid
from collections.abc import Iterable

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db import studies, withdrawals
from db.answers import has_something
from db.outbox import DeliveryState
from db.study import AnalysisEvent, AnalysisState
from db.tables import AnalysisRow, DeliveryRow, InstanceRow, QuarantineRow

CODE = "replaced"


def any_of(session: Session, instance_ids: Iterable[str]) -> bool:
    """Whether any of these is in its study no more: what rests on it is not to be sent (H8)."""
    query = select(QuarantineRow.id).where(
        QuarantineRow.id.in_([uuid.UUID(one) for one in instance_ids]),
        QuarantineRow.code == CODE,
        QuarantineRow.state != "RELEASED",
    )
    return session.scalar(query.limit(1)) is not None


def decide(row: QuarantineRow, state: str, actor: str) -> None:
    """Write down an operator's decision."""
    row.state, row.decided_by, row.decided_at = state, actor, func.now()


def set_aside(session: Session, first: InstanceRow, by: uuid.UUID, *, actor: str) -> None:
    """An instance leaves its study, and a row in the quarantine says what stands in its place."""
    row = session.get(QuarantineRow, first.id)
    if row is None:  # else it had been set aside and released before
        row = QuarantineRow(
            id=first.id,
            tenant=first.tenant,
            origin=first.origin,
            sop_instance_uid=first.sop_instance_uid,
            series_instance_uid=first.series_instance_uid,
            study_instance_uid=str(first.header["study_instance_uid"]),
            sender=first.sender,
            size_bytes=first.size_bytes,
        )
        session.add(row)
    row.study_id, row.code, row.is_conflict = first.study_id, CODE, False
    row.reason = f"An operator has put {by} in its place."
    decide(row, "DISCARDED", actor)
    session.delete(first)


def reopen(session: Session, study_id: int, gone: set[str], *, is_other_patient: bool) -> None:
    """Open each analysis again that rests on what is gone, and drop what was not sent of it."""
    rests_on_it: list[int] = []
    rows = session.scalars(select(AnalysisRow).where(AnalysisRow.study_id == study_id)).all()
    for row in rows:
        analysis = studies.load(session, row.id)
        if analysis.reason_code == studies.STUDY_TOO_OLD:
            continue  # an archive is not annotated, whoever's it turns out to be
        # Without ids it is a run that chooses by itself, and may have chosen by now.
        chooses = analysis.state is AnalysisState.QUEUED and not analysis.analysed_ids
        if is_other_patient or gone & set(analysis.analysed_ids) or (gone and chooses):
            rests_on_it.append(row.id)
            if analysis.state is not AnalysisState.WAITING:
                detail = {"by": "operator"}
                studies.move(session, analysis, AnalysisEvent.INPUTS_CHANGED, detail=detail)
    if is_other_patient:  # what was said of the other stands no more, nowhere
        session.execute(
            update(AnalysisRow).where(AnalysisRow.study_id == study_id).values(result_no=0)
        )
    session.execute(
        update(DeliveryRow)
        .where(
            DeliveryRow.analysis_id.in_(rests_on_it),
            DeliveryRow.state == DeliveryState.WAITING,
            ~has_something(),
            ~withdrawals.is_rejection(),
        )
        .values(state=DeliveryState.DROPPED, finished_at=func.now())
    )
