"""Stored objects to one destination: what the outbox owes it, the same bytes each time."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import structlog
from sqlalchemy import Engine, select, union
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, aliased

from config.settings import Settings
from config.tenants import Destination, Tenant
from db import claims, dispatch
from db.claims import ClaimedDelivery
from db.describe import describe
from db.errors import NodeError, PermanentError, StaleAnalysis, TransientError
from db.identity import is_same_patient
from db.process import Stop
from db.sandbox import Sandbox
from db.tables import DeliveryRow, NoticeRow, ObjectRow, ResultRow, StudyRow
from dicom_sr.assemble import Assembler
from dicom_sr.association import peer_of
from dicom_sr.inputs import READ_TIMEOUT_S, Subject
from dicom_sr.lease import Lease
from dicom_sr.plan import REPORT
from dicom_sr.push import Answer, Delivery, Outcome, Parcel, is_delivered, push
from dicom_sr.recording import NEVER, record

log = structlog.get_logger()

OTHER_PATIENT = "study_changed"


class SendingCrashed(TransientError):
    """Sending raised what it should not: a bug, tried again until the delivery expires."""

    code: ClassVar[str] = "sending_crashed"


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

    def send_once(self, stop: Stop = NEVER) -> bool:
        """Send what is due next; False where nothing is.

        What came of it is written down even if the database is away meanwhile, until `stop`.
        """
        tenant, destination = self._tenant.id, self._destination.name
        with Session(self._engine) as session, session.begin():
            delivery = claims.claim_due(session, tenant, destination, self._worker)
        if delivery is None:
            return False
        with structlog.contextvars.bound_contextvars(
            tenant=tenant, destination=destination, delivery_id=delivery.id
        ):
            try:
                with Lease(self._engine, partial(claims.renew, delivery=delivery)) as lease:
                    self._try(delivery, lease, stop)
            except StaleAnalysis:
                log.warning("delivery_taken_over")
        return True

    def _try(self, delivery: ClaimedDelivery, lease: Lease, stop: Stop) -> None:
        """However it ends, the delivery is not left to its lease."""
        try:
            self._deliver(delivery, lease, stop)
        except StaleAnalysis:
            raise
        except NodeError as error:
            self._not_prepared(delivery, error, stop)
        except OperationalError:
            self._record(lambda session: dispatch.release(session, delivery), stop)
            raise
        except Exception as error:
            # The worker loop records it and goes on; here it is one of this delivery's tries, so
            # that it waits longer each time and ends, while the others go their way.
            self._not_prepared(delivery, SendingCrashed(type(error).__name__), stop)
            raise

    def _deliver(self, delivery: ClaimedDelivery, lease: Lease, stop: Stop) -> None:
        with Session(self._engine) as session:
            subject = self._assembler.subject(session, delivery.result_id)
        if not delivery.statuses:
            delivery = self._up_to_date(delivery, subject)
        with Session(self._engine) as session:
            parcels = self._parcels(session, delivery, subject)
            # As it is now: held, corrected or gone since the objects were built?
            study = session.get_one(StudyRow, delivery.study_id)
        if study.is_held:
            self._record(lambda session: dispatch.release(session, delivery), stop)
        elif parcels and not self._is_about(parcels[0], study):
            self._record(
                lambda session: dispatch.withhold(session, delivery, error_code=OTHER_PATIENT), stop
            )
            log.error("delivery_withheld", reason_code=OTHER_PATIENT)
        else:
            sent = push(self._peer, parcels, lease.is_held) if parcels else Delivery({})
            self._conclude(delivery, sent, stop)

    def _up_to_date(self, delivery: ClaimedDelivery, subject: Subject) -> ClaimedDelivery:
        """Before anything is sent: name as replaced what the destination has accepted by now.

        An older result may have been under way there when this one was built.
        """
        older, result_id = aliased(DeliveryRow), delivery.result_id
        # Persisted before anything was built: what was finished by then is in the objects.
        at = union(
            select(ResultRow.at).where(ResultRow.id == result_id),
            select(NoticeRow.at).where(NoticeRow.id == result_id),
        ).scalar_subquery()
        finished_later = select(older.id).where(
            older.analysis_id == delivery.analysis_id,
            older.destination == delivery.destination,
            older.id < delivery.id,
            older.finished_at > at,
        )
        with Session(self._engine) as session:
            is_late = session.scalar(finished_later.limit(1))
            if is_late is None:
                return delivery
            variant = self._assembler.variant(session, subject, self._tenant, self._destination)
        self._assembler.ensure(subject, [variant])
        with Session(self._engine) as session, session.begin():
            return dispatch.revise(session, delivery, variant.key)

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
                sha256=row.sha256,
            )
            for row in rows
            if row.sop_instance_uid not in had and not (row.role == REPORT and has_report)
        ]
        for parcel in due:  # all or none: before the first is sent
            parcel.read()
        return tuple(due)

    def _is_about(self, parcel: Parcel, study: StudyRow) -> bool:
        """Whether the object still names the patient and study that the row names now (H8)."""
        path = str(parcel.path.resolve())  # the child runs in another folder
        told, _ = self._sandbox.run(describe, path, timeout_s=READ_TIMEOUT_S)
        same_study: bool = told["header"]["study_instance_uid"] == study.study_instance_uid
        return same_study and is_same_patient(told["patient"], _patient_of(study))

    def _conclude(self, delivery: ClaimedDelivery, sent: Delivery, stop: Stop) -> None:
        answers = list(sent.answers.values())
        refused = [one.code for one in answers if one.outcome is Outcome.REFUSED]
        statuses = dict(delivery.statuses)
        statuses |= {uid: answer.code for uid, answer in sent.answers.items()}

        def conclude(session: Session) -> None:
            if sent.error:
                dispatch.postpone(session, delivery, statuses, error_code=sent.error)
            elif refused:
                dispatch.refuse(session, delivery, statuses, error_code=refused[0])
            else:
                dispatch.accept(session, delivery, statuses)

        self._record(conclude, stop)
        outcome = sent.error or (refused[0] if refused else "delivered")
        log.info("delivery_tried", outcome=outcome, n_objects=len(answers))
        _warn(answers)

    def _not_prepared(self, delivery: ClaimedDelivery, error: NodeError, stop: Stop) -> None:
        """A full disk passes; what is lost or unreadable stays so."""

        def conclude(session: Session) -> None:
            if isinstance(error, PermanentError):
                dispatch.withhold(session, delivery, error_code=error.code)
            else:
                dispatch.postpone(session, delivery, delivery.statuses, error_code=error.code)

        self._record(conclude, stop)
        log.error("delivery_not_prepared", exc_code=error.code)

    def _record(self, write: Callable[[Session], None], stop: Stop) -> None:
        record(self._engine, write, stop)


def _warn(answers: list[Answer]) -> None:
    for answer in answers:
        if answer.outcome is Outcome.WARNING:
            log.warning("object_accepted_with_warning", status=answer.code)


def _patient_of(study: StudyRow) -> dict[str, str]:
    return {
        "patient_id": study.patient_id,
        "issuer_of_patient_id": study.issuer_of_patient_id,
        "patient_name": study.patient_name,
        "patient_birth_date": study.patient_birth_date,
    }
