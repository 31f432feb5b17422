"""When a study is ready, and over which images: judged by the bundle, one study at a time."""

import datetime as dt
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog
from sqlalchemy import ColumnElement, Engine, exists, func, or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from config.settings import Settings
from config.tenants import Tenant
from db import operator, queue, results, studies
from db.errors import CutOff
from db.header import InstanceHeader
from db.process import Stop
from db.result import Eligibility
from db.study import AnalysisEvent, AnalysisState
from db.tables import AnalysisRow, InstanceRow, QuarantineRow, StudyRow
from inference.eligibility import Selection, judge
from inference.manifest import Manifest

log = structlog.get_logger()

SWEEP_S = 0.5
LEASE_SWEEP_S = 5.0
STORING_S = 1.0


class Readiness:
    """The sweep that moves studies on; any number may run, each analysis is judged by one."""

    def __init__(
        self, engine: Engine, settings: Settings, manifests: Mapping[str, Manifest]
    ) -> None:
        self._engine = engine
        self._tenants = {tenant.id: tenant for tenant in settings.tenants}
        self._manifests = manifests

    def run(self, stop: Stop) -> None:
        """Sweep until told to stop, paced by the monotonic clock: a stepped one stops nothing."""
        next_lease_sweep = time.monotonic()
        while not stop.is_set():
            try:
                while not stop.is_set() and self.sweep_once():
                    pass
                self.carry_out_requests()
                if time.monotonic() >= next_lease_sweep:
                    self.requeue_dead()
                    next_lease_sweep = time.monotonic() + LEASE_SWEEP_S
            except DBAPIError as error:  # away, read-only for a moment, or two of us at once
                log.warning("database_away", exc_type=type(error).__name__)
                stop.wait(2.0)
                # The living need time to renew what lapsed meanwhile.
                next_lease_sweep = time.monotonic() + queue.DEFAULT_LEASE_S
            stop.wait(SWEEP_S)

    def carry_out_requests(self) -> None:
        """What operators asked for on a page."""
        with Session(self._engine) as session, session.begin():
            if n := operator.carry_out_requests(session):
                log.info("requests_carried_out", n=n)

    def requeue_dead(self) -> None:
        with Session(self._engine) as session, session.begin():
            if n := queue.requeue_dead(session):
                log.warning("dead_jobs_requeued", n=n)
        with Session(self._engine) as session, session.begin():
            if n := queue.restore_lost(session):
                log.error("lost_jobs_restored", n=n)

    def sweep_once(self) -> bool:
        """Judge one analysis that is due; False when none is."""
        with Session(self._engine) as session, session.begin():
            due = session.execute(
                select(AnalysisRow.id, StudyRow)
                .join(StudyRow, StudyRow.id == AnalysisRow.study_id)
                .where(
                    # A moment further ahead than any wait was written before the clock was set
                    # back: it is due.
                    or_(
                        AnalysisRow.judge_at <= func.now(),
                        AnalysisRow.judge_at > func.now() + self._longest_wait(),
                    ),
                    AnalysisRow.bundle.in_(list(self._manifests)),
                )
                .order_by(AnalysisRow.judge_at)
                .limit(1)
                # The study: no instance is accepted between the reading and the move.
                .with_for_update(of=StudyRow, key_share=True, skip_locked=True)
            ).one_or_none()
            if due is None:
                return False
            analysis_id, study = due
            self._judge(session, session.get_one(AnalysisRow, analysis_id), study)
            return True

    def _longest_wait(self) -> dt.timedelta:
        waits = [t.quiet_period_s + t.max_wait_s for t in self._tenants.values()]
        return dt.timedelta(seconds=max(waits, default=0.0) + 60)

    def _judge(self, session: Session, row: AnalysisRow, study: StudyRow) -> None:
        tenant = self._tenants.get(study.tenant)
        if tenant is None:  # taken out of the configuration: its studies rest
            self._look_again(session, row, None)
            return
        if _is_being_stored(session, study.id):
            # Rows come before files: what is not stored yet must not be taken for missing.
            soon = func.now() + dt.timedelta(seconds=STORING_S)
            self._look_again(session, row, soon)
            return
        headers = headers_of(session, study.id)
        verdict = select_images(session, study.id, headers, self._manifests[row.bundle])
        analysis = studies.load(session, row.id)
        has_waited = self._has_waited(session, study, tenant)
        deadline = study.last_instance_at + dt.timedelta(seconds=tenant.max_wait_s)
        if isinstance(verdict, Eligibility):
            again = self._not_eligible(session, analysis, verdict)
        else:
            again = self._eligible(session, analysis, verdict, has_waited=has_waited)
        self._look_again(session, row, deadline if again else None)

    def _has_waited(self, session: Session, study: StudyRow, tenant: Tenant) -> bool:
        """Whether whatever is missing has had its time. Measured by the database's clock alone."""
        return bool(
            session.scalar(
                select(
                    func.now() >= study.last_instance_at + dt.timedelta(seconds=tenant.max_wait_s)
                )
            )
        )

    def _not_eligible(
        self, session: Session, analysis: studies.Analysis, verdict: Eligibility
    ) -> bool:
        """State the outcome now; a later instance opens it again. Says whether to look again."""
        if analysis.state is AnalysisState.WAITING:
            results.refuse(session, analysis, verdict)
            log.info("study_not_eligible", analysis_id=analysis.id, reason_code=verdict.rule)
        return False

    def _eligible(
        self,
        session: Session,
        analysis: studies.Analysis,
        chosen: Selection,
        *,
        has_waited: bool,
    ) -> bool:
        """Queue a series that is whole, or has had its time. Says whether to look again."""
        digest = studies.analysed_digest(chosen.instance_ids)
        if analysis.state is not AnalysisState.WAITING:
            if digest == analysis.analysed_sha256 and not _is_belied(analysis, chosen):
                return False  # a dose report, a bone series: nothing is issued again
            analysis = studies.move(session, analysis, AnalysisEvent.INPUTS_CHANGED)
        if not (chosen.is_complete or has_waited):
            return True
        studies.move(
            session,
            analysis,
            AnalysisEvent.SERIES_READY,
            detail={
                "n_instances": len(chosen.instance_ids),
                "series": list(chosen.series_instance_uids),
                "missing": list(chosen.missing),
            },
            analysed_ids=list(chosen.instance_ids),
            analysed_sha256=digest,
            is_partial=not chosen.is_complete,
            ready_at=func.now(),
        )
        log.info("study_ready", analysis_id=analysis.id, n_instances=len(chosen.instance_ids))
        return False

    def _look_again(
        self,
        session: Session,
        row: AnalysisRow,
        at: dt.datetime | ColumnElement[dt.datetime] | None,
    ) -> None:
        session.execute(update(AnalysisRow).where(AnalysisRow.id == row.id).values(judge_at=at))


def select_images(
    session: Session, study_id: int, headers: Mapping[str, InstanceHeader], manifest: Manifest
) -> Selection | Eligibility:
    """What a bundle analyses of a study, or of those instances of it that were chosen before.

    headers : as `headers_of`
    """
    chosen = _choose(headers, manifest)
    if isinstance(chosen, Selection) and (n := _cut_off(session, study_id, chosen)):
        # It may have been the first or the last image, whose loss leaves no hole.
        words = f"{n} of the series' images came cut off"
        return replace(chosen, missing=(*chosen.missing, words))
    return chosen


def _choose(headers: Mapping[str, InstanceHeader], manifest: Manifest) -> Selection | Eligibility:
    """As `eligibility.judge`, whatever the headers hold."""
    try:
        return judge(headers, manifest)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        # Values that no scanner writes: one study's headers must not stop everybody's.
        log.error("judging_failed", exc_type=type(error).__name__)
        reason = "The headers hold values that cannot be judged."
        return Eligibility("judging_failed", type(error).__name__, "plausible values", reason)


def _is_belied(analysis: studies.Analysis, chosen: Selection) -> bool:
    """Whether COMPLETE is said, or about to be, of a series of which another image came cut off.

    Once: whatever is queued then is partial.
    """
    says = analysis.result_no > 0 or analysis.state is AnalysisState.QUEUED
    return says and not analysis.is_partial and not chosen.is_complete


def _cut_off(session: Session, study_id: int, chosen: Selection) -> int:
    """Images of the series that are set aside because they came cut off, and not whole since.

    Only those that intake has found to be this study's: anybody can send a file that says so.
    """
    has_come = exists().where(
        InstanceRow.study_id == study_id,
        InstanceRow.sop_instance_uid == QuarantineRow.sop_instance_uid,
    )
    query = select(func.count(QuarantineRow.sop_instance_uid.distinct())).where(
        QuarantineRow.study_id == study_id,
        QuarantineRow.series_instance_uid.in_(chosen.series_instance_uids),
        QuarantineRow.code == CutOff.code,
        QuarantineRow.state == "OPEN",
        ~has_come,
    )
    return session.scalar(query) or 0


def _is_being_stored(session: Session, study_id: int) -> bool:
    query = select(InstanceRow.id).where(
        InstanceRow.study_id == study_id, InstanceRow.stored_at.is_(None)
    )
    return session.scalar(query.limit(1)) is not None


def headers_of(
    session: Session, study_id: int, only: Sequence[str] | None = None
) -> dict[str, InstanceHeader]:
    """Instance id to header, of what is durably stored; `only` limits it to these ids."""
    query = select(InstanceRow.id, InstanceRow.header).where(
        InstanceRow.study_id == study_id, InstanceRow.stored_at.is_not(None)
    )
    if only is not None:
        query = query.where(InstanceRow.id.in_([uuid.UUID(one) for one in only]))
    return {
        str(instance_id): InstanceHeader.from_json(header)
        for instance_id, header in session.execute(query)
    }
