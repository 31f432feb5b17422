"""The rows of one study's new instances, in one transaction under the study's lock."""

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from config.tenants import Tenant
from db import studies
from db.aside import Arrival, keep_out
from db.errors import StaleAnalysis
from db.files import same_content, store_path
from db.header import InstanceHeader
from db.identity import Described, Stored, Trouble, conflict, is_same_encoding, is_same_patient
from db.job import Lane, lane
from db.meta import Provenance
from db.spool import Spooled
from db.study import AnalysisEvent, AnalysisState
from db.tables import (
    AnalysisRow,
    InstanceRow,
    SenderRow,
    StudyRow,
)

#: Of a study's row: who it is about.
PATIENT = (
    "patient_id",
    "issuer_of_patient_id",
    "patient_name",
    "patient_birth_date",
    "patient_sex",
    "accession_number",
    "study_date",
    "study_time",
    "study_description",
)
log = structlog.get_logger()
#: The event of an instance that differs from the filed one in nothing that makes it another.
VARIANT_DROPPED = "variant_dropped"


def file_study(
    session: Session, data_dir: Path, tenant: Tenant | None, arrivals: Sequence[Arrival]
) -> list[Spooled]:
    """Accept, quarantine or drop each of one study's arrivals.

    Returns
    -------
    Duplicates and variants, which need no row. An arrival that is neither filed nor returned waits
    in the spool for the outcome of another.
    """
    study = locked(session, arrivals[0].source, arrivals[0].described)
    firsts = _firsts(session, arrivals)
    dropped: list[Spooled] = []
    accepted: dict[str, Arrival] = {}
    for item in arrivals:
        if item.uid in accepted:
            continue  # measured once the first of them is stored
        if first := firsts.get(item.uid):
            if first.stored_at is not None:
                dropped += _file_again(session, data_dir, first, item)
        elif study is not None and not is_same_patient(patient_of(study), item.described.patient):
            reason = "Its patient is not the one this study belongs to."
            trouble = Trouble("second_patient", reason, is_conflict=True)
            dropped += keep_out(session, data_dir, item, trouble, study)
        else:
            study = study or created(session, tenant, item)
            _fill_issuer(study, item)
            accepted[item.uid] = item
    if study is not None and accepted:
        accept(session, study, tenant, list(accepted.values()))
    return dropped


def study_of(session: Session, source: Provenance, found: Described) -> StudyRow | None:
    """The study that an instance says it is of, if that is open and of the same patient."""
    study = locked(session, source, found)
    is_its = study is not None and is_same_patient(patient_of(study), found.patient)
    return study if is_its else None


def locked(session: Session, source: Provenance, found: Described) -> StudyRow | None:
    """The study that an instance says it is of, whoever's it is."""
    return session.scalar(
        select(StudyRow)
        .where(
            StudyRow.tenant == source.tenant,
            StudyRow.origin == source.origin,
            StudyRow.study_instance_uid == found.header.study_instance_uid,
        )
        .with_for_update(key_share=True)
    )


def created(session: Session, tenant: Tenant | None, item: Arrival) -> StudyRow:
    """The study as its first instance describes it."""
    source, patient = item.source, item.described.patient
    wanted = lane(tenant.lane_of(source.calling_ae)) if tenant else Lane.ROUTINE
    made = session.scalar(
        insert(StudyRow)
        .values(
            tenant=source.tenant,
            origin=source.origin,
            study_instance_uid=item.described.header.study_instance_uid,
            sender=source.calling_ae,
            lane=wanted,
            **{name: patient[name] for name in PATIENT},
        )
        # Another intake may have been first; then its patient counts, and we come again.
        .on_conflict_do_nothing()
        .returning(StudyRow.id)
    )
    if made is None:
        raise StaleAnalysis("another intake has just opened this study")
    study = locked(session, source, item.described)
    assert study is not None  # just made, in this transaction
    studies.record(
        session,
        "study_opened",
        tenant=study.tenant,
        origin=study.origin,
        study_id=study.id,
        sender=study.sender,
    )
    return study


def _firsts(session: Session, arrivals: Sequence[Arrival]) -> dict[str, InstanceRow]:
    source = arrivals[0].source
    rows = session.scalars(
        select(InstanceRow).where(
            InstanceRow.tenant == source.tenant,
            InstanceRow.origin == source.origin,
            InstanceRow.sop_instance_uid.in_({item.uid for item in arrivals}),
        )
    )
    return {row.sop_instance_uid: row for row in rows}


def _file_again(
    session: Session, data_dir: Path, first: InstanceRow, item: Arrival
) -> list[Spooled]:
    """A SOP Instance UID that is stored already: duplicate, variant or conflict."""
    study = session.get_one(StudyRow, first.study_id, with_for_update={"key_share": True})
    # It was read before the lock where it is of another study than the newcomer says.
    present = session.get(InstanceRow, first.id, populate_existing=True)
    if present is None:
        raise StaleAnalysis("an operator has just replaced the instance that was there first")
    first = present
    if trouble := conflict(stored(study, first), item.described):
        return keep_out(session, data_dir, item, trouble, study)
    path = store_path(data_dir, first.tenant, first.study_id, first.id)
    if same_content(path, item.spooled.path):
        log.info("duplicate_dropped", instance_id=str(item.spooled.id))
    else:
        studies.record(
            session,
            VARIANT_DROPPED,
            tenant=study.tenant,
            origin=study.origin,
            study_id=study.id,
            instance_id=str(first.id),
            sender=item.source.calling_ae.strip(),
            is_same_encoding=is_same_encoding(
                first.header["transfer_syntax_uid"], item.described.header.transfer_syntax_uid
            ),
            transfer_syntax_uid=item.described.header.transfer_syntax_uid,
        )
    return [item.spooled]


def stored(study: StudyRow, row: InstanceRow) -> Stored:
    """What is remembered of an instance of a study."""
    return Stored(
        header=InstanceHeader.from_json(row.header),
        pixel_sha256=row.pixel_sha256,
        identity_sha256=row.identity_sha256,
        patient=patient_of(study),
    )


def patient_of(study: StudyRow) -> dict[str, str]:
    return {name: getattr(study, name) for name in PATIENT}


def _fill_issuer(study: StudyRow, item: Arrival) -> None:
    """An issuer that came late counts from then on, or two issuers could meet through a blank."""
    if not study.issuer_of_patient_id:
        study.issuer_of_patient_id = item.described.patient["issuer_of_patient_id"]


def accept(
    session: Session, study: StudyRow, tenant: Tenant | None, arrivals: Sequence[Arrival]
) -> int:
    """Rows for instances that may join a locked study; returns how many are new."""
    inserted = set(
        session.scalars(
            insert(InstanceRow)
            .values([_row(study, item) for item in arrivals])
            # The same UID may have come in by another intake meanwhile: measured next time.
            .on_conflict_do_nothing()
            .returning(InstanceRow.id)
        )
    )
    arrivals = [item for item in arrivals if item.spooled.id in inserted]
    if not arrivals:
        return 0
    study.n_instances += len(arrivals)
    study.inputs_version += len(arrivals)
    study.row_version += 1
    study.last_instance_at = func.now()
    senders = Counter(item.source.calling_ae for item in arrivals)
    if tenant:
        study.lane = min([study.lane, *(lane(tenant.lane_of(sender)) for sender in senders)])
    session.flush()
    _count_senders(session, study, senders)
    studies.record(
        session,
        "instances_received",
        tenant=study.tenant,
        origin=study.origin,
        study_id=study.id,
        n_instances=len(arrivals),
        sender=", ".join(sorted(senders)),
    )
    if tenant:
        let_analyse(session, study, tenant)
    return len(arrivals)


def _row(study: StudyRow, item: Arrival) -> dict[str, Any]:
    header = item.described.header
    return {
        "id": item.spooled.id,
        "study_id": study.id,
        "tenant": study.tenant,
        "origin": study.origin,
        "sop_instance_uid": header.sop_instance_uid,
        "sop_class_uid": header.sop_class_uid,
        "series_instance_uid": header.series_instance_uid,
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "header": header.to_json(),
        "pixel_sha256": item.described.pixel_sha256,
        "identity_sha256": item.described.identity_sha256,
        "size_bytes": item.size_bytes,
        "sender": item.source.calling_ae,
        "received_at": _received_at(item),
    }


def _received_at(item: Arrival) -> dt.datetime:
    try:
        return dt.datetime.fromisoformat(item.source.received_at)
    except ValueError:
        return dt.datetime.fromtimestamp(item.spooled.path.stat().st_mtime, dt.UTC)


def _count_senders(session: Session, study: StudyRow, senders: Counter[str]) -> None:
    if study.origin != "dicom":
        return
    for ae_title, n in sorted(senders.items()):
        session.execute(
            insert(SenderRow)
            .values(tenant=study.tenant, ae_title=ae_title, n_instances=n)
            .on_conflict_do_update(
                index_elements=["tenant", "ae_title"],
                set_={"n_instances": SenderRow.n_instances + n, "last_seen_at": func.now()},
            )
        )


def let_analyse(session: Session, study: StudyRow, tenant: Tenant) -> None:
    """Start the analyses, or end them at once: a migration must not annotate an archive."""
    age_days = _age_days(study.study_date)
    if not tenant.max_study_age_days or age_days is None or age_days <= tenant.max_study_age_days:
        studies.ensure_analyses(session, study, tenant)
        return
    known = session.scalars(select(AnalysisRow.id).where(AnalysisRow.study_id == study.id)).all()
    if known:
        return
    studies.ensure_analyses(session, study, tenant)
    made = session.scalars(
        select(AnalysisRow.id).where(
            AnalysisRow.study_id == study.id, AnalysisRow.state == AnalysisState.WAITING
        )
    ).all()
    for analysis_id in made:
        studies.move(
            session,
            studies.load(session, analysis_id),
            AnalysisEvent.NOT_ELIGIBLE,
            reason_code=studies.STUDY_TOO_OLD,
            reason=f"The study is {age_days} days old; the limit is {tenant.max_study_age_days}.",
            judge_at=None,
        )


def _age_days(study_date: str) -> int | None:
    try:
        day = dt.date.fromisoformat(study_date) if len(study_date) == 8 else None
    except ValueError:
        return None
    return (dt.datetime.now(dt.UTC).date() - day).days if day else None
