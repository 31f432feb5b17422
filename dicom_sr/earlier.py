"""What was issued of an analysis before, and what of it a destination has."""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import ColumnElement, Row, and_, func, select
from sqlalchemy.orm import Session

from db.answers import is_delivered
from db.notices import Notice
from db.tables import DeliveryRow, NoticeRow, ObjectRow, ResultRow, WithdrawalRow
from dicom_sr.inputs import Subject
from dicom_sr.notice import verdict
from dicom_sr.plan import REPORT, ReportReference, Variant


def over(session: Session, subject: Subject, destination: str, first: Variant) -> Variant:
    """The variant of a first result, with what the destination has accepted before `subject`.

    A result counts whichever objects of it arrived: a destination that takes no reports has it
    all the same. The newest report there is the one that a new report replaces. What was taken
    back counts no more: nothing replaces it, but that it is withdrawn is said.
    """
    results, notice, withdrawn = [], None, ""
    last_no = _withdrawn_no(session, subject)
    for delivery, result, row in _sent(session, subject, destination):
        had = [uid for uid, code in delivery.statuses.items() if is_delivered(code)]
        if (result or row).result_no < last_no:
            withdrawn = withdrawn or (result.finding["started_at"] if had and result else "")
        elif had and result is not None:
            results.append((result, _report(session, subject, result, had)))
        elif had and not (results or notice):
            notice = Notice.from_json(row.notice)
    newest = results[0][0] if results else None
    newest_no = newest.result_no if newest else 0
    return replace(
        first,
        predecessors=tuple(report for _, report in results if report)[:1],
        earlier_result=newest.finding["started_at"] if newest else "",
        replaced_notice=notice.ended_at if notice else "",
        replaced_verdict=verdict(notice) if notice else first.replaced_verdict,
        withdrawn_result="" if newest or notice else withdrawn,
        has_unsent=isinstance(subject.content, Notice) and _newest_no(session, subject) > newest_no,
    )


def _sent(
    session: Session, subject: Subject, destination: str
) -> Sequence[Row[DeliveryRow, ResultRow, NoticeRow]]:
    """What was owed to a destination before `subject`, newest first: a result or a notice each."""
    number = func.coalesce(ResultRow.result_no, NoticeRow.result_no)
    return session.execute(
        select(DeliveryRow, ResultRow, NoticeRow)
        .outerjoin(ResultRow, ResultRow.id == DeliveryRow.result_id)
        .outerjoin(NoticeRow, NoticeRow.id == DeliveryRow.result_id)
        .where(
            DeliveryRow.analysis_id == subject.analysis_id,
            DeliveryRow.destination == destination,
            number < subject.result_no,  # no number: a rejection note
        )
        .order_by(number.desc())
    ).all()


def stored(session: Session, subject: Subject) -> str:
    """When the newest result before `subject` began (ISO 8601 UTC), wherever it went; or ""."""
    finding = session.scalar(
        select(ResultRow.finding)
        .where(_is_before(session, subject))
        .order_by(ResultRow.result_no.desc())
        .limit(1)
    )
    return finding["started_at"] if finding else ""


def _newest_no(session: Session, subject: Subject) -> int:
    newest = select(func.max(ResultRow.result_no)).where(_is_before(session, subject))
    return session.scalar(newest) or 0


def _is_before(session: Session, subject: Subject) -> ColumnElement[bool]:
    """Of results: what came before `subject` and still stands."""
    return and_(
        ResultRow.analysis_id == subject.analysis_id,
        ResultRow.result_no < subject.result_no,
        ResultRow.result_no > _withdrawn_no(session, subject),
    )


def _withdrawn_no(session: Session, subject: Subject) -> int:
    """Below this number nothing stands; 0 where nothing was ever taken back."""
    query = select(func.max(WithdrawalRow.result_no)).where(
        WithdrawalRow.analysis_id == subject.analysis_id,
        WithdrawalRow.result_no < subject.result_no,
    )
    return session.scalar(query) or 0


def _report(
    session: Session, subject: Subject, result: ResultRow, had: Sequence[str]
) -> ReportReference | None:
    report = session.scalar(
        select(ObjectRow).where(
            ObjectRow.result_id == result.id,
            ObjectRow.role == REPORT,
            ObjectRow.sop_instance_uid.in_(had),
        )
    )
    if report is None:
        return None
    return ReportReference(
        sop_class_uid=report.sop_class_uid,
        sop_instance_uid=report.sop_instance_uid,
        series_instance_uid=report.series_instance_uid,
        study_instance_uid=subject.study_instance_uid,
    )
