"""From rows and files to stored objects: reads what a build needs, keeps what it made."""

import datetime as dt
import hashlib
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import structlog
from sqlalchemy import Engine, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from config.settings import Settings
from config.tenants import Destination, Tenant
from db.errors import PermanentError
from db.files import result_folder, write_durably
from db.result import Finding
from db.sandbox import Sandbox
from db.tables import DeliveryRow, ObjectRow, ResultRow, StudyRow
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.inputs import Inputs, Subject
from dicom_sr.plan import (
    MAP,
    REPORT,
    SERIES_STEP_BUNDLE,
    Context,
    ReportReference,
    Variant,
    parse_time,
    roles_of,
)
from dicom_sr.push import is_delivered

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
        row, study = session.execute(
            select(ResultRow, StudyRow)
            .join(StudyRow, StudyRow.id == ResultRow.study_id)
            .where(ResultRow.id == result_id)
        ).one()
        return Subject(
            result_id=row.id,
            result_no=row.result_no,
            analysis_id=row.analysis_id,
            study_id=study.id,
            study_instance_uid=study.study_instance_uid,
            tenant=row.tenant,
            origin=row.origin,
            bundle=row.bundle,
            finding=Finding.from_json(row.finding),
        )

    def variant(
        self, session: Session, subject: Subject, tenant: Tenant, destination: Destination
    ) -> Variant:
        """What a destination gets, given what it accepted of earlier results."""
        old = accepted_report(session, subject, destination.name)
        return Variant.of(destination, tenant, subject.bundle, [old] if old else [])

    def plain(self, tenant: Tenant, bundle: str) -> Variant:
        """For a tenant without destinations: kept, and shown on the dashboard."""
        known = (*tenant.models, *tenant.shadow)
        index = known.index(bundle) if bundle in known else len(known)
        base = Variant().series_base + SERIES_STEP_BUNDLE * index
        return Variant(series_base=base, emit_negative=tenant.emit_negative)

    def ensure(self, subject: Subject, variants: Iterable[Variant]) -> None:
        """Build and store each variant that is not there yet.

        Raises
        ------
        PermanentError
            If the sources are gone, unreadable or not what was analysed.
        TransientError
            If the disk is full or a child died.
        """
        wanted = {v.key: v for v in variants if roles_of(subject.finding, v)}
        with Session(self._engine) as session:
            missing = [v for key, v in wanted.items() if not self._is_stored(session, subject, key)]
        if not missing:
            return
        headers, pixels = self._inputs.headers(subject), self._inputs.pixels(subject)
        maps = self._inputs.maps(subject)
        for variant in missing:
            context = self._context(subject)
            built = build_objects(subject.finding, headers, pixels, maps, context, variant)
            if MAP in roles_of(subject.finding, variant) - {one.role for one in built}:
                log.warning("map_left_out", result_id=str(subject.result_id))  # no common geometry
            self._store(subject, variant.key, built)

    def path(self, subject: Subject, sop_instance_uid: str) -> Path:
        # Our own UIDs only: digits and dots.
        return self._folder(subject) / f"{sop_instance_uid}.dcm"

    def _folder(self, subject: Subject) -> Path:
        return result_folder(self._data_dir, subject.tenant, subject.result_id)

    def _context(self, subject: Subject) -> Context:
        # This place's own offset at that moment, for a source that states none.
        offset = parse_time(subject.finding.started_at).astimezone().utcoffset() or dt.timedelta()
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
        with Session(self._engine) as session, session.begin():
            for one in built:
                values = _row_values(subject, key, one)
                session.execute(insert(ObjectRow).values(values).on_conflict_do_nothing())
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


def accepted_report(session: Session, subject: Subject, destination: str) -> ReportReference | None:
    """The newest earlier report of the analysis that a destination has."""
    rows = session.execute(
        select(ResultRow, DeliveryRow)
        .join(DeliveryRow, DeliveryRow.result_id == ResultRow.id)
        .where(
            ResultRow.analysis_id == subject.analysis_id,
            ResultRow.result_no < subject.result_no,
            DeliveryRow.destination == destination,
        )
        .order_by(ResultRow.result_no.desc())
    )
    for result, delivery in rows:
        had = [uid for uid, code in delivery.statuses.items() if is_delivered(code)]
        report = session.scalar(
            select(ObjectRow).where(
                ObjectRow.result_id == result.id,
                ObjectRow.role == REPORT,
                ObjectRow.sop_instance_uid.in_(had),
            )
        )
        if report is not None:
            return ReportReference(
                sop_class_uid=report.sop_class_uid,
                sop_instance_uid=report.sop_instance_uid,
                series_instance_uid=report.series_instance_uid,
                study_instance_uid=subject.study_instance_uid,
                started_at=result.finding["started_at"],
            )
    return None


def _sha256(built: BuiltObject) -> str:
    return hashlib.sha256(built.data).hexdigest()


def _row_values(subject: Subject, key: str, built: BuiltObject) -> dict[str, object]:
    return {
        "id": uuid.uuid4(),
        "result_id": subject.result_id,
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
