"""Claiming jobs: committed before the work starts, kept by a lease, given back by the dead."""

import datetime as dt
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Exists,
    Integer,
    and_,
    case,
    cast,
    exists,
    func,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute, Session

from db import activations, studies
from db.clock import is_past
from db.errors import NodeError, PermanentError, StaleAnalysis, TransientError
from db.job import BACKOFF_MAX_S, MAX_ATTEMPTS, JobKind, JobState, Lane, backoff_s
from db.shares import Shares
from db.study import NEXT_JOB, SETTLED, AnalysisEvent, AnalysisState
from db.tables import AnalysisRow, JobRow, StudyRow

#: Waiting this long lifts a job by one lane, so that routine always moves.
AGEING_S = 900
#: A job whose worker died this often is given up.
MAX_CRASHES = 3
DEFAULT_LEASE_S = 60.0
WORKER_DIED = "worker_died"
#: No job is ever put off for longer, and no lease lasts longer.
_FURTHEST = dt.timedelta(seconds=BACKOFF_MAX_S)


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker has until its lease ends."""

    id: int
    kind: JobKind
    analysis_id: int
    analysis_version: int
    study_id: int
    tenant: str
    origin: str
    lane: int
    attempts: int
    crashes: int
    worker: str
    version: activations.Version  # what serves the tenant at this moment
    is_suspect: bool = False  # its last worker died: run it alone


def is_held() -> ColumnElement[bool]:
    """Of jobs: those that wait for a person's decision, and so are no backlog; see `claim`."""
    return and_(
        JobRow.kind != JobKind.INFER,
        JobRow.state == JobState.TODO,
        exists().where(
            AnalysisRow.id == JobRow.analysis_id,
            StudyRow.id == AnalysisRow.study_id,
            StudyRow.is_held,
        ),
    )


def claim(
    session: Session,
    kinds: Sequence[JobKind],
    worker: str,
    *,
    lease_s: float = DEFAULT_LEASE_S,
    versions: Sequence[activations.Version] | None = None,
    shares: Shares | None = None,
    lanes: Collection[Lane] = tuple(Lane),
) -> ClaimedJob | None:
    """Claim the most urgent job that is due; commit before working on it.

    Lanes first, with ageing; inside a lane whose turn it is by `shares`, which notes the claim. A
    held study's objects are not built. `versions` limits it to analyses that this worker can serve:
    what serves a tenant is read with the job, so that nobody works for it with a version of
    yesterday.
    """
    if versions is not None and not versions:
        return None
    turns = shares.order(JobRow.tenant, JobRow.lane) if shares else ()
    newest = activations.newest()
    folder = activations.folder_that_serves(newest)
    query = (
        select(JobRow, StudyRow.id, AnalysisRow.bundle, folder)
        .join(AnalysisRow, AnalysisRow.id == JobRow.analysis_id)
        .join(StudyRow, StudyRow.id == AnalysisRow.study_id)
        .outerjoin(
            newest,
            and_(newest.c.tenant == JobRow.tenant, newest.c.bundle == AnalysisRow.bundle),
        )
        .where(
            JobRow.state == JobState.TODO,
            JobRow.kind.in_(kinds),
            JobRow.lane.in_(lanes),
            is_past(JobRow.run_after, _FURTHEST),
            or_(JobRow.kind == JobKind.INFER, StudyRow.is_held.is_(False)),
            *([tuple_(AnalysisRow.bundle, folder).in_(versions)] if versions is not None else []),
        )
        .order_by(_aged_lane(), *turns, JobRow.run_after, JobRow.id)
        .limit(1)
        .with_for_update(of=JobRow, skip_locked=True)
    )
    found = session.execute(query).one_or_none()
    if found is None:
        return None
    job, study_id, *version = found
    was_left_by_the_dead = job.error_code == WORKER_DIED
    job.state = JobState.DOING
    job.worker = worker
    job.lease_until = func.now() + dt.timedelta(seconds=lease_s)
    session.flush()
    if shares:
        shares.took(job.tenant, job.lane)
    return ClaimedJob(
        id=job.id,
        kind=JobKind(job.kind),
        analysis_id=job.analysis_id,
        analysis_version=job.analysis_version,
        study_id=study_id,
        tenant=job.tenant,
        origin=job.origin,
        lane=job.lane,
        attempts=job.attempts,
        crashes=job.crashes,
        worker=worker,
        version=activations.Version(*version),
        is_suspect=was_left_by_the_dead,
    )


def _aged_lane() -> ColumnElement[int]:
    waited = func.extract("epoch", func.now() - JobRow.run_after)
    lifted = JobRow.lane - cast(func.floor(waited / literal(AGEING_S)), Integer)
    # Ageing never makes a job more urgent than an emergency that has just arrived.
    return case((JobRow.lane == Lane.STAT, Lane.STAT), else_=func.greatest(lifted, Lane.URGENT))


def analysis_of(session: Session, job: ClaimedJob) -> studies.Analysis:
    """The analysis that a claimed job is for.

    Raises
    ------
    StaleAnalysis
        If it has moved on since the job was made: the job is void.
    """
    analysis = studies.load(session, job.analysis_id)
    if analysis.row_version != job.analysis_version:
        raise StaleAnalysis(f"analysis row {job.analysis_id} is past the job's version")
    return analysis


def renew(session: Session, job_ids: Sequence[int], worker: str, *, lease_s: float) -> int:
    """Heartbeat: keep claimed jobs; returns how many are still this worker's."""
    kept = session.scalars(
        update(JobRow)
        .where(JobRow.id.in_(job_ids), JobRow.worker == worker, JobRow.state == JobState.DOING)
        .values(lease_until=func.now() + dt.timedelta(seconds=lease_s))
        .returning(JobRow.id)
    )
    return len(kept.all())


def finish(session: Session, job: ClaimedJob, *, error_code: str = "") -> None:
    """The job is done; in the transaction of its analysis' move.

    Raises
    ------
    StaleAnalysis
        If its lease ran out and another worker has it now.
    """
    done = session.scalar(
        update(JobRow)
        .where(*_mine(job))
        .values(state=JobState.DONE, error_code=error_code, finished_at=func.now())
        .returning(JobRow.id)
    )
    if done is None:
        raise StaleAnalysis(f"job row {job.id} is another worker's now")


def _mine(job: ClaimedJob) -> tuple[ColumnElement[bool], ...]:
    return JobRow.id == job.id, JobRow.worker == job.worker, JobRow.state == JobState.DOING


def fail(session: Session, job: ClaimedJob, error: NodeError) -> None:
    """The job failed: again later, or the analysis is given up with the reason.

    A stale job is simply over. Call it in a transaction of its own.
    """
    if isinstance(error, StaleAnalysis):
        session.execute(
            update(JobRow)
            .where(*_mine(job))
            .values(state=JobState.DONE, error_code=error.code, finished_at=func.now())
        )
        return
    attempts = job.attempts + int(not isinstance(error, TransientError) or error.counts)
    if isinstance(error, PermanentError) or attempts >= MAX_ATTEMPTS:
        give_up(session, job, code=error.code, reason=str(error))
        return
    wait = dt.timedelta(seconds=backoff_s(max(attempts, 1), random.random()))
    _put_back(session, job, attempts=attempts, wait=wait, error_code=error.code)


def give_up(session: Session, job: ClaimedJob, *, code: str, reason: str) -> None:
    """End the job and its analysis as FAILED, with a reason that a person can read."""
    studies.lock(session, job.study_id)
    ended = session.scalar(
        update(JobRow)
        .where(*_mine(job))
        .values(state=JobState.FAILED, error_code=code, finished_at=func.now())
        .returning(JobRow.id)
    )
    if ended is None:  # another worker has it now
        return
    analysis = studies.load(session, job.analysis_id)
    if analysis.row_version != job.analysis_version:
        return
    if job.kind is JobKind.NOTICE:
        _notice_given_up(session, analysis, code)
    if analysis.state not in (AnalysisState.QUEUED, AnalysisState.FOUND):
        return
    studies.move(
        session,
        analysis,
        AnalysisEvent.GAVE_UP,
        detail={"reason_code": code},
        is_alarm=True,
        reason_code=code,
        reason=reason,
        is_applicable=True,  # it was begun; an earlier refusal is over
    )


def _notice_given_up(session: Session, analysis: studies.Analysis, code: str) -> None:
    studies.record(
        session,
        "notice_given_up",
        tenant=analysis.tenant,
        origin=analysis.origin,
        study_id=analysis.study_id,
        analysis_id=analysis.id,
        is_alarm=True,
        bundle=analysis.bundle,
        reason_code=code,
    )


def release(session: Session, job: ClaimedJob) -> None:
    """Give a claimed job back untouched: the worker stops."""
    _put_back(session, job, attempts=job.attempts, wait=dt.timedelta(0), error_code="")


def put_off(session: Session, job: ClaimedJob, wait: dt.timedelta) -> None:
    """Give a claimed job back untouched, for later; at most BACKOFF_MAX_S, or it would be due."""
    wait = min(wait, dt.timedelta(seconds=BACKOFF_MAX_S))
    _put_back(session, job, attempts=job.attempts, wait=wait, error_code="")


def requeue_dead(session: Session, is_gone: Callable[[str], bool] = lambda _: False) -> int:
    """Take back the jobs of workers whose lease ran out, or that are gone; returns how many.

    is_gone : whether a worker of that name is known to have ended (`db.lifetime`): then nobody
        waits for its lease.

    A death counts against a study only where nothing else was under way at that worker: else
    nobody knows which of them it was. The others run alone next time (`ClaimedJob.is_suspect`).
    """
    is_doing = JobRow.state == JobState.DOING
    workers = session.scalars(select(JobRow.worker).where(is_doing).distinct()).all()
    gone = [name for name in workers if is_gone(name)]
    lapsed = session.scalars(
        select(JobRow).where(
            is_doing, or_(is_past(JobRow.lease_until, _FURTHEST), JobRow.worker.in_(gone))
        )
    ).all()
    dead = [_claimed(session, row) for row in lapsed]
    together = Counter(job.worker for job in dead)
    for job in sorted(dead, key=lambda job: job.study_id):
        crashes = job.crashes + (together[job.worker] == 1)
        if crashes >= MAX_CRASHES:
            reason = f"the worker died {crashes} times on this study"
            give_up(session, job, code=WORKER_DIED, reason=reason)
            continue
        wait = dt.timedelta(seconds=backoff_s(max(crashes, 1), 0.0))
        _put_back(
            session, job, attempts=job.attempts, wait=wait, error_code=WORKER_DIED, crashes=crashes
        )
    return len(dead)


def restore_lost(session: Session) -> int:
    """Give a job to each analysis whose state asks for one and that has none; returns how many.

    No way of losing one is known; a study that waits for ever is the one thing that must not be.
    """
    lost = session.execute(
        select(AnalysisRow.id, AnalysisRow.study_id).where(
            # A settled state owes at most a notice, and has had its job.
            AnalysisRow.state.in_(set(NEXT_JOB) - SETTLED),
            AnalysisRow.updated_at < func.now() - dt.timedelta(seconds=2 * DEFAULT_LEASE_S),
            ~_open_jobs(AnalysisRow.id),
        )
    ).all()
    n = 0
    for analysis_id, study_id in lost:
        studies.lock(session, study_id)
        if session.scalar(select(~_open_jobs(analysis_id))):
            n += studies.enqueue(session, studies.load(session, analysis_id))
    return n


def _open_jobs(analysis_id: ColumnElement[int] | InstrumentedAttribute[int] | int) -> Exists:
    return exists().where(
        JobRow.analysis_id == analysis_id, JobRow.state.in_([JobState.TODO, JobState.DOING])
    )


def _claimed(session: Session, row: JobRow) -> ClaimedJob:
    analysis = studies.load(session, row.analysis_id)
    return ClaimedJob(
        id=row.id,
        kind=JobKind(row.kind),
        analysis_id=row.analysis_id,
        analysis_version=row.analysis_version,
        study_id=analysis.study_id,
        tenant=row.tenant,
        origin=row.origin,
        lane=row.lane,
        attempts=row.attempts,
        crashes=row.crashes,
        worker=row.worker,
        version=activations.Version(analysis.bundle, analysis.bundle_folder),
    )


def _put_back(
    session: Session,
    job: ClaimedJob,
    *,
    attempts: int,
    wait: dt.timedelta,
    error_code: str,
    crashes: int | None = None,
) -> None:
    # Locked, so that no move makes a newer job between the comparison and the write.
    studies.lock(session, job.study_id)
    version = (
        select(AnalysisRow.row_version)
        .where(AnalysisRow.id == JobRow.analysis_id)
        .scalar_subquery()
    )
    changes = {"crashes": crashes} if crashes is not None else {}
    session.execute(
        update(JobRow)
        .where(*_mine(job))
        .values(
            # The analysis has moved on: this job is over, whatever else waits.
            state=case((version != JobRow.analysis_version, JobState.DONE), else_=JobState.TODO),
            attempts=attempts,
            run_after=func.now() + wait,
            worker="",
            lease_until=None,
            error_code=error_code,
            **changes,
        )
    )
