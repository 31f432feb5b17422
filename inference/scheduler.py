"""The loop of `vigil infer`: claims jobs, keeps loaders ahead of the device, stores what was found.

    claim -> load (threads, each asking a sandboxed child) -> batch (across studies) -> finish

The device never waits for the database or a decoder while images are loaded; a study is claimed
only when there is room for it.
"""

import contextlib
import datetime as dt
import os
import queue as threads
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy import Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.orm import Session

from config.settings import Settings
from config.tenants import Tenant
from db import queue, results
from db.errors import DatabaseAway, NodeError, PermanentError, StaleAnalysis, TransientError
from db.faults import point
from db.files import result_folder, write_durably
from db.job import JobKind, Lane
from db.process import Stop
from db.result import Eligibility, Finding
from db.shares import Shares
from inference.batcher import Batcher, Work
from inference.device import HUNG, Device, DeviceFault, watched
from inference.fleet import Fleet
from inference.loader import Loaded, Loader
from inference.predict import make_finding, make_heatmaps
from inference.serving import Served

log = structlog.get_logger()

LEASE_S = 60.0
RENEW_S = 15.0
DATABASE_RETRY_S = 2.0
_RELEASED_WITHIN_S = 10.0
POLL_S = 0.5  # NOTIFY is only a hint, and a poll is cheap


class InferenceCrashed(TransientError):
    """An error that nobody foresaw, on one study; the message is the exception's type."""

    code: ClassVar[str] = "inference_crashed"


class TenantGone(PermanentError):
    """The tenant left the configuration while its study was under way."""

    code: ClassVar[str] = "tenant_gone"


@dataclass(eq=False)
class InFlight:
    """A claimed study on its way through loader and device."""

    job: queue.ClaimedJob
    served: Served  # what it was claimed for, whatever is activated meanwhile
    started_at: str  # ISO 8601 UTC
    loading: Future[Loaded | Eligibility]
    loaded: Loaded | None = None


class Scheduler:
    """Runs in one thread; loaders run beside it."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        fleet: Fleet,
        device: Device,
        worker: str,
        stop: Stop,
        *,
        die: Callable[[int], object] = os._exit,
    ) -> None:
        self._engine = engine
        self._die, self._longest_call_s = die, settings.inference.device_timeout_s
        self._fleet = fleet
        self._device = device
        self._worker = worker
        self._stop = stop
        self._data_dir = settings.node.data_dir
        self._tenants: dict[str, Tenant] = {tenant.id: tenant for tenant in settings.tenants}
        self._loader = Loader(engine, settings.node.data_dir, settings.inference)
        self._pool = ThreadPoolExecutor(settings.inference.loaders, thread_name_prefix="load")
        # As many as decode at once, and one to wait: claiming more would keep them from others.
        self._room = settings.inference.loaders + 1
        # One loader and one place more, for an emergency alone.
        self._reserve = ThreadPoolExecutor(1, thread_name_prefix="load-stat")
        self._reserved: Future[Loaded | Eligibility] | None = None
        self._shares = Shares(settings.tenants)
        self._batcher = Batcher(settings.inference.max_batch)
        self._flights: dict[int, InFlight] = {}
        self._loaded: threads.SimpleQueue[int] = threads.SimpleQueue()
        self._is_draining = False  # a suspect waits until nothing else is under way

    def run(self) -> None:
        """Work until told to stop; what is under way then goes back to the queue."""
        ended = threading.Event()
        heart = threading.Thread(target=self._renew_until, args=(ended,), name="leases")
        heart.start()
        try:
            with watched(self._device, self._longest_call_s, self._abandon):
                self._work()
        finally:
            ended.set()
            heart.join()
            self.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                if not self.step():
                    self.wait()
            except DBAPIError:
                # Nothing is lost: leases run out, and what was scored is scored again.
                log.warning("database_away", exc_code=DatabaseAway.code)
                self._stop.wait(DATABASE_RETRY_S)

    def step(self) -> bool:
        """One round: claim, take in what is loaded, run one batch. False when there was nothing."""
        claimed = self._claim()
        taken = False
        while self._take_loaded():  # all: an emergency among them is in the very next batch
            taken = True
        return self._run_batch() or claimed or taken

    def close(self) -> None:
        """Give back what is under way and end the loaders."""
        self._release_all()
        self._flights.clear()
        for pool in (self._pool, self._reserve):
            pool.shutdown(wait=False, cancel_futures=True)
        self._loader.close()

    @property
    def is_busy(self) -> bool:
        """Whether claimed studies are under way."""
        return bool(self._flights)

    def wait(self) -> None:
        """Sleep a moment, or until something has been loaded."""
        if self._flights:
            # Something is being loaded: wake up as soon as it is there.
            with contextlib.suppress(threads.Empty):
                self._loaded.put(self._loaded.get(timeout=POLL_S))
        else:
            self._stop.wait(POLL_S)

    def _renew_until(self, ended: threading.Event) -> None:
        """Keep the leases in a thread of its own: a step can take longer than one."""
        while not ended.wait(RENEW_S):
            try:
                with Session(self._engine) as session, session.begin():
                    queue.renew(session, list(self._flights), self._worker, lease_s=LEASE_S)
            except DBAPIError as error:
                log.warning("database_away", exc_type=type(error).__name__)

    def _abandon(self) -> None:
        """The device hangs: the supervisor starts the stage anew; no study is at fault."""
        # Leases run out by themselves: nothing, not even a database that hangs, may stop this.
        latest = threading.Timer(_RELEASED_WITHIN_S, self._die, (HUNG,))
        latest.daemon = True
        latest.start()
        try:
            self._release_all()
        finally:
            latest.cancel()
            self._die(HUNG)

    def _release_all(self) -> None:
        for flight in list(self._flights.values()):
            try:
                with Session(self._engine) as session, session.begin():
                    queue.release(session, flight.job)
            except DBAPIError:
                break  # the leases run out by themselves

    def _claim(self) -> bool:
        n = len(self._flights)
        if n > self._room or (self._is_draining and self._flights):
            return False
        lanes = tuple(Lane) if n < self._room else (Lane.STAT,)
        ready = self._fleet.served
        with Session(self._engine) as session:
            job = queue.claim(
                session, [JobKind.INFER], self._worker, lease_s=LEASE_S,
                versions=list(ready), shares=self._shares, lanes=lanes,
            )  # fmt: skip
            # What a worker died of runs alone, so that its death is nobody else's.
            self._is_draining = job is not None and job.is_suspect
            if job is None or (self._is_draining and self._flights) or job.id in self._flights:
                session.rollback()
                return False
            session.commit()
        point("infer_claimed")
        served = ready[job.version]
        log.info(
            "job_claimed",
            job_id=job.id,
            tenant=job.tenant,
            bundle=job.version.bundle,
            version=served.bundle.manifest.version,
        )
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        pool = self._pool_for(job)
        future = pool.submit(self._loader.load, job, served.bundle)
        if pool is self._reserve:
            self._reserved = future
        self._flights[job.id] = InFlight(job, served, now, future)
        future.add_done_callback(lambda _: self._loaded.put(job.id))
        return True

    def _pool_for(self, job: queue.ClaimedJob) -> ThreadPoolExecutor:
        """The loaders, or the one kept free for an emergency: it waits behind nobody's decoding."""
        is_free = self._reserved is None or self._reserved.done()
        return self._reserve if job.lane == Lane.STAT and is_free else self._pool

    def _take_loaded(self) -> bool:
        """Hand what the loaders finished to the batcher, or end it with its reason."""
        try:
            flight = self._flights.get(self._loaded.get_nowait())
        except threads.Empty:
            return False
        if flight is None or flight.loaded is not None:
            return True
        try:
            made = flight.loading.result()
        except NodeError as error:
            self._fail(flight, error)
            return True
        except DBAPIError:  # the loader's own reading: nothing of the study's
            self._give_back(flight)
            return True
        except Exception as error:  # noqa: BLE001 - the worker loop records it and goes on
            self._fail(flight, InferenceCrashed(type(error).__name__))
            return True
        if isinstance(made, Eligibility):
            self._end(flight, made)
            return True
        point("infer_loaded")
        flight.loaded = made
        inputs = made.prepared.inputs
        n_outputs = flight.served.bundle.manifest.outputs
        # Images of two versions never share a batch, though their bundles have one name.
        model = "@".join(flight.job.version)
        self._batcher.add(Work(flight.job.id, model, flight.job.lane, inputs, n_outputs))
        return True

    def _run_batch(self) -> bool:
        batch = self._batcher.next(self._device.limit)
        if batch is None:
            return False
        started = time.monotonic()
        served = self._flights[batch.parts[0][0].key].served
        try:
            scored = self._device.score(served.model, batch.inputs)
        except DeviceFault as fault:
            log.error("device_failed", exc_code=fault.code)
            for work, _, _ in batch.parts:
                self._give_back(self._flights[work.key])
            raise
        point("infer_scored")
        log.debug("batch_scored", n=batch.n, duration_s=round(time.monotonic() - started, 3))
        for work in batch.scatter(scored):
            if work.key in self._flights:
                self._finish(self._flights[work.key], work)
        return True

    def _finish(self, flight: InFlight, work: Work) -> None:
        """From a study's logits to a stored finding."""
        try:
            self._store(flight, work)
        except DeviceFault:
            self._give_back(flight)
            raise
        except NodeError as error:
            self._fail(flight, error)
        except DBAPIError:  # told to stop while the database was away
            raise
        except Exception as error:  # noqa: BLE001 - the worker loop records it and goes on
            self._fail(flight, InferenceCrashed(type(error).__name__))

    def _give_back(self, flight: InFlight) -> None:
        """The study is not at fault: it is done again as if never begun."""
        self._batcher.discard(flight.job.id)
        self._flights.pop(flight.job.id, None)
        self._commit(lambda session: queue.release(session, flight.job))

    def _store(self, flight: InFlight, work: Work) -> None:
        if flight.loaded is None:
            raise AssertionError("only loaded studies are batched")
        served, prepared = flight.served, flight.loaded.prepared
        tenant = self._tenants.get(flight.job.tenant)
        if tenant is None:
            raise TenantGone("the study's tenant is no longer in the configuration")
        finding = make_finding(
            prepared,
            work.outputs,
            served.bundle,
            started_at=flight.started_at,
            result_uuid=str(uuid.uuid4()),
            numerics=served.numerics,
            thresholds=tenant.thresholds,
            prevalence=tenant.prevalence,
            is_partial=flight.loaded.is_partial,
        )
        finding, maps = self._device.explain(
            served.explainer,
            lambda model: make_heatmaps(prepared, finding, served.bundle, model),
        )
        write_maps(self._data_dir, flight.job.tenant, finding, maps)
        point("maps_written")
        chosen = flight.loaded.instance_ids
        self._commit(lambda session: results.store_finding(session, flight.job, finding, chosen))
        point("finding_committed")
        self._flights.pop(flight.job.id)
        log.info(
            "finding_stored",
            job_id=flight.job.id,
            tenant=flight.job.tenant,
            bundle=served.bundle.name,
            version=served.bundle.manifest.version,
            n_images=len(finding.images),
        )

    def _end(self, flight: InFlight, refusal: Eligibility) -> None:
        self._flights.pop(flight.job.id)
        try:
            self._commit(lambda session: results.store_refusal(session, flight.job, refusal))
        except StaleAnalysis as error:
            self._record_failure(flight, error)
        log.info("study_not_eligible", job_id=flight.job.id, reason_code=refusal.rule)

    def _fail(self, flight: InFlight, error: NodeError) -> None:
        self._flights.pop(flight.job.id, None)
        self._batcher.discard(flight.job.id)
        self._record_failure(flight, error)
        log.warning("job_failed", job_id=flight.job.id, exc_code=error.code)

    def _record_failure(self, flight: InFlight, error: NodeError) -> None:
        self._commit(lambda session: queue.fail(session, flight.job, error))

    def _commit(self, action: Callable[[Session], object]) -> None:
        """Do it in a transaction, however long the database is away: nothing else can be done."""
        while True:
            try:
                with Session(self._engine) as session, session.begin():
                    action(session)
                return
            except DBAPIError as error:
                if not is_away(error):
                    raise
                log.warning("database_away", exc_code=DatabaseAway.code)
                if self._stop.wait(DATABASE_RETRY_S):
                    raise  # the lease runs out, and another worker takes the job


def is_away(error: DBAPIError) -> bool:
    """Whether trying again can help: not where the statement itself is at fault."""
    return not isinstance(error, DataError | IntegrityError | ProgrammingError)


def write_maps(
    data_dir: Path, tenant: str, finding: Finding, maps: Sequence[NDArray[np.float32]]
) -> None:
    """Keep the key images' raw heat maps: `cam_0`, `cam_1`, ... in the source matrix, float32."""
    if not maps:
        return
    file = BytesIO()
    arrays: dict[str, Any] = {f"cam_{i}": one for i, one in enumerate(maps)}
    np.savez_compressed(file, **arrays)
    folder = result_folder(data_dir, tenant, uuid.UUID(finding.result_uuid))
    write_durably(folder / "maps.npz", file.getvalue())
