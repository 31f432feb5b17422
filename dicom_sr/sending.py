"""Stored objects to one destination: what the outbox owes it, the same bytes each time."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import structlog
from sqlalchemy import Engine, select, union
from sqlalchemy.exc import DBAPIError, NoResultFound
from sqlalchemy.orm import Session, aliased

from config.settings import Settings
from config.tenants import Destination, Tenant
from db import claims, commitment, dispatch, reach, replaced
from db.answers import is_delivered, is_due
from db.claims import ClaimedDelivery
from db.errors import NodeError, PermanentError, StaleAnalysis, TransientError
from db.faults import point
from db.notices import Notice
from db.process import Stop
from db.sandbox import Sandbox
from db.tables import DeliveryRow, NoticeRow, ObjectRow, ResultRow
from dicom_sr import fit
from dicom_sr.assemble import Assembler
from dicom_sr.association import echo, peer_of
from dicom_sr.inputs import Subject
from dicom_sr.lease import Lease
from dicom_sr.plan import REPORT
from dicom_sr.push import STOPPED, Answer, Delivery, Outcome, Parcel, push
from dicom_sr.recording import NEVER, is_away, record

log = structlog.get_logger()

#: After the last object: the release, the hanging up, the writing down.
ENDING_S = 120.0


#: So often a destination that is away is asked whether it is back.
ASK_S = 30.0


class SendingCrashed(TransientError):
    """Sending raised what it should not: a bug, tried again until the delivery expires."""

    code: ClassVar[str] = "sending_crashed"


class ResultGone(PermanentError):
    """Nothing is known of the result or notice that is owed: its row was deleted."""

    code: ClassVar[str] = "result_gone"


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
        self._ask_at = 0.0  # monotonic

    def send_once(self, stop: Stop = NEVER) -> bool:
        """Send what is due next; False where nothing is.

        What came of it is written down even if the database is away meanwhile, until `stop`.
        """
        tenant, destination = self._tenant.id, self._destination.name
        with Session(self._engine) as session, session.begin():
            delivery = claims.claim_due(session, tenant, destination, self._worker)
        if delivery is None:
            return False
        point("delivery_claimed")
        with structlog.contextvars.bound_contextvars(
            tenant=tenant, destination=destination, delivery_id=delivery.id
        ):
            try:
                renew = partial(claims.renew, delivery=delivery)
                with Lease(self._engine, renew, lease_s=claims.LEASE_S) as lease:
                    self._try(delivery, lease, stop)
            except StaleAnalysis:
                log.warning("delivery_taken_over")
        return True

    def ask_once(self) -> bool:
        """Whether the destination, away so far, answers a C-ECHO: then what waits may go.

        The back-off spares it our objects; an echo every half minute is no burden, and it must not
        be back for a quarter of an hour before a result reaches it.
        """
        tenant, destination = self._tenant.id, self._destination.name
        if time.monotonic() < self._ask_at:
            return False
        self._ask_at = time.monotonic() + ASK_S
        with Session(self._engine) as session:
            if not reach.is_missed(session, tenant, destination):
                return False
        if echo(self._peer):
            return False
        with Session(self._engine) as session, session.begin():
            reach.is_back(session, tenant, destination)
        log.info("destination_is_back", tenant=tenant, destination=destination)
        return True

    def _try(self, delivery: ClaimedDelivery, lease: Lease, stop: Stop) -> None:
        """However it ends, the delivery is not left to its lease."""
        try:
            self._deliver(delivery, lease, stop)
        except StaleAnalysis:
            raise
        except NodeError as error:
            self._not_prepared(delivery, error, stop)
        except Exception as error:
            if is_away(error):
                self._record(lambda session: dispatch.release(session, delivery), stop)
            else:
                # The worker loop records it and goes on; here it is one of this delivery's tries,
                # so that it waits longer each time and ends, while the others go their way.
                self._not_prepared(delivery, SendingCrashed(type(error).__name__), stop)
            raise

    def _deliver(self, delivery: ClaimedDelivery, lease: Lease, stop: Stop) -> None:
        subject = self._subject(delivery)
        if delivery.is_rejection:
            delivery = self._with_notes(delivery, subject)
        elif not any(map(is_delivered, delivery.statuses.values())):
            delivery = self._up_to_date(delivery, subject)
        with Session(self._engine) as session:
            parcels = self._parcels(session, delivery, subject)
            is_hindered = dispatch.is_hindered(session, delivery)
        if is_hindered:
            self._record(lambda session: dispatch.release(session, delivery), stop)
        elif delivery.is_rejection and not delivery.variant:  # nothing ever arrived there
            self._record(lambda session: dispatch.drop(session, delivery), stop)
        elif why := self._why_not(delivery, subject, parcels):
            self._record(lambda session: dispatch.withhold(session, delivery, error_code=why), stop)
            log.error("delivery_withheld", reason_code=why)
        elif not self._is_over(delivery):
            sent = Delivery({})
            if parcels:
                sent = self._push(delivery, parcels, fit.images_of(subject), lease, stop)
            self._conclude(delivery, sent, stop)

    def _why_not(
        self, delivery: ClaimedDelivery, subject: Subject, parcels: Sequence[Parcel]
    ) -> str:
        """Why it must not go, as its study is now; a rejection note need not fit that."""
        if delivery.is_rejection:
            return ""
        with Session(self._engine) as session:
            return fit.why_not(session, self._sandbox, subject, parcels)

    def _with_notes(self, delivery: ClaimedDelivery, subject: Subject) -> ClaimedDelivery:
        """Build the notes, once: by now all is known that can be of what arrived there."""
        if delivery.variant:
            return delivery
        with Session(self._engine) as session:
            variant = self._assembler.variant(session, subject, self._tenant, self._destination)
        if not variant.rejects:
            return delivery
        self._assembler.ensure(subject, [variant])
        with Session(self._engine) as session, session.begin():
            return dispatch.revise(session, delivery, variant.key)

    def _subject(self, delivery: ClaimedDelivery) -> Subject:
        try:
            with Session(self._engine) as session:
                return self._assembler.subject(session, delivery.result_id)
        except NoResultFound:
            raise ResultGone("what is owed has no row any more") from None

    def _is_over(self, delivery: ClaimedDelivery) -> bool:
        """Whether it is a notice of what is being analysed anew: nobody is to get it."""
        with Session(self._engine) as session, session.begin():
            return dispatch.drop_if_over(session, delivery)

    def _push(
        self,
        delivery: ClaimedDelivery,
        parcels: Sequence[Parcel],
        images: Sequence[str],
        lease: Lease,
        stop: Stop,
    ) -> Delivery:
        def may_go_on(uid: str, limit_s: float) -> bool:
            lease.allow(limit_s + ENDING_S)
            return lease.is_held() and not stop.is_set() and self._begin(delivery, images, uid)

        return push(self._peer, parcels, may_go_on, partial(self._note, delivery))

    def _begin(self, delivery: ClaimedDelivery, images: Sequence[str], uid: str) -> bool:
        """Whether the next object may leave; it may not once the study is held, say.

        images : ids of the instances that it rests on

        Where the database is away nobody can tell, and what was begun goes on.
        """
        try:
            with Session(self._engine) as session, session.begin():
                return not replaced.any_of(session, images) and dispatch.begin(
                    session, delivery, uid
                )
        except DBAPIError as error:
            if not is_away(error):
                raise
            log.warning("database_away", exc_type=type(error).__name__)
            return True

    def _note(self, delivery: ClaimedDelivery, uid: str, answer: Answer) -> None:
        """At once, so that nothing is forgotten if this process dies in mid-send.

        Where the database is away, it is written down at the end.
        """
        try:
            with Session(self._engine) as session, session.begin():
                claims.note(session, delivery, {uid: answer.code})
            point("object_noted")
        except DBAPIError as error:
            if not is_away(error):
                raise
            log.warning("database_away", exc_type=type(error).__name__)

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
        try:
            self._assembler.ensure(subject, [variant])
        except PermanentError as error:
            if isinstance(subject.content, Notice):
                raise  # the stored page may deny a result that the destination has by now
            log.warning("delivery_not_brought_up_to_date", exc_code=error.code)
            return delivery  # a finding that names no predecessor is better than none
        with Session(self._engine) as session, session.begin():
            return dispatch.revise(session, delivery, variant.key)

    def _parcels(
        self, session: Session, delivery: ClaimedDelivery, subject: Subject
    ) -> tuple[Parcel, ...]:
        """The objects that the destination lacks, or gets again, in sending order."""
        had = {uid for uid, code in delivery.statuses.items() if is_delivered(code)}
        due = {uid for uid in had if is_due(delivery.statuses[uid])}
        rows = session.scalars(
            select(ObjectRow)
            .where(ObjectRow.result_id == delivery.result_id, ObjectRow.variant == delivery.variant)
            .order_by(ObjectRow.seq)
        ).all()
        has_report = any(row.role == REPORT and row.sop_instance_uid in had for row in rows)
        parcels = [
            Parcel(
                role=row.role,
                sop_class_uid=row.sop_class_uid,
                sop_instance_uid=row.sop_instance_uid,
                transfer_syntax_uid=row.transfer_syntax_uid,
                path=self._assembler.path(subject, row.sop_instance_uid),
                sha256=row.sha256,
            )
            for row in rows
            if row.sop_instance_uid in due
            or (row.sop_instance_uid not in had and not (row.role == REPORT and has_report))
        ]
        for parcel in parcels:  # all or none: before the first is sent
            parcel.read()
        return tuple(parcels)

    def _conclude(self, delivery: ClaimedDelivery, sent: Delivery, stop: Stop) -> None:
        answers = list(sent.answers.values())
        refused = [one.code for one in answers if one.outcome is Outcome.REFUSED]
        codes = {uid: answer.code for uid, answer in sent.answers.items()}

        def conclude(session: Session) -> None:
            if sent.error == STOPPED and (stop.is_set() or dispatch.is_hindered(session, delivery)):
                dispatch.release(session, delivery, codes)
            elif sent.error:
                dispatch.postpone(session, delivery, codes, error_code=sent.error)
            elif refused:
                dispatch.refuse(session, delivery, codes, error_code=refused[0])
                self._want_commitment(session, delivery)
            else:
                dispatch.accept(session, delivery, codes)
                self._want_commitment(session, delivery)
            point("delivery_concluded")

        self._record(conclude, stop)
        point("delivery_committed")
        outcome = sent.error or (refused[0] if refused else "delivered")
        log.info("delivery_tried", outcome=outcome, n_objects=len(answers))
        _warn(answers)

    def _want_commitment(self, session: Session, delivery: ClaimedDelivery) -> None:
        # A rejection note is an instruction: an archive need not keep it.
        if self._destination.commitment and not delivery.is_rejection:
            commitment.want(session, delivery)

    def _not_prepared(self, delivery: ClaimedDelivery, error: NodeError, stop: Stop) -> None:
        """A full disk passes; what is lost or unreadable stays so."""

        def conclude(session: Session) -> None:
            if isinstance(error, PermanentError):
                dispatch.withhold(session, delivery, error_code=error.code)
            else:
                dispatch.postpone(session, delivery, {}, error_code=error.code)

        self._record(conclude, stop)
        log.error("delivery_not_prepared", exc_code=error.code)

    def _record(self, write: Callable[[Session], None], stop: Stop) -> None:
        record(self._engine, write, stop)


def _warn(answers: list[Answer]) -> None:
    for answer in answers:
        if answer.outcome is Outcome.WARNING:
            log.warning("object_accepted_with_warning", status=answer.code)
