"""Stored objects to one destination: what the outbox owes it, the same bytes each time."""

import ssl
from dataclasses import replace
from typing import ClassVar

import structlog
from sqlalchemy import Engine, exists, select, update
from sqlalchemy.orm import Session, aliased

from config.settings import ScpSettings, Settings
from config.tenants import Destination, Tenant
from db import outbox
from db.describe import describe
from db.errors import NodeError, PermanentError
from db.outbox import ClaimedDelivery
from db.sandbox import Sandbox
from db.tables import DeliveryRow, ObjectRow, ResultRow, StudyRow
from dicom_sr.assemble import Assembler
from dicom_sr.inputs import READ_TIMEOUT_S, Subject
from dicom_sr.plan import REPORT
from dicom_sr.push import Answer, Delivery, Outcome, Parcel, Peer, is_delivered, push

log = structlog.get_logger()

#: Longer than any association may take: ten objects, each answered at the last moment.
SEND_LEASE_S = 900.0
OTHER_PATIENT = "study_changed"


class ObjectsGone(PermanentError):
    """Stored objects are missing that were sent in part: they cannot be the same bytes again."""

    code: ClassVar[str] = "objects_gone"


class Sender:
    """Sends what is due to one destination."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        assembler: Assembler,
        sandbox: Sandbox,
        worker: str,
        tenant: Tenant,
        destination: Destination,
    ) -> None:
        self._engine = engine
        self._assembler = assembler
        self._sandbox = sandbox
        self._worker = worker
        self._tenant = tenant
        self._destination = destination
        self._peer = peer_of(tenant, destination, settings.scp)

    def send_once(self) -> bool:
        """Send what is due next; False where nothing is."""
        tenant, destination = self._tenant.id, self._destination.name
        with Session(self._engine) as session, session.begin():
            delivery = outbox.claim_due(
                session, tenant, destination, self._worker, lease_s=SEND_LEASE_S
            )
        if delivery is None:
            return False
        with structlog.contextvars.bound_contextvars(
            tenant=tenant, destination=destination, delivery_id=delivery.id
        ):
            try:
                self._deliver(delivery)
            except NodeError as error:
                self._not_prepared(delivery, error)
        return True

    def _deliver(self, delivery: ClaimedDelivery) -> None:
        with Session(self._engine) as session:
            subject = self._assembler.subject(session, delivery.result_id)
        if not delivery.statuses:
            delivery = self._up_to_date(delivery, subject)
        with Session(self._engine) as session:
            parcels = self._parcels(session, delivery, subject)
            # As it is now: held, corrected or gone since the objects were built?
            study = session.get_one(StudyRow, delivery.study_id)
        if study.is_held:
            with Session(self._engine) as session, session.begin():
                outbox.release(session, delivery)
        elif parcels and not self._is_about(parcels[0], study):
            with Session(self._engine) as session, session.begin():
                outbox.withhold(session, delivery, error_code=OTHER_PATIENT)
            log.error("delivery_withheld", reason_code=OTHER_PATIENT)
        else:
            self._record(delivery, push(self._peer, parcels) if parcels else Delivery({}))

    def _up_to_date(self, delivery: ClaimedDelivery, subject: Subject) -> ClaimedDelivery:
        """Before anything is sent: name as replaced what the destination has accepted by now.

        An older result may have been under way there when this one was built.
        """
        older = aliased(DeliveryRow)
        finished_later = exists().where(
            older.analysis_id == delivery.analysis_id,
            older.destination == delivery.destination,
            older.id < delivery.id,
            older.finished_at > ResultRow.at,
        )
        with Session(self._engine) as session:
            is_late = session.scalar(
                select(ResultRow.id).where(ResultRow.id == delivery.result_id, finished_later)
            )
            if is_late is None:
                return delivery
            variant = self._assembler.variant(session, subject, self._tenant, self._destination)
        self._assembler.ensure(subject, [variant])
        with Session(self._engine) as session, session.begin():
            session.execute(
                update(DeliveryRow).where(DeliveryRow.id == delivery.id).values(variant=variant.key)
            )
        return replace(delivery, variant=variant.key)

    def _parcels(
        self, session: Session, delivery: ClaimedDelivery, subject: Subject
    ) -> tuple[Parcel, ...]:
        """The objects that the destination does not have yet, in sending order."""
        had = {uid for uid, code in delivery.statuses.items() if is_delivered(code)}
        rows = session.scalars(
            select(ObjectRow)
            .where(ObjectRow.result_id == delivery.result_id, ObjectRow.variant == delivery.variant)
            .order_by(ObjectRow.seq)
        ).all()
        has_report = any(row.role == REPORT and row.sop_instance_uid in had for row in rows)
        due = [
            Parcel(
                role=row.role,
                sop_class_uid=row.sop_class_uid,
                sop_instance_uid=row.sop_instance_uid,
                transfer_syntax_uid=row.transfer_syntax_uid,
                path=self._assembler.path(subject, row.sop_instance_uid),
            )
            for row in rows
            if row.sop_instance_uid not in had and not (row.role == REPORT and has_report)
        ]
        if not all(parcel.path.is_file() for parcel in due):
            raise ObjectsGone("a stored object is missing")
        return tuple(due)

    def _is_about(self, parcel: Parcel, study: StudyRow) -> bool:
        """Whether the object still names the patient and study that the row names now (H8)."""
        path = str(parcel.path.resolve())  # the child runs in another folder
        told, _ = self._sandbox.run(describe, path, timeout_s=READ_TIMEOUT_S)
        same_study: bool = told["header"]["study_instance_uid"] == study.study_instance_uid
        return same_study and is_same_patient(told["patient"], study)

    def _record(self, delivery: ClaimedDelivery, sent: Delivery) -> None:
        answers = list(sent.answers.values())
        refused = [one.code for one in answers if one.outcome is Outcome.REFUSED]
        statuses = dict(delivery.statuses)
        statuses |= {uid: answer.code for uid, answer in sent.answers.items()}
        with Session(self._engine) as session, session.begin():
            if sent.error:
                outbox.postpone(session, delivery, statuses, error_code=sent.error)
            elif refused:
                outbox.refuse(session, delivery, statuses, error_code=refused[0])
            else:
                outbox.accept(session, delivery, statuses)
        outcome = sent.error or (refused[0] if refused else "delivered")
        log.info("delivery_tried", outcome=outcome, n_objects=len(answers))
        _warn(answers)

    def _not_prepared(self, delivery: ClaimedDelivery, error: NodeError) -> None:
        """A full disk passes; what is lost or unreadable stays so."""
        with Session(self._engine) as session, session.begin():
            if isinstance(error, PermanentError):
                outbox.withhold(session, delivery, error_code=error.code)
            else:
                outbox.postpone(session, delivery, delivery.statuses, error_code=error.code)
        log.error("delivery_not_prepared", exc_code=error.code)


def _warn(answers: list[Answer]) -> None:
    for answer in answers:
        if answer.outcome is Outcome.WARNING:
            log.warning("object_accepted_with_warning", status=answer.code)


def is_same_patient(told: dict[str, str], study: StudyRow) -> bool:
    """The rule of DESIGN 4: equal IDs, and equal issuers where both are stated.

    Without an ID the name must do: a blank ID says nothing of who it is.
    """
    issuers = {told["issuer_of_patient_id"], study.issuer_of_patient_id} - {""}
    if told["patient_id"] != study.patient_id or len(issuers) > 1:
        return False
    return bool(study.patient_id) or told["patient_name"] == study.patient_name


def peer_of(tenant: Tenant, destination: Destination, scp: ScpSettings) -> Peer:
    return Peer(
        host=destination.host,
        port=destination.port,
        ae_title=destination.ae_title,
        calling_ae=tenant.calling_ae(destination),
        tls=_tls(scp) if destination.tls else None,
    )


def _tls(scp: ScpSettings) -> ssl.SSLContext:
    """The peer's certificate is always verified; ours is the one that our listener shows."""
    context = ssl.create_default_context(cafile=scp.tls_ca or None)
    if scp.tls_cert:
        context.load_cert_chain(scp.tls_cert, scp.tls_key)
    return context
