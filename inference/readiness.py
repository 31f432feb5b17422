"""When a study is ready, and over which images: judged by the bundle, one study at a time."""

import datetime as dt
import time
import uuid
from collections.abc import Mapping, Sequence

import structlog
from sqlalchemy import Engine, func, or_, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from config.settings import Settings
from config.tenants import Tenant
from db import operator, queue, results, studies
from db.header import InstanceHeader
from db.process import Stop
from db.result import Eligibility
from db.study import AnalysisEvent, AnalysisState
from db.tables import AnalysisRow, InstanceRow, StudyRow
from inference.eligibility import Selection, judge
from inference.manifest import Manifest

log = structlog.get_logger()

SWEEP_S = 0.5
LEASE_SWEEP_S = 5.0


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
            except OperationalError:
                log.warning("database_away")
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

    def sweep_once(self) -> bool:
        """Judge one analysis that is due; False when none is."""
        with Session(self._engine) as session, session.begin():
            due = session.scalar(
                select(AnalysisRow)
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
                .with_for_update(skip_locked=True)
            )
            if due is None:
                return False
            self._judge(session, due)
            return True

    def _longest_wait(self) -> dt.timedelta:
        waits = [t.quiet_period_s + t.max_wait_s for t in self._tenants.values()]
        return dt.timedelta(seconds=max(waits, default=0.0) + 60)

    def _judge(self, session: Session, row: AnalysisRow) -> None:
        # Locked, so that no instance is accepted between the reading and the move.
        study = session.execute(
            select(StudyRow).where(StudyRow.id == row.study_id).with_for_update()
        ).scalar_one()
        tenant = self._tenants.get(study.tenant)
        if tenant is None:  # taken out of the configuration: its studies rest
            self._look_again(session, row, None)
            return
        verdict = select_images(session, study.id, self._manifests[row.bundle])
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
            if digest == analysis.analysed_sha256:
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

    def _look_again(self, session: Session, row: AnalysisRow, at: dt.datetime | None) -> None:
        session.execute(update(AnalysisRow).where(AnalysisRow.id == row.id).values(judge_at=at))


def select_images(session: Session, study_id: int, manifest: Manifest) -> Selection | Eligibility:
    """What a bundle would analyse of a study as it is now."""
    return judge(headers_of(session, study_id), manifest)


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
