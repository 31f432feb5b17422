"""Spool to rows: who is it, is it new, may it join its study; then to the store.

Rows committed -> file linked into its place, synced -> `stored_at` set -> spool file unlinked.
Killed anywhere and run again, nothing doubles and nothing is dropped: a file whose id has a row
only resumes.
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path

import structlog
from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from config.settings import Settings
from db.aside import Arrival, file_returned, quarantine
from db.cut_off import Begun, Unlinked, study_lacking
from db.describe import describe
from db.errors import ChildDied, CutOff, NodeError, PermanentError, TransientError
from db.faults import point
from db.files import link_all, quarantine_path, returned_path, store_path
from db.filing import file_study, let_analyse
from db.identity import Described, Trouble, is_uid, uid_trouble
from db.meta import Provenance
from db.sandbox import Sandbox
from db.spool import Spooled, read_provenance, scan
from db.tables import InstanceRow, ObjectRow, QuarantineRow, ReturnedRow

BATCH = 200  # files
_LATER_S = 0.5
_READ_S = 20.0  # for one file at first
_READ_AGAIN_S = 120.0  # and for one that has failed once
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Unread:
    """A file that could not be described, and why."""

    spooled: Spooled
    source: Provenance
    trouble: Trouble
    begun: Described | None = None  # what stands before the place where it is cut off

    @property
    def uid(self) -> str:
        """Of the command: all that is known of it. Empty where that is none."""
        return self.source.sop_instance_uid if is_uid(self.source.sop_instance_uid) else ""


class Intake:
    """Empties spool folders; the caller holds each folder's intake lock."""

    def __init__(
        self, engine: Engine, settings: Settings, sandbox: Sandbox, readers: int = 2
    ) -> None:
        self._engine, self._settings, self._sandbox = engine, settings, sandbox
        self._data_dir = settings.node.data_dir
        self._unlinked = Unlinked(engine, self._data_dir, sandbox)
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="intake")
        self._suspects: set[uuid.UUID] = set()  # killed their reader once; read alone the next time
        self._later: dict[uuid.UUID, float] = {}  # put off until then, so that they hold up nobody

    def take(self, folder: Path) -> int:
        """File the oldest of what waits in `folder`.

        Returns
        -------
        How many files left the spool; those that wait for another's outcome stay.

        Raises
        ------
        TransientError, sqlalchemy.exc.DBAPIError
            Nothing is lost; call again later.
        """
        waiting = self._next(folder)
        if not waiting:
            return 0
        known = self._settle(waiting)
        new = [item for item in waiting if item.id not in known]
        readable = self._readers.map(self._read, new)
        dropped = self._file([found for found in readable if found is not None])
        if new:
            point("intake_rows_committed")
        settled = self._settle(new)
        for item in dropped:
            item.path.unlink(missing_ok=True)
        done = known | settled | {item.id for item in dropped}
        self._later = {item.id: time.monotonic() + _LATER_S for item in waiting} | self._later
        self._later = {key: due for key, due in self._later.items() if key not in done}
        return len(done)

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)

    def _next(self, folder: Path) -> list[Spooled]:
        """The next batch: what is new first, then what was put off, then one suspect alone."""
        waiting = scan(folder)
        now = time.monotonic()
        fresh = [item for item in waiting if item.id not in self._later]
        if fresh:
            return _evenly(fresh, BATCH)
        due = [item for item in waiting if self._later[item.id] <= now]
        for item in due:
            del self._later[item.id]
        healthy = [item for item in due if item.id not in self._suspects]
        return healthy[:BATCH] or due[:1]

    def _read(self, item: Spooled) -> "Arrival | _Unread | None":
        """Describe a file in the sandbox; None: once more, later."""
        source = Provenance(tenant=item.tenant)
        try:
            source = read_provenance(item.path)
            is_suspect = item.id in self._suspects
            value, _ = self._sandbox.run(
                describe, str(item.path), timeout_s=_READ_AGAIN_S if is_suspect else _READ_S
            )
            self._suspects.discard(item.id)
            return Arrival(item, source, Described.from_json(value), item.path.stat().st_size)
        except TransientError as error:
            if item.id not in self._suspects or not item.path.exists():
                self._suspects.add(item.id)
                return None
            self._suspects.discard(item.id)
            reason = "Reading it failed twice: crash, time, memory or disk."
            code = "kills_reader" if isinstance(error, ChildDied) else error.code
            return _Unread(item, source, Trouble(code, reason))
        except PermanentError as error:
            trouble = Trouble(error.code, f"It cannot be read: {error}.")
            begun = self._begun(item) if isinstance(error, CutOff) else None
            return _Unread(item, source, trouble, begun)

    def _begun(self, item: Spooled) -> Described | None:
        """A file whose pixel data is cut off still says whose study lacks an image."""
        try:
            value, _ = self._sandbox.run(describe, str(item.path), True, timeout_s=_READ_S)
        except NodeError:
            return None
        return Described.from_json(value)

    def _file(self, found: Sequence[Arrival | _Unread]) -> list[Spooled]:
        """Make the rows; returns what needs none: duplicates."""
        arrivals = [item for item in found if isinstance(item, Arrival)]
        dropped: list[Spooled] = []
        # One transaction each, in one order everywhere, so that two intakes cannot deadlock.
        for key, group in groupby(sorted(arrivals, key=_study_key), key=_study_key):
            dropped += self._file_surely(list(group), self._unlinked.of(*key))
        # Last, and one by one likewise: the study that lacks it may have been opened just now.
        for unread in found:
            if isinstance(unread, _Unread):
                with Session(self._engine) as session, session.begin():
                    self._set_aside(session, unread)
        return dropped

    def _set_aside(self, session: Session, item: _Unread) -> None:
        study = study_lacking(session, item.source, item.begun)
        said = item.begun.header if item.begun else None
        quarantine(
            session, item.spooled, item.source, item.trouble, uid=item.uid, said=said, study=study
        )
        tenant = self._settings.tenant(item.source.tenant)
        if study is not None and tenant is not None:
            let_analyse(session, study, tenant)  # what was judged lacked this image

    def _file_surely(self, arrivals: list[Arrival], begun: list[Begun]) -> list[Spooled]:
        """One study's instances; what the database refuses is set aside, not tried for ever."""
        try:
            with Session(self._engine) as session, session.begin():
                filed = self._file_group(session, arrivals, begun)
                point("intake_filed")
                return filed
        except (DataError, IntegrityError) as error:
            log.error("instances_not_filed", n=len(arrivals), exc_type=type(error).__name__)
        if len(arrivals) > 1:
            return [item for one in arrivals for item in self._file_surely([one], begun)]
        trouble = Trouble("cannot_be_filed", "The database does not accept its header.")
        with Session(self._engine) as session, session.begin():
            quarantine(session, arrivals[0].spooled, arrivals[0].source, trouble)
        return []

    def _file_group(
        self, session: Session, arrivals: list[Arrival], begun: list[Begun]
    ) -> list[Spooled]:
        """One study's new instances, oldest first; `begun` may be what came of it before."""
        ours = self._ours(session, arrivals)
        dropped = file_returned(session, [item for item in arrivals if item.uid in ours])
        fit: list[Arrival] = []
        for item in arrivals:
            if item.uid in ours:
                continue
            if trouble := uid_trouble(item.described, item.source):
                quarantine(session, item.spooled, item.source, trouble, uid=item.uid)
            else:
                fit.append(item)
        if fit:
            tenant = self._settings.tenant(fit[0].source.tenant)
            dropped += file_study(session, self._data_dir, tenant, fit)
            for one in begun:
                self._unlinked.link(session, one, tenant)
        return dropped

    def _ours(self, session: Session, arrivals: Iterable[Arrival]) -> set[str]:
        """The SOP Instance UIDs among them that we issued, or another node of our making."""
        uids = {item.uid for item in arrivals}
        issued = session.scalars(
            select(ObjectRow.sop_instance_uid).where(ObjectRow.sop_instance_uid.in_(uids))
        )
        return {item.uid for item in arrivals if item.described.is_ours} | set(issued)

    def _settle(self, items: Sequence[Spooled]) -> set[uuid.UUID]:
        """Put the files of all that have rows where they belong; returns their ids."""
        ids = [item.id for item in items]
        paths = {item.id: item.path for item in items}
        with Session(self._engine) as session, session.begin():
            targets = self._targets(session, ids)
        if not targets:
            return set()
        link_all((paths[key], target) for key, target in targets.items())
        point("intake_synced")
        with Session(self._engine) as session, session.begin():
            session.execute(
                update(InstanceRow)
                .where(InstanceRow.id.in_(targets.keys()), InstanceRow.stored_at.is_(None))
                .values(stored_at=func.now())
            )
        point("intake_stored")
        for key in targets:
            paths[key].unlink(missing_ok=True)
        point("intake_unlinked")
        return set(targets)

    def _targets(self, session: Session, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Path]:
        found: dict[uuid.UUID, Path] = {}
        accepted = select(InstanceRow.id, InstanceRow.tenant, InstanceRow.study_id)
        for key, tenant, study_id in session.execute(accepted.where(InstanceRow.id.in_(ids))):
            found[key] = store_path(self._data_dir, tenant, study_id, key)
        held = select(QuarantineRow.id, QuarantineRow.tenant).where(
            QuarantineRow.id.in_(ids), QuarantineRow.state != "RELEASED"
        )
        for key, tenant in session.execute(held):
            found[key] = quarantine_path(self._data_dir, tenant, key)
        returned = select(ReturnedRow.id, ReturnedRow.tenant).where(ReturnedRow.id.in_(ids))
        for key, tenant in session.execute(returned):
            found[key] = returned_path(self._data_dir, tenant, key)
        return found


def _evenly(waiting: Sequence[Spooled], limit: int) -> list[Spooled]:
    """The oldest of each tenant in turn: one that sends ten thousand studies holds up no other."""
    by_tenant: dict[str, list[Spooled]] = {}
    for item in waiting:
        by_tenant.setdefault(item.tenant, []).append(item)
    in_turn = chain.from_iterable(zip_longest(*by_tenant.values()))
    return list(islice((item for item in in_turn if item is not None), limit))


def _study_key(item: Arrival) -> tuple[str, str, str]:
    source, header = item.source, item.described.header
    return source.tenant, source.origin, header.study_instance_uid
