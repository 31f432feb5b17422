"""Notices: what is said of an analysis that ended without a result, stored before it is built."""

import datetime as dt
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from sqlalchemy import ColumnElement, and_, case, exists, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db import queue, results, studies
from db.errors import PermanentError, TransientError
from db.header import InstanceHeader
from db.job import JobKind, JobState
from db.result import Code, ImageRef, ModelIdentity, OutputSpec
from db.study import AnalysisState
from db.tables import AnalysisRow, BundleRow, InstanceRow, JobRow, NoticeRow, StudyRow

#: So many instances are tried, where the first are gone or unreadable.
MAX_SOURCES = 5


class BundleUnknown(TransientError):
    """No inference process has presented the bundle yet; no fault of the study."""

    code: ClassVar[str] = "bundle_unknown"
    counts = False


class NothingStored(PermanentError):
    """The study has no instance whose patient a notice could name."""

    code: ClassVar[str] = "instance_gone"


@dataclass(frozen=True, slots=True)
class Notice:
    """That an analysis ended without a result, and why. It holds no number of any kind."""

    notice_uuid: str  # uuid4, drawn when the notice is stored
    ended_at: str  # ISO 8601 UTC, when the analysis was given up or refused
    model: ModelIdentity  # what did not judge the study
    output: OutputSpec
    source: ImageRef  # an instance of the study: it names patient and study, nothing else is read
    is_failure: bool  # gave up; else the bundle cannot judge such a study
    code: str  # stable, e.g. contrast
    reason: str  # one sentence for a person; of a failure it is for the log, not for a page
    has_numbers: bool = False  # a failure to build: the AI has judged, its result cannot be sent

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        fields = dict(value)
        fields["model"] = ModelIdentity(**fields["model"])
        fields["output"] = output_from(fields["output"])
        fields["source"] = ImageRef(**fields["source"])
        return cls(**fields)


def present(
    session: Session, model: ModelIdentity, output: OutputSpec, *, folder: str = ""
) -> None:
    """Write down how a version that serves presents itself; the last one to do so counts."""
    row = {"model": asdict(model), "output": asdict(output)}
    session.execute(
        insert(BundleRow)
        .values(name=model.bundle, folder=folder, **row)
        .on_conflict_do_update(index_elements=["name", "folder"], set_={**row, "at": func.now()})
    )


def rest_of_wait(session: Session, job: queue.ClaimedJob, max_wait_s: float) -> dt.timedelta:
    """How long a refused study may still get the series that can be judged; zero or less: not.

    A localizer that comes first is refused at once; nobody wants a page about that.
    """
    row = session.get_one(AnalysisRow, job.analysis_id)
    if row.state != AnalysisState.NOT_ANALYSED:
        return dt.timedelta(0)
    study = session.get_one(StudyRow, job.study_id, with_for_update={"key_share": True})
    last = studies.last_arrival(session, study)
    now: dt.datetime = session.execute(select(func.now())).scalar_one()
    return last + dt.timedelta(seconds=max_wait_s) - now


def is_put_off() -> ColumnElement[bool]:
    """Of jobs that wait: a notice whose time has not come. It is no backlog, and so not counted."""
    return and_(
        JobRow.kind == JobKind.NOTICE,
        JobRow.state == JobState.TODO,
        JobRow.run_after > func.now(),
    )


def due_since() -> ColumnElement[dt.datetime]:
    """Since when a job could have been done; a notice that was put off: since its time came."""
    return case((JobRow.kind == JobKind.NOTICE, JobRow.run_after), else_=JobRow.created_at)


def drawn(session: Session, job: queue.ClaimedJob) -> NoticeRow | None:
    """The notice that an earlier try of a job has stored."""
    return session.scalar(
        select(NoticeRow).where(
            NoticeRow.analysis_id == job.analysis_id,
            NoticeRow.analysis_version == job.analysis_version,
        )
    )


def sources(session: Session, job: queue.ClaimedJob) -> list[ImageRef]:
    """Instances that a notice may take patient and study from, the first of them preferred.

    Intake has seen to it that all of a study are of one patient. At most MAX_SOURCES, and at
    least one.

    Raises
    ------
    StaleAnalysis
        If the analysis was opened again.
    BundleUnknown, NothingStored
    """
    analysis = queue.analysis_of(session, job)
    _bundle(session, analysis.bundle, analysis.bundle_folder)
    rows = session.scalars(
        select(InstanceRow)
        .where(InstanceRow.study_id == job.study_id, InstanceRow.stored_at.is_not(None))
        .order_by(InstanceRow.received_at, InstanceRow.id)
        .limit(MAX_SOURCES)
    ).all()
    if not rows:
        raise NothingStored("the study has no stored instance")
    return [_reference(row) for row in rows]


def draw(session: Session, job: queue.ClaimedJob, source: ImageRef) -> NoticeRow:
    """Store the notice of a claimed job, unless it is; it never changes afterwards.

    Raises
    ------
    StaleAnalysis
        If the analysis was opened again.
    BundleUnknown
    """
    studies.lock(session, job.study_id)
    analysis = queue.analysis_of(session, job)
    row = drawn(session, job)
    if row is None:
        notice = _notice(session, session.get_one(AnalysisRow, analysis.id), source)
        row = NoticeRow(
            id=uuid.UUID(notice.notice_uuid),
            analysis_id=analysis.id,
            study_id=analysis.study_id,
            tenant=analysis.tenant,
            origin=analysis.origin,
            bundle=analysis.bundle,
            result_no=results.next_no(session, analysis),
            analysis_version=analysis.row_version,
            notice=notice.to_json(),
        )
        session.add(row)
        session.flush()
    return row


def _bundle(session: Session, name: str, folder: str) -> BundleRow:
    bundle = session.get(BundleRow, (name, folder))
    if bundle is None:
        raise BundleUnknown("no inference process has presented the bundle yet")
    return bundle


def _notice(session: Session, row: AnalysisRow, source: ImageRef) -> Notice:
    bundle = _bundle(session, row.bundle, row.bundle_folder)
    return Notice(
        notice_uuid=str(uuid.uuid4()),
        ended_at=row.updated_at.astimezone(dt.UTC).isoformat(timespec="seconds"),
        model=ModelIdentity(**bundle.model),
        output=output_from(bundle.output),
        source=source,
        is_failure=row.state == AnalysisState.FAILED,
        code=row.reason_code,
        reason=row.reason,
        has_numbers=_has_numbers(session, row),
    )


def _has_numbers(session: Session, row: AnalysisRow) -> bool:
    """Whether it was building that gave up: then the numbers of this very try are stored."""
    gave_up = exists().where(
        JobRow.analysis_id == row.id,
        JobRow.kind == JobKind.BUILD,
        JobRow.state == JobState.FAILED,
        JobRow.analysis_version == row.row_version - 1,  # giving up was the one move since
    )
    return row.state == AnalysisState.FAILED and bool(session.scalar(select(gave_up)))


def _reference(row: InstanceRow) -> ImageRef:
    header = InstanceHeader.from_json(row.header)
    return ImageRef(
        instance_id=str(row.id),
        sop_class_uid=row.sop_class_uid,
        sop_instance_uid=row.sop_instance_uid,
        series_instance_uid=row.series_instance_uid,
        frame=None,
        instance_number=header.instance_number,
        position_mm=None,
        rows=header.rows or 0,
        columns=header.columns or 0,
    )


def output_from(value: Mapping[str, Any]) -> OutputSpec:
    """As it is stored in findings, notices, withdrawals and bundles."""
    return OutputSpec(**{**value, "procedure": Code(**value["procedure"])})
