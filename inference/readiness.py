"""When a study is ready, and over which images: judged by the bundle, one study at a time."""

import datetime as dt
import time
from collections.abc import Mapping

import structlog
from sqlalchemy import ColumnElement, Engine, and_, func, select, tuple_, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from config.settings import Settings
from db import activations, operator, queue, results, spool, studies
from db.activations import Version
from db.clock import is_past
from db.faults import point
from db.header import InstanceHeader
from db.lifetime import is_gone
from db.process import Stop
from db.result import Eligibility
from db.shares import Shares
from db.study import AnalysisEvent, AnalysisState
from db.tables import AnalysisRow, InstanceRow, StudyRow
from inference.choice import headers_of, select_images
from inference.eligibility import Selection
from inference.fleet import Fleet
from inference.manifest import Manifest

log = structlog.get_logger()

SWEEP_S = 0.5
LEASE_SWEEP_S = 5.0
STORING_S = 1.0
#: Whatever arrives, such a study is judged by what is active then.
_NOTHING_CHOSEN = (AnalysisState.WAITING, AnalysisState.NOT_ANALYSED)


class Readiness:
    """The sweep that moves studies on; any number may run, each analysis is judged by one."""

    def __init__(self, engine: Engine, settings: Settings, fleet: Fleet) -> None:
        self._engine = engine
        self._data_dir = settings.node.data_dir
        self._tenants = {tenant.id: tenant for tenant in settings.tenants}
        self._fleet = fleet
        self._shares = Shares(settings.tenants)

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
            if n := queue.requeue_dead(session, is_gone):
                log.warning("dead_jobs_requeued", n=n)
        with Session(self._engine) as session, session.begin():
            if n := queue.restore_lost(session):
                log.error("lost_jobs_restored", n=n)

    def sweep_once(self) -> bool:
        """Judge one analysis that is due; False when none is."""
        # Read with the study, as the claim does: nothing is judged by a version of yesterday.
        newest = activations.newest()
        folder = activations.folder_that_serves(newest)
        ready = self._fleet.served
        with Session(self._engine) as session, session.begin():
            due = session.execute(
                select(AnalysisRow.id, StudyRow, folder)
                .join(StudyRow, StudyRow.id == AnalysisRow.study_id)
                .outerjoin(
                    newest,
                    and_(
                        newest.c.tenant == AnalysisRow.tenant,
                        newest.c.bundle == AnalysisRow.bundle,
                    ),
                )
                .where(
                    is_past(AnalysisRow.judge_at, self._longest_wait()),
                    tuple_(AnalysisRow.bundle, folder).in_(list(ready)),
                )
                # As the claim does: ten thousand that are due hold up no emergency.
                .order_by(
                    StudyRow.lane,
                    *self._shares.order(StudyRow.tenant, StudyRow.lane),
                    AnalysisRow.judge_at,
                )
                .limit(1)
                # The study: no instance is accepted between the reading and the move.
                .with_for_update(of=StudyRow, key_share=True, skip_locked=True)
            ).one_or_none()
            if due is None:
                return False
            analysis_id, study, where = due
            self._shares.took(study.tenant, study.lane)
            row = session.get_one(AnalysisRow, analysis_id)
            version = Version(row.bundle, where)
            self._judge(session, row, study, version, ready[version].bundle.manifest)
            point("readiness_moved")
        point("readiness_committed")
        return True

    def _longest_wait(self) -> dt.timedelta:
        waits = [t.quiet_period_s + t.max_wait_s for t in self._tenants.values()]
        return dt.timedelta(seconds=max(waits, default=0.0))

    def _judge(
        self,
        session: Session,
        row: AnalysisRow,
        study: StudyRow,
        version: Version,
        manifest: Manifest,
    ) -> None:
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
        analysis = studies.load(session, row.id)
        if analysis.state is AnalysisState.WITHDRAWN:
            # A late slice must not bring back by itself what an operator has taken back.
            self._look_again(session, row, None)
            return
        if self._is_as_before(session, analysis, version, headers):
            self._look_again(session, row, None)
            return
        verdict = select_images(session, study.id, headers, manifest)
        last = studies.last_arrival(session, study)
        deadline = last + dt.timedelta(seconds=tenant.max_wait_s)
        # Measured by the database's clock alone.
        is_over = bool(session.scalar(select(func.now() >= deadline)))
        if isinstance(verdict, Eligibility):
            again = self._not_eligible(session, analysis, verdict, version)
        else:
            # What lies in the spool, after an outage of the database say, is not missing.
            has_waited = (
                not verdict.is_complete
                and is_over
                and not spool.is_behind(self._data_dir, study.tenant)
            )
            again = self._eligible(session, analysis, verdict, version, has_waited=has_waited)
        soon = func.now() + dt.timedelta(seconds=STORING_S)
        self._look_again(session, row, (soon if is_over else deadline) if again else None)

    def _is_as_before(
        self,
        session: Session,
        analysis: studies.Analysis,
        version: Version,
        headers: Mapping[str, InstanceHeader],
    ) -> bool:
        """Whether what has arrived leaves alone what another version than today's has analysed.

        By that version's own rules: today's may choose other images for no other reason than that
        it is another one, and an activation must not issue anything again.
        """
        its_own = Version(analysis.bundle, analysis.bundle_folder)
        if its_own == version or analysis.state in _NOTHING_CHOSEN:
            return False
        manifest = self._fleet.manifest_of(its_own)
        if manifest is None:  # its files are gone: today's rules are all there are
            return False
        chosen = select_images(session, analysis.study_id, headers, manifest)
        return isinstance(chosen, Eligibility) or _is_nothing_new(analysis, chosen)

    def _not_eligible(
        self,
        session: Session,
        analysis: studies.Analysis,
        verdict: Eligibility,
        version: Version,
    ) -> bool:
        """State the outcome now; a later instance opens it again. Says whether to look again."""
        if analysis.state is AnalysisState.WAITING:
            results.refuse(session, analysis, verdict, bundle_folder=version.folder)
            log.info("study_not_eligible", analysis_id=analysis.id, reason_code=verdict.rule)
        return False

    def _eligible(
        self,
        session: Session,
        analysis: studies.Analysis,
        chosen: Selection,
        version: Version,
        *,
        has_waited: bool,
    ) -> bool:
        """Queue a series that is whole, or has had its time. Says whether to look again."""
        if analysis.state is not AnalysisState.WAITING:
            if _is_nothing_new(analysis, chosen):
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
            analysed_sha256=studies.analysed_digest(chosen.instance_ids),
            is_partial=not chosen.is_complete,
            bundle_folder=version.folder,
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


def _is_nothing_new(analysis: studies.Analysis, chosen: Selection) -> bool:
    """Whether the images are those that were analysed, or are about to be."""
    digest = studies.analysed_digest(chosen.instance_ids)
    return digest == analysis.analysed_sha256 and not _is_belied(analysis, chosen)


def _is_belied(analysis: studies.Analysis, chosen: Selection) -> bool:
    """Whether COMPLETE is said, or about to be, of a series of which another image came cut off.

    Once: whatever is queued then is partial.
    """
    says = analysis.result_no > 0 or analysis.state is AnalysisState.QUEUED
    return says and not analysis.is_partial and not chosen.is_complete


def _is_being_stored(session: Session, study_id: int) -> bool:
    query = select(InstanceRow.id).where(
        InstanceRow.study_id == study_id, InstanceRow.stored_at.is_(None)
    )
    return session.scalar(query.limit(1)) is not None
