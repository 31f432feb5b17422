"""What we vouch for: the answers that senders are owed who asked for storage commitment.

A modality deletes its own copy on our word, so we give it only for what lies in the store, is
filed under the UIDs asked for, and is not in doubt.
"""

import datetime as dt
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db import reach, studies, transaction
from db.clock import is_past
from db.files import store_path
from db.filing import VARIANT_DROPPED
from db.meta import Provenance
from db.tables import EventRow, InstanceRow, PledgeRow, QuarantineRow, ReturnedRow
from db.transaction import Item, Transaction

#: After that the sender will have asked again, or keeps its copy.
EXPIRE = dt.timedelta(hours=72)
#: The sender has left the configuration, or listens nowhere any more.
NO_ADDRESS = "no_address"
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
    in_doubt = _set_aside(session, source, uids, kept) | _unlike(session, source, kept)
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


def _set_aside(
    session: Session, source: Provenance, uids: Collection[str], kept: Mapping[str, InstanceRow]
) -> set[str]:
    """UIDs of which the asker's own instance may be one that was set aside.

    It is not where he sent the one that is filed, and nothing that lies there. What another sender
    set aside may have come from him as well: the same data set is kept there once.
    """
    caller = source.calling_ae.strip()
    rows = session.execute(
        select(QuarantineRow.sop_instance_uid, QuarantineRow.sender).where(
            QuarantineRow.tenant == source.tenant,
            QuarantineRow.sop_instance_uid.in_(uids),
            QuarantineRow.state != "RELEASED",
        )
    )
    return {
        uid
        for uid, sender in rows
        if sender.strip() == caller or (uid in kept and kept[uid].sender.strip() != caller)
    }


def _unlike(session: Session, source: Provenance, kept: Mapping[str, InstanceRow]) -> set[str]:
    """UIDs of which the asker's own instance may be a variant in another encoding, and so dropped.

    Nobody has compared the pixels of the two: one may be lossy.
    """
    caller, by_id = source.calling_ae.strip(), {str(row.id): row for row in kept.values()}
    variants = session.scalars(
        select(EventRow.detail).where(
            EventRow.study_id.in_({row.study_id for row in kept.values()}),
            EventRow.kind == VARIANT_DROPPED,
        )
    )
    return {
        by_id[one["instance_id"]].sop_instance_uid
        for one in variants
        if one["instance_id"] in by_id
        and not one["is_same_encoding"]
        and (one["sender"] == caller or by_id[one["instance_id"]].sender.strip() != caller)
    }


def claim_due(session: Session) -> ClaimedPledge | None:
    """The next answer to give; commit before giving it."""
    row = session.scalar(
        select(PledgeRow)
        .where(
            PledgeRow.state == PledgeState.WAITING,
            is_past(PledgeRow.run_after, dt.timedelta(seconds=reach.MAX_BACKOFF_S)),
        )
        .order_by(PledgeRow.run_after, PledgeRow.attempts, PledgeRow.created_at)
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
    session.execute(
        update(PledgeRow)
        .where(PledgeRow.id == pledge.id, PledgeRow.state == PledgeState.WAITING)
        .values(state=PledgeState.REPORTED, error_code="", finished_at=func.now())
    )
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
    """It could not be told now, and waits, longer each time.

    Where the sender cannot be reached, all that it is owed waits, and ends with what is too old;
    what it refuses is that answer's own trouble.
    """
    is_away = error_code == NO_ADDRESS or reach.is_unreachable(error_code)
    which = _of_same_sender(pledge) if is_away else (PledgeRow.id == pledge.id,)
    expired = session.scalars(
        update(PledgeRow)
        .where(*which, PledgeRow.state == PledgeState.WAITING, PledgeRow.expires_at <= func.now())
        .values(state=PledgeState.EXPIRED, error_code=error_code, finished_at=func.now())
        .returning(PledgeRow.answer)
    ).all()
    for answer in expired:
        late = replace(pledge, answer=Transaction.from_json(answer))
        _record(session, late, "commitment_not_reported", is_alarm=True, reason_code=error_code)
    session.execute(
        update(PledgeRow)
        .where(*which, PledgeRow.state == PledgeState.WAITING)
        .values(run_after=func.now() + reach.backoff(pledge.attempts), error_code=error_code)
    )


def _of_same_sender(pledge: ClaimedPledge) -> tuple[ColumnElement[bool], ...]:
    return (
        PledgeRow.tenant == pledge.tenant,
        PledgeRow.sender == pledge.sender,
        PledgeRow.address == pledge.address,
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
