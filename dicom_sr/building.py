"""Findings and notices to stored objects and outbox rows: what BUILD and NOTICE jobs do."""

import datetime as dt
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from config.settings import Settings
from config.tenants import Destination, Tenant
from db import notices, outbox, queue, results, studies
from db.errors import NodeError, PermanentError, TransientError
from db.faults import point
from db.job import JobKind
from db.process import Stop
from db.shares import Shares
from db.study import AnalysisEvent
from dicom_sr.assemble import Assembler
from dicom_sr.inputs import Subject
from dicom_sr.lease import Lease
from dicom_sr.recording import NEVER, is_away, record

log = structlog.get_logger()

LEASE_S = 30.0  # renewed while the builder lives
KINDS = (JobKind.BUILD, JobKind.NOTICE)
#: Uploads stay on the node: the PACS has no such study, and must not be given a part of one.
DELIVERED_ORIGIN = "dicom"


class BuildCrashed(TransientError):
    """A builder raised what it should not: a bug, tried again a few times and then shown."""

    code: ClassVar[str] = "build_crashed"


class NoResult(PermanentError):
    """The analysis has no numbers to build objects from."""

    code: ClassVar[str] = "no_result"


class Builder:
    """Claims BUILD and NOTICE jobs, one at a time."""

    def __init__(
        self, engine: Engine, settings: Settings, assembler: Assembler, worker: str
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._assembler = assembler
        self._worker = worker
        self._shares = Shares(settings.tenants)

    def build_once(self, stop: Stop = NEVER) -> bool:
        """Build the objects of one result or notice; False where no job is due.

        What came of it is written down even if the database is away meanwhile, until `stop`.
        """
        with Session(self._engine) as session, session.begin():
            job = queue.claim(session, KINDS, self._worker, lease_s=LEASE_S, shares=self._shares)
        if job is None:
            return False
        point("build_claimed")
        with (
            structlog.contextvars.bound_contextvars(tenant=job.tenant, job_id=job.id),
            Lease(self._engine, partial(_renew, job), lease_s=LEASE_S),
        ):
            self._try(job, stop)
        return True

    def _try(self, job: queue.ClaimedJob, stop: Stop) -> None:
        """However it ends, the job is not left to its lease."""
        try:
            work = self._build if job.kind is JobKind.BUILD else self._notify
            work(job, stop)
        except NodeError as error:
            self._record_failure(job, error, stop)
        except Exception as error:
            if is_away(error):
                record(self._engine, lambda session: queue.release(session, job), stop)
            else:
                # The worker loop records it and goes on; here it is one of this job's tries.
                self._record_failure(job, BuildCrashed(type(error).__name__), stop)
            raise

    def _build(self, job: queue.ClaimedJob, stop: Stop) -> None:
        with Session(self._engine) as session:
            analysis = queue.analysis_of(session, job)
            result = results.latest(session, analysis.id)
            if result is None:
                raise NoResult("the analysis has no result to build objects from")
            subject = self._assembler.subject(session, result.id)
            owed = [] if analysis.is_shadow else self._owed(subject.tenant, subject.origin)
        keys = self._ensure(subject, owed, is_shadow=analysis.is_shadow)
        pairs = _pairs(owed, keys)

        def conclude(session: Session) -> None:
            studies.lock(session, job.study_id)
            analysis = queue.analysis_of(session, job)
            outbox.enqueue(session, analysis, subject.result_id, pairs)
            studies.move(session, analysis, AnalysisEvent.OBJECTS_BUILT)
            queue.finish(session, job)
            outbox.settle(session, analysis.id)  # with no destination it is delivered by now
            point("build_concluded")

        record(self._engine, conclude, stop)
        point("build_committed")
        log.info("result_built", analysis_id=job.analysis_id, n=len(pairs))

    def _notify(self, job: queue.ClaimedJob, stop: Stop) -> None:
        """Say that there is no result, to whom that is to be said."""
        owed = [pair for pair in self._owed(job.tenant, job.origin) if pair[1].send.not_processed]
        if not owed:
            record(self._engine, lambda session: queue.finish(session, job), stop)
            return
        with Session(self._engine) as session, session.begin():
            wait = notices.rest_of_wait(session, job, owed[0][0].max_wait_s)
            if wait > dt.timedelta(0):
                queue.put_off(session, job, wait)
                return
        subject = self._assembler.notice(job)
        point("notice_drawn")
        pairs = _pairs(owed, self._ensure(subject, owed, is_shadow=False))

        def conclude(session: Session) -> None:
            studies.lock(session, job.study_id)
            analysis = queue.analysis_of(session, job)
            outbox.enqueue(session, analysis, subject.result_id, pairs)
            _record_notice(session, analysis, subject.result_no)
            queue.finish(session, job)

        record(self._engine, conclude, stop)
        log.info("notice_built", analysis_id=job.analysis_id, n=len(pairs))

    def _owed(self, name: str, origin: str) -> list[tuple[Tenant, Destination]]:
        tenant = self._settings.tenant(name)
        if tenant is None or origin != DELIVERED_ORIGIN:
            return []
        return [(tenant, destination) for destination in tenant.destinations]

    def _ensure(
        self, subject: Subject, owed: Sequence[tuple[Tenant, Destination]], *, is_shadow: bool
    ) -> list[str]:
        """Build what the destinations get; returns each one's variant."""
        with Session(self._engine) as session:
            variants = [self._assembler.variant(session, subject, *pair) for pair in owed]
        tenant = self._settings.tenant(subject.tenant)
        if not variants and tenant is not None and not is_shadow:
            self._assembler.ensure(subject, [self._assembler.plain(subject, tenant)])
        self._assembler.ensure(subject, variants)
        return [variant.key for variant in variants]

    def _record_failure(self, job: queue.ClaimedJob, error: NodeError, stop: Stop) -> None:
        record(self._engine, lambda session: queue.fail(session, job, error), stop)
        level = log.error if isinstance(error, PermanentError) else log.warning
        level("build_failed", analysis_id=job.analysis_id, exc_code=error.code)


def _renew(job: queue.ClaimedJob, session: Session) -> bool:
    return queue.renew(session, [job.id], job.worker, lease_s=LEASE_S) == 1


def _pairs(
    owed: Sequence[tuple[Tenant, Destination]], keys: Sequence[str]
) -> list[tuple[Destination, str]]:
    return [(destination, key) for (_, destination), key in zip(owed, keys, strict=True)]


def _record_notice(session: Session, analysis: studies.Analysis, result_no: int) -> None:
    studies.record(
        session,
        "notice_built",
        tenant=analysis.tenant,
        origin=analysis.origin,
        study_id=analysis.study_id,
        analysis_id=analysis.id,
        bundle=analysis.bundle,
        result_no=result_no,
    )
