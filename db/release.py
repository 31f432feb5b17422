"""Releasing what was set aside: the newcomer is right, and joins its study or takes a place there.

    files linked under their new names -> rows committed -> old names unlinked

Killed anywhere, either nothing has happened (and a name too many is left, of which no row speaks),
or all has (and an old name is left). Everything is decided anew under the study's lock, so that an
intake of the same study comes either wholly before or wholly after.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from config.settings import Settings
from db import filing, operator, replaced, studies
from db.aside import Arrival
from db.describe import describe
from db.errors import NodeError, StaleAnalysis
from db.faults import point
from db.files import link_all, quarantine_path, store_path
from db.identity import Described, who
from db.release_rules import (
    RELEASABLE,
    CannotBeReleased,
    check_correction,
    check_place,
    check_study,
    outlook,
    without_doubles,
)
from db.sandbox import Sandbox
from db.spool import Spooled, read_provenance
from db.tables import (
    AuditRow,
    InstanceRow,
    QuarantineRow,
    StudyRow,
)

_READ_S = 120.0
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Released:
    """What a release did, for whoever asked for it."""

    study: str  # public id
    released: tuple[str, ...]  # ids of what is in the study now
    replaced: tuple[str, ...]  # ids of what stood in their place, and is set aside
    is_other_patient: bool  # the study's identity was corrected
    is_held: bool  # still: another conflict is open


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be done, as it was decided under the lock."""

    rows: Sequence[QuarantineRow]  # released
    doubles: Sequence[QuarantineRow]  # the same once more: discarded
    arrivals: Sequence[Arrival]  # of `rows`
    firsts: Sequence[InstanceRow]  # whose place they take
    is_other_patient: bool


class Release:
    """An operator's decisions that a newcomer is right; each is made as a whole, or refused."""

    def __init__(self, engine: Engine, settings: Settings, sandbox: Sandbox, actor: str) -> None:
        self._engine, self._settings, self._sandbox = engine, settings, sandbox
        self._data_dir, self._actor = settings.node.data_dir, actor

    def one(self, key: uuid.UUID) -> Released:
        """Release one newcomer, which leaves its study one patient's.

        Raises
        ------
        operator.NotOpen, CannotBeReleased
        """
        return _tried_again(lambda: self._one(key))

    def study(self, study_id: int) -> Released:
        """Release all that is set aside in conflict with a study, as a correction of it.

        If they name another patient, each instance of the study must have come again as that
        patient: the identity of a study is never mixed.

        Raises
        ------
        operator.NotOpen, CannotBeReleased, ResultsOut
        """
        return _tried_again(lambda: self._study(study_id))

    def _one(self, key: uuid.UUID) -> Released:
        with Session(self._engine) as session:
            row = _still(session, key)
            arrival = self._read(row)
            first = _instance(session, arrival)
            told = self._who_of(first) if first is not None else None
        with Session(self._engine) as session, session.begin():
            study = filing.locked(session, arrival.source, arrival.described)
            row = _still(session, key)
            present = _instance(session, arrival)
            if (present and present.id) != (first and first.id):
                raise StaleAnalysis("another instance has its place meanwhile")
            check_study(session, arrival, study)
            if present is None:
                study = study or filing.created(session, self._settings.tenant(row.tenant), arrival)
            elif study is None or present.study_id != study.id:
                raise CannotBeReleased(
                    "its SOP Instance UID is taken by an image of another study than it says it is"
                    " of: have it sent under a UID of its own, and discard it"
                )
            else:
                check_place(study, present, arrival, row, told)
            firsts = [present] if present is not None else []
            plan = _Plan([row], [], [arrival], firsts, is_other_patient=False)
            done, old_names = self._carry_out(session, study, plan)
        return self._concluded(done, old_names)

    def _study(self, study_id: int) -> Released:
        with Session(self._engine) as session:
            rows = _candidates(session, study_id)
            if not rows:
                raise operator.NotOpen("nothing is set aside that contradicts this study")
            arrivals = [self._read(row) for row in rows]
            kept, doubles = without_doubles(arrivals)
            uids = {item.uid for item in kept}
            others = [
                one for one in _instances(session, study_id) if one.sop_instance_uid not in uids
            ]
            told = {one.id: self._who_of(one) for one in others}
        with Session(self._engine) as session, session.begin():
            studies.lock(session, study_id)
            study = session.get_one(StudyRow, study_id)
            rows = _candidates(session, study_id)
            present = _instances(session, study_id)
            firsts = [one for one in present if one.sop_instance_uid in uids]
            if {row.id for row in rows} != {item.spooled.id for item in arrivals} or {
                one.id for one in present
            } - {one.id for one in firsts} != told.keys():
                raise StaleAnalysis("something of the study arrived meanwhile")
            is_other = check_correction(session, study, kept, list(told.values()))
            by_id = {row.id: row for row in rows}
            plan = _Plan(
                rows=[by_id[item.spooled.id] for item in kept],
                doubles=[by_id[item.spooled.id] for item in doubles],
                arrivals=kept,
                firsts=firsts,
                is_other_patient=is_other,
            )
            done, old_names = self._carry_out(session, study, plan)
        return self._concluded(done, old_names)

    def _carry_out(
        self, session: Session, study: StudyRow, plan: _Plan
    ) -> tuple[Released, list[Path]]:
        """Rows and links of a decision; returns the names that are over once it is committed."""
        tenant = self._settings.tenant(study.tenant)
        if plan.is_other_patient:
            for name in filing.PATIENT:
                setattr(study, name, plan.arrivals[0].described.patient[name])
        by_uid = {item.uid: item.spooled.id for item in plan.arrivals}
        pairs = [
            (
                store_path(self._data_dir, study.tenant, study.id, one.id),
                quarantine_path(self._data_dir, study.tenant, one.id),
            )
            for one in plan.firsts
        ]
        pairs = [(old, new) for old, new in pairs if old.exists()]  # else the disk has lost it
        for one in plan.firsts:
            replaced.set_aside(session, one, by_uid[one.sop_instance_uid], actor=self._actor)
        study.n_instances -= len(plan.firsts)
        session.flush()
        if filing.accept(session, study, tenant, plan.arrivals) != len(plan.arrivals):
            raise StaleAnalysis("another intake has just filed it")
        pairs += [
            (item.spooled.path, store_path(self._data_dir, study.tenant, study.id, item.spooled.id))
            for item in plan.arrivals
        ]
        for row in plan.rows:
            replaced.decide(row, "RELEASED", self._actor)
            row.study_id = study.id
        for row in plan.doubles:
            replaced.decide(row, "DISCARDED", self._actor)
        gone = {str(one.id) for one in plan.firsts}
        replaced.reopen(session, study.id, gone, is_other_patient=plan.is_other_patient)
        operator.hold_while_open(session, study.id)
        done = Released(
            study=str(study.public_id),
            released=tuple(str(row.id) for row in plan.rows),
            replaced=tuple(sorted(gone)),
            is_other_patient=plan.is_other_patient,
            is_held=study.is_held,
        )
        self._record(session, study, done)
        link_all(pairs)
        session.execute(
            update(InstanceRow)
            .where(InstanceRow.id.in_([item.spooled.id for item in plan.arrivals]))
            .values(stored_at=func.now())
        )
        point("release_linked")
        return done, [old for old, _ in pairs]

    def _concluded(self, done: Released, old_names: Sequence[Path]) -> Released:
        point("release_committed")
        for path in old_names:
            path.unlink(missing_ok=True)
        return done

    def _record(self, session: Session, study: StudyRow, done: Released) -> None:
        studies.record(
            session,
            "quarantine_released",
            tenant=study.tenant,
            origin=study.origin,
            study_id=study.id,
            n_instances=len(done.released),
            n_replaced=len(done.replaced),
            is_other_patient=done.is_other_patient,
            by=self._actor,
        )
        for key in done.released:
            session.add(
                AuditRow(
                    tenant=study.tenant,
                    actor=self._actor,
                    action="quarantine_release",
                    target=key,
                    detail={"study": done.study, "is_other_patient": done.is_other_patient},
                )
            )

    def _read(self, row: QuarantineRow) -> Arrival:
        """What the file of a quarantined instance says, read as intake reads."""
        if row.code not in RELEASABLE:
            raise CannotBeReleased(outlook(row.code).removeprefix("cannot be released: "))
        path = quarantine_path(self._data_dir, row.tenant, row.id).resolve()
        if not path.exists():
            raise CannotBeReleased("its file is not there (yet): look again in a moment")
        described = self._described(path)
        source = read_provenance(path)
        return Arrival(Spooled(row.id, row.tenant, path), source, described, path.stat().st_size)

    def _who_of(self, row: InstanceRow) -> tuple[str, ...]:
        path = store_path(self._data_dir, row.tenant, row.study_id, row.id).resolve()
        if not path.exists():
            raise StaleAnalysis("an instance of the study is not in the store yet")
        return who(self._described(path).patient)

    def _described(self, path: Path) -> Described:
        try:
            value, _ = self._sandbox.run(describe, str(path), timeout_s=_READ_S)
        except NodeError as error:
            raise CannotBeReleased(f"a file cannot be read any more ({error.code})") from error
        return Described.from_json(value)


def _tried_again(work: Callable[[], Released]) -> Released:
    """An intake of the same study may come between reading and deciding: read again then."""
    for _ in range(_TRIES - 1):
        try:
            return work()
        except StaleAnalysis:
            continue
    return work()


def _still(session: Session, key: uuid.UUID) -> QuarantineRow:
    """A row of which may be decided; also one that was discarded by mistake."""
    row = session.get(QuarantineRow, key, with_for_update=True, populate_existing=True)
    if row is None:
        raise operator.NotOpen("nothing in the quarantine goes by this id")
    if row.state == "RELEASED":
        raise operator.NotOpen("it was released already")
    return row


def _candidates(session: Session, study_id: int) -> Sequence[QuarantineRow]:
    """What contradicts a study and is undecided; where nothing is, what was replaced in it."""
    ours = QuarantineRow.study_id == study_id
    is_open = (QuarantineRow.state == "OPEN") & QuarantineRow.is_conflict
    for which in (
        is_open,
        (QuarantineRow.code == replaced.CODE) & (QuarantineRow.state != "RELEASED"),
    ):
        rows = session.scalars(
            select(QuarantineRow).where(ours, which).order_by(QuarantineRow.at)
        ).all()
        if rows:
            return rows
    return []


def _instance(session: Session, arrival: Arrival) -> InstanceRow | None:
    return session.scalar(
        select(InstanceRow).where(
            InstanceRow.tenant == arrival.source.tenant,
            InstanceRow.origin == arrival.source.origin,
            InstanceRow.sop_instance_uid == arrival.uid,
        )
    )


def _instances(session: Session, study_id: int) -> Sequence[InstanceRow]:
    return session.scalars(select(InstanceRow).where(InstanceRow.study_id == study_id)).all()
