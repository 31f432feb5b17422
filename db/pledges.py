"""What we vouch for: the answers that senders are owed who asked for storage commitment.

A modality deletes its own copy on our word, so we give it only for what lies in the store, is
filed under the UIDs asked for, and is not in doubt.
"""

import datetime as dt
import uuid
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db import reach, studies, transaction
from db.clock import is_past
from db.files import store_path
from db.meta import Provenance
from db.tables import InstanceRow, PledgeRow, QuarantineRow, ReturnedRow
from db.transaction import Item, Transaction

#: After that the sender will have asked again, or keeps its copy.
EXPIRE = dt.timedelta(hours=72)
_LEASE = dt.timedelta(minutes=2)
_MOST_UIDS = 5_000  # of one query


class PledgeState(StrEnum):
    WAITING = "WAITING"  # the sender is still to be told
    REPORTED = "REPORTED"
    EXPIRED = "EXPIRED"  # it could not be told in time


@dataclass(frozen=True, slots=True)
class ClaimedPledge:
    """An answer that this worker is about to give."""

    id: uuid.UUID
    tenant: str
    sender: str
    called_ae: str
    address: str
    attempts: int
    answer: Transaction


def owe(
    session: Session, data_dir: Path, request_id: uuid.UUID, source: Provenance, asked: Transaction
) -> None:
    """Judge a request and owe its answer; the same request again changes nothing."""
    answer = _judge(session, data_dir, source, asked)
    made = session.scalar(
        insert(PledgeRow)
        .values(
            id=request_id,
            tenant=source.tenant,
            sender=source.calling_ae.strip(),
            called_ae=source.called_ae.strip(),
            address=source.address,
            answer=answer.to_json(),
            expires_at=func.now() + EXPIRE,
        )
        .on_conflict_do_nothing()
        .returning(PledgeRow.id)
    )
    if made is not None:
        studies.record(
            session,
            "commitment_judged",
            tenant=source.tenant,
            origin=source.origin,
            sender=source.calling_ae.strip(),
            n_kept=len(answer.kept),
            n_failed=len(answer.failed),
        )
        studies.notify(session)


def _judge(session: Session, data_dir: Path, source: Provenance, asked: Transaction) -> Transaction:
    items = list(dict.fromkeys(replace(one, failure=None) for one in asked.items))
    answered: list[Item] = []
    for start in range(0, len(items), _MOST_UIDS):
        answered += _judged(session, data_dir, source, items[start : start + _MOST_UIDS])
    return Transaction(asked.uid, tuple(answered))


def _judged(
    session: Session, data_dir: Path, source: Provenance, items: Collection[Item]
) -> list[Item]:
    uids = {one.sop_instance_uid for one in items}
    kept = {
        row.sop_instance_uid: row
        for row in session.scalars(
            select(InstanceRow).where(
                InstanceRow.tenant == source.tenant,
                InstanceRow.origin == source.origin,
                InstanceRow.sop_instance_uid.in_(uids),
                InstanceRow.stored_at.is_not(None),
            )
        )
    }
    # What this sender sent may be the one that was set aside: then it must not delete its copy.
    in_doubt = set(
        session.scalars(
            select(QuarantineRow.sop_instance_uid).where(
                QuarantineRow.tenant == source.tenant,
                QuarantineRow.sop_instance_uid.in_(uids),
                QuarantineRow.sender == source.calling_ae.strip(),
                QuarantineRow.state != "RELEASED",
            )
        )
    )
    kept_out = set(
        session.scalars(
            select(ReturnedRow.sop_instance_uid).where(
                ReturnedRow.tenant == source.tenant, ReturnedRow.sop_instance_uid.in_(uids)
            )
        )
    )

    def failure(item: Item) -> int | None:
        uid = item.sop_instance_uid
        row = kept.get(uid)
        if uid in in_doubt or uid in kept_out:
            return transaction.PROCESSING_FAILURE
        if row is None:
            return transaction.NO_SUCH_INSTANCE
        if row.sop_class_uid != item.sop_class_uid:
            return transaction.CLASS_INSTANCE_CONFLICT
        is_there = store_path(data_dir, row.tenant, row.study_id, row.id).is_file()
        return None if is_there else transaction.PROCESSING_FAILURE

    return [replace(one, failure=failure(one)) for one in items]


def claim_due(session: Session) -> ClaimedPledge | None:
    """The next answer to give; commit before giving it."""
    row = session.scalar(
        select(PledgeRow)
        .where(
            PledgeRow.state == PledgeState.WAITING,
            is_past(PledgeRow.run_after, dt.timedelta(seconds=reach.MAX_BACKOFF_S)),
        )
        .order_by(PledgeRow.run_after)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if row is None:
        return None
    row.attempts += 1
    row.run_after = func.now() + _LEASE
    session.flush()
    return ClaimedPledge(
        id=row.id,
        tenant=row.tenant,
        sender=row.sender,
        called_ae=row.called_ae,
        address=row.address,
        attempts=row.attempts,
        answer=Transaction.from_json(row.answer),
    )


def reported(session: Session, pledge: ClaimedPledge) -> None:
    """The sender has the answer; whatever else it waits for may go now."""
    _end(session, pledge, PledgeState.REPORTED, "")
    session.execute(
        update(PledgeRow)
        .where(
            *_of_same_sender(pledge),
            PledgeRow.state == PledgeState.WAITING,
            PledgeRow.error_code != "",
        )
        .values(run_after=func.now(), error_code="")
    )
    _record(session, pledge, "commitment_reported")


def put_off(session: Session, pledge: ClaimedPledge, error_code: str) -> None:
    """It could not be told now: all that this sender is owed waits, longer each time."""
    is_over = session.scalar(
        select(func.now() >= PledgeRow.expires_at).where(PledgeRow.id == pledge.id)
    )
    if is_over:
        _end(session, pledge, PledgeState.EXPIRED, error_code)
        _record(session, pledge, "commitment_not_reported", is_alarm=True, reason_code=error_code)
        return
    wait = reach.backoff(pledge.attempts)
    session.execute(
        update(PledgeRow)
        .where(*_of_same_sender(pledge), PledgeRow.state == PledgeState.WAITING)
        .values(run_after=func.now() + wait, error_code=error_code)
    )


def _of_same_sender(pledge: ClaimedPledge) -> tuple[ColumnElement[bool], ...]:
    return (
        PledgeRow.tenant == pledge.tenant,
        PledgeRow.sender == pledge.sender,
        PledgeRow.address == pledge.address,
    )


def _end(session: Session, pledge: ClaimedPledge, state: PledgeState, error_code: str) -> None:
    session.execute(
        update(PledgeRow)
        .where(PledgeRow.id == pledge.id, PledgeRow.state == PledgeState.WAITING)
        .values(state=state, error_code=error_code, finished_at=func.now())
    )


def _record(
    session: Session,
    pledge: ClaimedPledge,
    kind: str,
    *,
    is_alarm: bool = False,
    reason_code: str = "",
) -> None:
    studies.record(
        session,
        kind,
        tenant=pledge.tenant,
        origin="dicom",
        is_alarm=is_alarm,
        sender=pledge.sender,
        n_kept=len(pledge.answer.kept),
        n_failed=len(pledge.answer.failed),
        reason_code=reason_code,
    )
