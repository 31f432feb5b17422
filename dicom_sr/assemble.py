"""From rows and files to stored objects: reads what a build needs, keeps what it made."""

import datetime as dt
import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import structlog
from pydicom.uid import SecondaryCaptureImageStorage
from sqlalchemy import Engine, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from config.settings import Settings
from config.tenants import Destination, Tenant
from db import notices, withdrawals
from db.errors import PermanentError
from db.faults import point
from db.files import result_folder, write_durably
from db.notices import Notice
from db.queue import ClaimedJob
from db.result import Finding, ImageRef
from db.sandbox import Sandbox
from db.tables import NoticeRow, ObjectRow, ResultRow, StudyRow, WithdrawalRow
from db.withdrawals import Withdrawal
from dicom_sr import earlier
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.inputs import Inputs, Subject
from dicom_sr.notice import build_notice
from dicom_sr.plan import (
    MAP,
    OVERLAY,
    SERIES_STEP_BUNDLE,
    Context,
    Variant,
    roles_of,
)
from dicom_sr.rejection import build_rejections
from dicom_sr.times import parse_time

log = structlog.get_logger()


class BuiltDifferently(PermanentError):
    """Rebuilding gave other bytes than were stored: never two contents under one UID."""

    code: ClassVar[str] = "built_differently"


class Assembler:
    """Builds what destinations want of a result, once; any thread may call."""

    def __init__(self, engine: Engine, settings: Settings, sandbox: Sandbox, version: str) -> None:
        self._engine = engine
        self._settings = settings
        self._data_dir = settings.node.data_dir
        self._inputs = Inputs(self._data_dir, sandbox, settings.inference.max_pixels)
        self._version = version

    def warm(self) -> None:
        self._inputs.warm()

    def subject(self, session: Session, result_id: uuid.UUID) -> Subject:
        """What is issued under an id: a result, a notice or a withdrawal."""
        row: ResultRow | NoticeRow | WithdrawalRow | None = session.get(ResultRow, result_id)
        row = row or session.get(NoticeRow, result_id)
        row = row or session.get_one(WithdrawalRow, result_id)
        study = session.get_one(StudyRow, row.study_id)
        return Subject(
            result_id=row.id,
            result_no=row.result_no,
            analysis_id=row.analysis_id,
            study_id=study.id,
            study_instance_uid=study.study_instance_uid,
            tenant=row.tenant,
            origin=row.origin,
            bundle=row.bundle,
            content=_content(row),
        )

    def notice(self, job: ClaimedJob) -> Subject:
        """The notice of a claimed job: stored on its first try, the same on every other.

        Raises
        ------
        StaleAnalysis
            If the analysis was opened again.
        BundleUnknown, NothingStored
        PermanentError
            If none of the instances that were tried can be read.
        """
        with Session(self._engine) as session:
            if row := notices.drawn(session, job):
                return self.subject(session, row.id)
            images = notices.sources(session, job)
            study_uid = session.get_one(StudyRow, job.study_id).study_instance_uid
        source = self._first_readable((job.tenant, job.study_id, study_uid), images)
        with Session(self._engine) as session, session.begin():
            return self.subject(session, notices.draw(session, job, source).id)

    def _first_readable(self, study: tuple[str, int, str], images: Sequence[ImageRef]) -> ImageRef:
        for image in images[:-1]:
            try:
                self._inputs.header(*study, image)
            except PermanentError as error:
                log.warning("notice_source_left_out", exc_code=error.code)
            else:
                return image
        self._inputs.header(*study, images[-1])
        return images[-1]

    def variant(
        self, session: Session, subject: Subject, tenant: Tenant, destination: Destination
    ) -> Variant:
        """What a destination gets, given what it accepted of earlier results."""
        first = Variant.of(destination, tenant, subject.bundle)
        if isinstance(subject.content, Withdrawal):
            row = session.get_one(WithdrawalRow, subject.result_id)
            rejects = withdrawals.sent_to(session, row, destination.name)
            return replace(first, rejects=tuple(rejects))
        return earlier.over(session, subject, destination.name, first)

    def plain(self, subject: Subject, tenant: Tenant) -> Variant:
        """For a tenant without destinations: kept, and shown on the dashboard."""
        known = (*tenant.models, *tenant.shadow)
        index = known.index(subject.bundle) if subject.bundle in known else len(known)
        base = Variant().series_base + SERIES_STEP_BUNDLE * index
        with Session(self._engine) as session:
            old = earlier.stored(session, subject)
        return Variant(series_base=base, emit_negative=tenant.emit_negative, earlier_result=old)

    def ensure(self, subject: Subject, variants: Iterable[Variant]) -> None:
        """Build and store each variant that is not there yet.

        Raises
        ------
        PermanentError
            If the sources are gone, unreadable or not what was analysed.
        TransientError
            If the disk is full or a child died.
        """
        content = subject.content
        wanted = {
            v.key: v for v in variants if not isinstance(content, Finding) or roles_of(content, v)
        }
        with Session(self._engine) as session:
            missing = [v for key, v in wanted.items() if not self._is_stored(session, subject, key)]
        if not missing:
            return
        if isinstance(content, Finding):
            self._build_result(subject, content, missing)
        elif isinstance(content, Notice):
            self._build_notice(subject, content, missing)
        else:
            self._build_rejections(subject, content, missing)

    def _build_result(
        self, subject: Subject, finding: Finding, variants: Sequence[Variant]
    ) -> None:
        headers = self._inputs.headers(subject, finding)
        pixels, maps = self._inputs.pixels(subject, finding), self._inputs.maps(subject, finding)
        context = self._context(subject, finding.started_at)
        for variant in variants:
            built = build_objects(finding, headers, pixels, maps, context, variant)
            for event in _left_out(finding, variant, built):
                log.warning(event, result_id=str(subject.result_id))
            self._store(subject, variant.key, built)

    def _build_notice(self, subject: Subject, notice: Notice, variants: Sequence[Variant]) -> None:
        study = (subject.tenant, subject.study_id, subject.study_instance_uid)
        header = self._inputs.header(*study, notice.source)
        context = self._context(subject, notice.ended_at)
        for variant in variants:
            built = build_notice(notice, header, context, variant)
            self._store(subject, variant.key, [built])

    def _build_rejections(
        self, subject: Subject, withdrawal: Withdrawal, variants: Sequence[Variant]
    ) -> None:
        """Under the identity under which the objects went, whatever the study is by now."""
        context = self._context(subject, withdrawal.withdrawn_at)
        for variant in variants:
            headers = {
                result_id: self._inputs.header_of_own(
                    subject.tenant, [one for one in variant.rejects if one.result_id == result_id]
                )
                for result_id in dict.fromkeys(one.result_id for one in variant.rejects)
            }
            self._store(
                subject, variant.key, build_rejections(withdrawal, headers, context, variant)
            )

    def path(self, subject: Subject, sop_instance_uid: str) -> Path:
        # Our own UIDs only: digits and dots.
        return self._folder(subject) / f"{sop_instance_uid}.dcm"

    def _folder(self, subject: Subject) -> Path:
        return result_folder(self._data_dir, subject.tenant, subject.result_id)

    def _context(self, subject: Subject, at: str) -> Context:
        # This place's own offset at that moment, for a source that states none.
        offset = parse_time(at).astimezone().utcoffset() or dt.timedelta()
        return Context(
            tenant=subject.tenant,
            result_no=subject.result_no,
            node_version=self._version,
            node_serial=self._settings.node.serial,
            zone=dt.timezone(offset),
        )

    def _is_stored(self, session: Session, subject: Subject, key: str) -> bool:
        uids = session.scalars(
            select(ObjectRow.sop_instance_uid).where(
                ObjectRow.result_id == subject.result_id, ObjectRow.variant == key
            )
        ).all()
        return bool(uids) and all(self.path(subject, uid).is_file() for uid in uids)

    def _store(self, subject: Subject, key: str, built: Sequence[BuiltObject]) -> None:
        """Files first, rows after: a row promises that the file is there."""
        self._check_unchanged(subject, key, built)
        for one in built:
            write_durably(self.path(subject, one.sop_instance_uid), one.data)
            point("object_written")
        with Session(self._engine) as session, session.begin():
            for one in built:
                values = _row_values(subject, key, one)
                session.execute(insert(ObjectRow).values(values).on_conflict_do_nothing())
        point("objects_recorded")
        log.info("objects_built", result_id=str(subject.result_id), n_objects=len(built))

    def _check_unchanged(self, subject: Subject, key: str, built: Sequence[BuiltObject]) -> None:
        with Session(self._engine) as session:
            known = dict(
                session.execute(
                    select(ObjectRow.sop_instance_uid, ObjectRow.sha256).where(
                        ObjectRow.result_id == subject.result_id, ObjectRow.variant == key
                    )
                ).all()
            )
        for one in built:
            if known.get(one.sop_instance_uid, _sha256(one)) != _sha256(one):
                raise BuiltDifferently("a lost object cannot be built again with the same bytes")


def _content(row: ResultRow | NoticeRow | WithdrawalRow) -> Finding | Notice | Withdrawal:
    if isinstance(row, ResultRow):
        return Finding.from_json(row.finding)
    if isinstance(row, NoticeRow):
        return Notice.from_json(row.notice)
    return Withdrawal.from_json(row.withdrawal)


def _left_out(finding: Finding, variant: Variant, built: Sequence[BuiltObject]) -> list[str]:
    """What was asked for and could not be made."""
    events = []
    if MAP in roles_of(finding, variant) - {one.role for one in built}:
        events.append("map_left_out")  # no common geometry
    overlays = {one.sop_class_uid for one in built if one.role == OVERLAY}
    if variant.is_stacked and SecondaryCaptureImageStorage in overlays:
        events.append("overlays_sent_singly")  # images of several matrix sizes
    return events


def _sha256(built: BuiltObject) -> str:
    return hashlib.sha256(built.data).hexdigest()


def _row_values(subject: Subject, key: str, built: BuiltObject) -> dict[str, object]:
    return {
        "id": uuid.uuid4(),
        "result_id": subject.result_id,
        "analysis_id": subject.analysis_id,
        "study_id": subject.study_id,
        "tenant": subject.tenant,
        "origin": subject.origin,
        "variant": key,
        "role": built.role,
        "seq": built.seq,
        "sop_class_uid": built.sop_class_uid,
        "sop_instance_uid": built.sop_instance_uid,
        "series_instance_uid": built.series_instance_uid,
        "transfer_syntax_uid": built.transfer_syntax_uid,
        "sha256": _sha256(built),
        "size_bytes": len(built.data),
    }
