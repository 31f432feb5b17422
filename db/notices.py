"""Notices: what is said of an analysis that ended without a result, stored before it is built."""

import datetime as dt
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db import queue, results, studies
from db.errors import PermanentError, TransientError
from db.header import InstanceHeader
from db.result import Code, ImageRef, ModelIdentity, OutputSpec
from db.study import AnalysisState
from db.tables import AnalysisRow, BundleRow, InstanceRow, NoticeRow, StudyRow


class BundleUnknown(TransientError):
    """No inference process has presented the bundle yet."""

    code: ClassVar[str] = "bundle_unknown"


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        fields = dict(value)
        fields["model"] = ModelIdentity(**fields["model"])
        fields["output"] = _output(fields["output"])
        fields["source"] = ImageRef(**fields["source"])
        return cls(**fields)


def present(session: Session, model: ModelIdentity, output: OutputSpec) -> None:
    """Write down how a bundle that serves presents itself; the last one to do so counts."""
    row = {"model": asdict(model), "output": asdict(output)}
    session.execute(
        insert(BundleRow)
        .values(name=model.bundle, **row)
        .on_conflict_do_update(index_elements=["name"], set_={**row, "at": func.now()})
    )


def rest_of_wait(session: Session, job: queue.ClaimedJob, max_wait_s: float) -> dt.timedelta:
    """How long a refused study may still get the series that can be judged; zero or less: not.

    A localizer that comes first is refused at once; nobody wants a page about that.
    """
    row = session.get_one(AnalysisRow, job.analysis_id)
    if row.state != AnalysisState.NOT_ANALYSED:
        return dt.timedelta(0)
    last = session.get_one(StudyRow, job.study_id).last_instance_at
    now: dt.datetime = session.execute(select(func.now())).scalar_one()
    return last + dt.timedelta(seconds=max_wait_s) - now


def draw(session: Session, job: queue.ClaimedJob) -> NoticeRow:
    """The notice of a claimed job: stored on its first try, the same on every other.

    Raises
    ------
    StaleAnalysis
        If the analysis was opened again.
    BundleUnknown, NothingStored
    """
    studies.lock(session, job.study_id)
    analysis = queue.analysis_of(session, job)
    row = session.scalar(
        select(NoticeRow).where(
            NoticeRow.analysis_id == analysis.id,
            NoticeRow.analysis_version == analysis.row_version,
        )
    )
    if row is None:
        notice = _notice(session, session.get_one(AnalysisRow, analysis.id))
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


def _notice(session: Session, row: AnalysisRow) -> Notice:
    bundle = session.get(BundleRow, row.bundle)
    if bundle is None:
        raise BundleUnknown("no inference process has presented the bundle yet")
    return Notice(
        notice_uuid=str(uuid.uuid4()),
        ended_at=row.updated_at.astimezone(dt.UTC).isoformat(timespec="seconds"),
        model=ModelIdentity(**bundle.model),
        output=_output(bundle.output),
        source=_any_image(session, row.study_id),
        is_failure=row.state == AnalysisState.FAILED,
        code=row.reason_code,
        reason=row.reason,
    )


def _any_image(session: Session, study_id: int) -> ImageRef:
    """The first instance: intake has seen to it that all of a study are of one patient."""
    row = session.scalars(
        select(InstanceRow)
        .where(InstanceRow.study_id == study_id, InstanceRow.stored_at.is_not(None))
        .order_by(InstanceRow.received_at, InstanceRow.id)
        .limit(1)
    ).one_or_none()
    if row is None:
        raise NothingStored("the study has no stored instance")
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


def _output(value: Mapping[str, Any]) -> OutputSpec:
    return OutputSpec(**{**value, "procedure": Code(**value["procedure"])})
