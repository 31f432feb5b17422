"""Rows: what the database holds, and what it refuses to hold.

Every row that belongs to a study repeats `tenant` and `origin`, so that row-level security
(migrations/) is one comparison and never a join. `origin` is `dicom`, or `user:<id>` for uploads.
"""

import datetime as dt
import uuid
from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own protocol
        dt.datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[str]: ARRAY(Text),
        str: Text,
        int: BigInteger,
        uuid.UUID: Uuid,
    }


def _key() -> Mapped[int]:
    return mapped_column(BigInteger, Identity(), primary_key=True)


def _now() -> Mapped[dt.datetime]:
    return mapped_column(server_default=func.now())


class StudyRow(Base):
    __tablename__ = "studies"
    __table_args__ = (
        UniqueConstraint("tenant", "origin", "study_instance_uid"),
        Index("ix_studies_worklist", "tenant", "last_instance_at"),
        Index(
            "ix_studies_open",
            "state",
            postgresql_where=text("state IN ('RECEIVING', 'IN_PROGRESS', 'HELD')"),
        ),
    )

    id: Mapped[int] = _key()
    public_id: Mapped[uuid.UUID] = mapped_column(unique=True, server_default=func.gen_random_uuid())
    tenant: Mapped[str]
    origin: Mapped[str]
    study_instance_uid: Mapped[str]
    state: Mapped[str] = mapped_column(
        server_default="RECEIVING"
    )  # db.study.study_state, kept by db.studies
    is_held: Mapped[bool] = mapped_column(server_default=text("false"))
    row_version: Mapped[int] = mapped_column(server_default="0")
    inputs_version: Mapped[int] = mapped_column(server_default="0")
    n_instances: Mapped[int] = mapped_column(Integer, server_default="0")
    # Who it is about: the first instance accepted decides, the rest must agree.
    patient_id: Mapped[str] = mapped_column(server_default="")
    issuer_of_patient_id: Mapped[str] = mapped_column(server_default="")
    patient_name: Mapped[str] = mapped_column(server_default="")
    patient_birth_date: Mapped[str] = mapped_column(server_default="")
    patient_sex: Mapped[str] = mapped_column(server_default="")
    accession_number: Mapped[str] = mapped_column(server_default="", index=True)
    study_date: Mapped[str] = mapped_column(server_default="")
    study_time: Mapped[str] = mapped_column(server_default="")
    study_description: Mapped[str] = mapped_column(server_default="")
    sender: Mapped[str] = mapped_column(server_default="")  # calling AE title of the first instance
    lane: Mapped[int] = mapped_column(Integer, server_default="1")  # db.job.Lane
    created_at: Mapped[dt.datetime] = _now()
    last_instance_at: Mapped[dt.datetime] = _now()


class InstanceRow(Base):
    """An accepted instance; `id` was drawn at reception and names its file for ever."""

    __tablename__ = "instances"
    __table_args__ = (
        UniqueConstraint("tenant", "origin", "sop_instance_uid"),
        Index("ix_instances_study", "study_id"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    tenant: Mapped[str]
    origin: Mapped[str]
    sop_instance_uid: Mapped[str]
    sop_class_uid: Mapped[str]
    series_instance_uid: Mapped[str]
    transfer_syntax_uid: Mapped[str]
    header: Mapped[dict[str, Any]]  # db.header.InstanceHeader
    pixel_sha256: Mapped[str]  # of the encoded pixel data; empty where there is none
    identity_sha256: Mapped[str]  # of patient, UIDs, geometry and rescale (db.intake)
    size_bytes: Mapped[int]
    sender: Mapped[str]
    received_at: Mapped[dt.datetime]
    stored_at: Mapped[dt.datetime | None]  # set once store/ has the file durably


class QuarantineRow(Base):
    """An object that may not join its study until an operator decides."""

    __tablename__ = "quarantine"
    __table_args__ = (Index("ix_quarantine_said", "tenant", "study_instance_uid"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    origin: Mapped[str]
    study_id: Mapped[int | None] = mapped_column(
        ForeignKey("studies.id", ondelete="SET NULL"), index=True
    )
    state: Mapped[str] = mapped_column(server_default="OPEN")  # OPEN | RELEASED | DISCARDED
    code: Mapped[str]  # stable, e.g. second_patient
    reason: Mapped[str]  # one sentence, no patient data
    is_conflict: Mapped[bool] = mapped_column(
        server_default=text("false")
    )  # holds the study while OPEN
    sop_instance_uid: Mapped[str] = mapped_column(server_default="")
    study_instance_uid: Mapped[str] = mapped_column(server_default="")  # as it says itself
    series_instance_uid: Mapped[str] = mapped_column(server_default="")
    sender: Mapped[str] = mapped_column(server_default="")
    size_bytes: Mapped[int] = mapped_column(server_default="0")
    at: Mapped[dt.datetime] = _now()
    decided_at: Mapped[dt.datetime | None]
    decided_by: Mapped[str] = mapped_column(server_default="")


class ReturnedRow(Base):
    """Our own objects, forwarded back to us: acknowledged, counted, never analysed."""

    __tablename__ = "returned"
    __table_args__ = (UniqueConstraint("tenant", "sop_instance_uid"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    sop_instance_uid: Mapped[str]
    sender: Mapped[str]
    n: Mapped[int] = mapped_column(Integer, server_default="1")
    at: Mapped[dt.datetime] = _now()


class AnalysisRow(Base):
    """One study seen by one bundle. Only `db.studies.move` writes `state`."""

    __tablename__ = "analyses"
    __table_args__ = (
        UniqueConstraint("study_id", "bundle"),
        Index("ix_analyses_judge", "judge_at", postgresql_where=text("judge_at IS NOT NULL")),
        Index("ix_analyses_recent", "tenant", "updated_at"),
    )

    id: Mapped[int] = _key()
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    tenant: Mapped[str]
    origin: Mapped[str]
    bundle: Mapped[str]
    is_shadow: Mapped[bool] = mapped_column(
        server_default=text("false")
    )  # run and compared, never delivered
    state: Mapped[str] = mapped_column(server_default="WAITING")  # db.study.AnalysisState
    row_version: Mapped[int] = mapped_column(server_default="0")
    # When readiness looks next: a quiet period after each instance. No part of the swap: an
    # instance that changes nothing must not void the job under way.
    judge_at: Mapped[dt.datetime | None]
    result_no: Mapped[int] = mapped_column(Integer, server_default="0")
    analysed_ids: Mapped[list[str]] = mapped_column(
        server_default="{}"
    )  # instance ids, in order along the normal
    analysed_sha256: Mapped[str] = mapped_column(
        server_default=""
    )  # of the analysed set, whatever its order
    is_partial: Mapped[bool] = mapped_column(server_default=text("false"))
    reason_code: Mapped[str] = mapped_column(server_default="")
    reason: Mapped[str] = mapped_column(
        server_default=""
    )  # why NOT_ANALYSED or FAILED, for a person
    is_applicable: Mapped[bool] = mapped_column(
        server_default=text("true")
    )  # False: another kind of study; silent
    # Of the version that chose or refused the images: activations.folder; "": the configured one.
    bundle_folder: Mapped[str] = mapped_column(server_default="")
    ready_at: Mapped[dt.datetime | None]
    created_at: Mapped[dt.datetime] = _now()
    updated_at: Mapped[dt.datetime] = _now()


class ResultRow(Base):
    """The numbers of one result, persisted before anything is built from them; never changed."""

    __tablename__ = "results"
    __table_args__ = (UniqueConstraint("analysis_id", "result_no"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)  # Finding.result_uuid
    analysis_id: Mapped[int] = mapped_column(ForeignKey("analyses.id", ondelete="CASCADE"))
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"), index=True)
    tenant: Mapped[str]
    origin: Mapped[str]
    bundle: Mapped[str]
    result_no: Mapped[int] = mapped_column(Integer)
    finding: Mapped[dict[str, Any]]  # db.result.Finding
    # Copies for lists and statistics; the finding is the truth.
    is_positive: Mapped[bool]
    urgency: Mapped[str]
    probability: Mapped[float | None] = mapped_column(Float)  # of the primary label
    at: Mapped[dt.datetime] = _now()


class NoticeRow(Base):
    """What is said of an analysis that ended without a result; stored first, never changed."""

    __tablename__ = "notices"
    __table_args__ = (UniqueConstraint("analysis_id", "result_no"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    analysis_id: Mapped[int] = mapped_column(ForeignKey("analyses.id", ondelete="CASCADE"))
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"), index=True)
    tenant: Mapped[str]
    origin: Mapped[str]
    bundle: Mapped[str]
    result_no: Mapped[int] = mapped_column(Integer)  # one sequence with the analysis' results
    analysis_version: Mapped[int]  # analyses.row_version it was drawn for
    notice: Mapped[dict[str, Any]]  # db.notices.Notice
    at: Mapped[dt.datetime] = _now()


class WithdrawalRow(Base):
    """That all issued of an analysis before it is taken back; stored first, never changed."""

    __tablename__ = "withdrawals"
    __table_args__ = (UniqueConstraint("analysis_id", "result_no"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    analysis_id: Mapped[int] = mapped_column(ForeignKey("analyses.id", ondelete="CASCADE"))
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"), index=True)
    tenant: Mapped[str]
    origin: Mapped[str]
    bundle: Mapped[str]
    result_no: Mapped[int] = mapped_column(Integer)  # one sequence with results and notices
    withdrawal: Mapped[dict[str, Any]]  # db.withdrawals.Withdrawal
    actor: Mapped[str]
    at: Mapped[dt.datetime] = _now()


class ActivationRow(Base):
    """Which version of a bundle serves a tenant: the newest row counts, none is ever changed."""

    __tablename__ = "activations"
    __table_args__ = (Index("ix_activations_newest", "tenant", "bundle", "id"),)

    id: Mapped[int] = _key()
    tenant: Mapped[str]
    bundle: Mapped[str]
    version: Mapped[str]
    calibration_id: Mapped[str]
    weights_sha256: Mapped[str]
    manifest_sha256: Mapped[str]
    folder: Mapped[str]  # under data_dir/models
    action: Mapped[str]  # activate | rollback | baseline: what served by configuration alone
    before_id: Mapped[int | None] = mapped_column(
        ForeignKey("activations.id")
    )  # where a rollback leads
    actor: Mapped[str]
    at: Mapped[dt.datetime] = _now()


class BundleRow(Base):
    """How a version presents itself where there is no finding to say it; inference keeps it."""

    __tablename__ = "bundles"

    name: Mapped[str] = mapped_column(primary_key=True)
    folder: Mapped[str] = mapped_column(
        primary_key=True, server_default=""
    )  # as analyses.bundle_folder
    model: Mapped[dict[str, Any]]  # db.result.ModelIdentity
    output: Mapped[dict[str, Any]]  # db.result.OutputSpec
    at: Mapped[dt.datetime] = _now()


class JobRow(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        # At most one waiting job per analysis and kind: the database holds this, not code.
        Index(
            "uq_jobs_waiting",
            "analysis_id",
            "kind",
            unique=True,
            postgresql_where=text("state = 'TODO'"),
        ),
        Index(
            "ix_jobs_claim", "kind", "lane", "run_after", postgresql_where=text("state = 'TODO'")
        ),
        Index("ix_jobs_lease", "lease_until", postgresql_where=text("state = 'DOING'")),
    )

    id: Mapped[int] = _key()
    analysis_id: Mapped[int] = mapped_column(ForeignKey("analyses.id", ondelete="CASCADE"))
    tenant: Mapped[str]
    origin: Mapped[str]
    kind: Mapped[str]  # db.job.JobKind
    state: Mapped[str] = mapped_column(server_default="TODO")  # db.job.JobState
    lane: Mapped[int] = mapped_column(Integer)
    analysis_version: Mapped[int]  # analyses.row_version it was made for; an older job is void
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    crashes: Mapped[int] = mapped_column(
        Integer, server_default="0"
    )  # alone on the device; three are enough
    run_after: Mapped[dt.datetime] = _now()
    worker: Mapped[str] = mapped_column(server_default="")
    lease_until: Mapped[dt.datetime | None]
    error_code: Mapped[str] = mapped_column(server_default="")
    created_at: Mapped[dt.datetime] = _now()
    finished_at: Mapped[dt.datetime | None]


class ObjectRow(Base):
    """A DICOM object we built; the same bytes are sent on every try."""

    __tablename__ = "objects"
    __table_args__ = (UniqueConstraint("result_id", "variant", "sop_instance_uid"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    result_id: Mapped[uuid.UUID] = mapped_column(index=True)  # of a result, notice or withdrawal
    analysis_id: Mapped[int] = mapped_column(
        ForeignKey("analyses.id", ondelete="CASCADE"), index=True
    )
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"), index=True)
    tenant: Mapped[str]
    origin: Mapped[str]
    variant: Mapped[str]  # what differs per destination; "" is the plain one
    role: Mapped[str]  # summary | overlay | pm | sr | ko, in sending order; or rejection
    seq: Mapped[int] = mapped_column(Integer)  # order on the association
    sop_class_uid: Mapped[str]
    sop_instance_uid: Mapped[str] = mapped_column(index=True)
    series_instance_uid: Mapped[str]
    transfer_syntax_uid: Mapped[str]
    sha256: Mapped[str]
    size_bytes: Mapped[int]
    at: Mapped[dt.datetime] = _now()


class DeliveryRow(Base):
    """The outbox: one row per result, notice or withdrawal, and destination."""

    __tablename__ = "deliveries"
    __table_args__ = (
        UniqueConstraint("result_id", "destination"),
        Index(
            "ix_deliveries_due",
            "tenant",
            "destination",
            postgresql_where=text("state IN ('WAITING', 'SENDING')"),
        ),
    )

    id: Mapped[int] = _key()
    result_id: Mapped[uuid.UUID]  # of a result, notice or withdrawal
    analysis_id: Mapped[int] = mapped_column(
        ForeignKey("analyses.id", ondelete="CASCADE"), index=True
    )
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"), index=True)
    tenant: Mapped[str]
    origin: Mapped[str]
    destination: Mapped[str]  # the name in the configuration
    variant: Mapped[str] = mapped_column(server_default="")
    state: Mapped[str] = mapped_column(server_default="WAITING")  # db.outbox.DeliveryState
    lane: Mapped[int] = mapped_column(Integer)
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    refusals: Mapped[int] = mapped_column(Integer, server_default="0")  # five of them end it
    statuses: Mapped[dict[str, Any]] = mapped_column(
        server_default="{}"
    )  # SOP Instance UID -> last answer
    run_after: Mapped[dt.datetime] = _now()
    expires_at: Mapped[dt.datetime]
    worker: Mapped[str] = mapped_column(server_default="")
    lease_until: Mapped[dt.datetime | None]
    error_code: Mapped[str] = mapped_column(server_default="")
    created_at: Mapped[dt.datetime] = _now()
    finished_at: Mapped[dt.datetime | None]


class CommitmentRow(Base):
    """A destination is to vouch for what a delivery brought it (PS3.4 Annex J)."""

    __tablename__ = "commitments"
    __table_args__ = (
        Index("ix_commitments_transaction", "transaction_uid"),
        Index(
            "ix_commitments_open",
            "tenant",
            "destination",
            postgresql_where=text("state IN ('WANTED', 'ASKED')"),
        ),
    )

    id: Mapped[int] = _key()
    delivery_id: Mapped[int] = mapped_column(
        ForeignKey("deliveries.id", ondelete="CASCADE"), index=True
    )
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"), index=True)
    tenant: Mapped[str]
    origin: Mapped[str]
    destination: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="WANTED")  # db.commitment.CommitmentState
    items: Mapped[dict[str, Any]]  # SOP Instance UID -> SOP Class UID
    transaction_uid: Mapped[str] = mapped_column(server_default="")  # of the newest request
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    run_after: Mapped[dt.datetime] = _now()
    failed: Mapped[dict[str, Any]] = mapped_column(server_default="{}")  # UID -> reason
    error_code: Mapped[str] = mapped_column(server_default="")
    created_at: Mapped[dt.datetime] = _now()
    asked_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]


class PledgeRow(Base):
    """What we answer to a sender that asked for storage commitment."""

    __tablename__ = "pledges"
    __table_args__ = (
        Index("ix_pledges_due", "run_after", postgresql_where=text("state = 'WAITING'")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)  # of the request in the spool
    tenant: Mapped[str]
    sender: Mapped[str]  # its AE title
    called_ae: Mapped[str]
    address: Mapped[str]
    answer: Mapped[dict[str, Any]]  # db.transaction.Transaction: the same on every try
    state: Mapped[str] = mapped_column(server_default="WAITING")  # db.pledges.PledgeState
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    run_after: Mapped[dt.datetime] = _now()
    expires_at: Mapped[dt.datetime]
    error_code: Mapped[str] = mapped_column(server_default="")
    created_at: Mapped[dt.datetime] = _now()
    finished_at: Mapped[dt.datetime | None]


class DestinationRow(Base):
    """Back-off belongs to the destination: its first success releases all that waits for it."""

    __tablename__ = "destinations"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    failures: Mapped[int] = mapped_column(Integer, server_default="0")
    retry_at: Mapped[dt.datetime] = _now()
    last_success_at: Mapped[dt.datetime | None]
    last_error: Mapped[str] = mapped_column(server_default="")


class SenderRow(Base):
    """Who sends to a tenant, and when last."""

    __tablename__ = "senders"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    ae_title: Mapped[str] = mapped_column(primary_key=True)
    n_instances: Mapped[int] = mapped_column(server_default="0")
    last_seen_at: Mapped[dt.datetime] = _now()


class EventRow(Base):
    """The timeline: every move, refusal and delivery."""

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_study", "study_id", "id"),
        Index("ix_events_at", "tenant", "at"),
    )

    id: Mapped[int] = _key()
    tenant: Mapped[str]
    origin: Mapped[str]
    study_id: Mapped[int | None] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    analysis_id: Mapped[int | None] = mapped_column(ForeignKey("analyses.id", ondelete="CASCADE"))
    kind: Mapped[str]  # constant snake_case past-tense fact
    detail: Mapped[dict[str, Any]] = mapped_column(server_default="{}")  # no patient data
    is_alarm: Mapped[bool] = mapped_column(server_default=text("false"))
    at: Mapped[dt.datetime] = _now()


class RequestRow(Base):
    """What an operator asked for on a page; the node's own loops carry it out."""

    __tablename__ = "requests"
    __table_args__ = (Index("ix_requests_open", "at", postgresql_where=text("done_at IS NULL")),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    tenant: Mapped[str]
    origin: Mapped[str]
    analysis_id: Mapped[int] = mapped_column(ForeignKey("analyses.id", ondelete="CASCADE"))
    action: Mapped[str]  # rerun | resend
    user_name: Mapped[str]
    at: Mapped[dt.datetime] = _now()
    done_at: Mapped[dt.datetime | None]
    outcome: Mapped[str] = mapped_column(server_default="")


class ProcessRow(Base):
    """A stage process that reports itself alive: for status, health and the supervisor's page."""

    __tablename__ = "processes"

    name: Mapped[str] = mapped_column(primary_key=True)  # host/stage/pid
    stage: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    started_at: Mapped[dt.datetime] = _now()
    seen_at: Mapped[dt.datetime] = _now()


class UserRow(Base):
    __tablename__ = "users"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]  # admin | manager | reader | uploader
    tenant: Mapped[str | None]  # None for admins: all tenants
    password_hash: Mapped[str] = mapped_column(
        server_default=""
    )  # Argon2id; empty until set by link
    is_disabled: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[dt.datetime] = _now()


class SessionRow(Base):
    """A signed-in browser; the cookie holds a random token, the row its SHA-256."""

    __tablename__ = "sessions"

    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), index=True
    )
    csrf: Mapped[str]
    created_at: Mapped[dt.datetime] = _now()
    seen_at: Mapped[dt.datetime] = _now()
    expires_at: Mapped[dt.datetime]


class LoginLinkRow(Base):
    """A one-time link: first start, demo, and passwords that an administrator resets."""

    __tablename__ = "login_links"

    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    expires_at: Mapped[dt.datetime]
    used_at: Mapped[dt.datetime | None]


class AuditRow(Base):
    """Append-only: who did or saw what, written in the transaction of what it records."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_at", "tenant", "at"),)

    id: Mapped[int] = _key()
    at: Mapped[dt.datetime] = _now()
    tenant: Mapped[str] = mapped_column(server_default="")
    actor: Mapped[str]  # user name, AE title, or "node"
    action: Mapped[str]
    target: Mapped[str] = mapped_column(server_default="")  # public ids only
    outcome: Mapped[str] = mapped_column(server_default="ok")
    detail: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
