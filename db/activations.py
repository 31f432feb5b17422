"""Which version of a bundle serves a tenant: rows that are only ever added; the newest counts."""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from sqlalchemy import ColumnElement, Select, Subquery, func, select, union
from sqlalchemy.orm import Session, aliased

from db.errors import PermanentError
from db.job import JobKind, JobState
from db.tables import ActivationRow, AnalysisRow, AuditRow, JobRow

#: Held by whoever adds rows: two at once would both take the same row for the one before theirs.
_LOCK = 0x6D6F646C  # "modl"


class NothingBefore(PermanentError):
    """There is nothing that a rollback could lead to."""

    code: ClassVar[str] = "nothing_before"


class Version(NamedTuple):
    """What serves: a bundle, and where its files lie."""

    bundle: str
    folder: str  # under data_dir/models; "": as the configuration has it


@dataclass(frozen=True, slots=True)
class Installed:
    """A version whose files lie under data_dir/models, and by what they are known again."""

    bundle: str
    version: str
    calibration_id: str
    weights_sha256: str
    manifest_sha256: str

    @property
    def label(self) -> str:
        """The version as people read it; the calibration is part of what makes the numbers."""
        return f"{self.version}+{self.calibration_id}"

    @property
    def folder(self) -> str:
        return f"{self.bundle}/{self.label}"

    def contradicts(self, other: "Installed") -> bool:
        """Whether both go by one number and are not the same, calibrations aside."""
        return (self.bundle, self.version) == (other.bundle, other.version) and (
            (self.weights_sha256, self.manifest_sha256)
            != (other.weights_sha256, other.manifest_sha256)
        )


@dataclass(frozen=True, slots=True)
class Activation:
    """What a tenant has active, since when, and what was before."""

    installed: Installed
    actor: str
    since: dt.datetime
    before: Installed | None  # where a rollback leads


def newest() -> Subquery:
    """One row for each tenant and bundle that has any: which folder serves."""
    return (
        select(ActivationRow.tenant, ActivationRow.bundle, ActivationRow.folder)
        .where(ActivationRow.id.in_(_newest_ids()))
        .subquery("newest")
    )


def _newest_ids() -> Select[int]:
    return select(func.max(ActivationRow.id)).group_by(ActivationRow.tenant, ActivationRow.bundle)


def folder_that_serves(serving: Subquery) -> ColumnElement[str]:
    """Of a query that is outer-joined to `newest`: no row means the configured folder."""
    return func.coalesce(serving.c.folder, "")


def current(session: Session) -> dict[tuple[str, str], Activation]:
    """What is active, by tenant and bundle; who is not in it has the configured folder."""
    before = aliased(ActivationRow)
    rows = session.execute(
        select(ActivationRow, before)
        .outerjoin(before, before.id == ActivationRow.before_id)
        .where(ActivationRow.id.in_(_newest_ids()))
    )
    return {
        (row.tenant, row.bundle): Activation(
            _installed(row), row.actor, row.at, _installed(old) if old else None
        )
        for row, old in rows
    }


def at_work(session: Session) -> set[tuple[str, str]]:
    """Tenant and bundle of what is still to be judged or analysed, whatever is configured now."""
    queued = (
        select(JobRow.tenant, AnalysisRow.bundle)
        .join(AnalysisRow, AnalysisRow.id == JobRow.analysis_id)
        .where(JobRow.kind == JobKind.INFER, JobRow.state == JobState.TODO)
    )
    due = select(AnalysisRow.tenant, AnalysisRow.bundle).where(AnalysisRow.judge_at.is_not(None))
    return {(tenant, bundle) for tenant, bundle in session.execute(union(queued, due))}


def contradiction(session: Session, installed: Installed) -> Installed | None:
    """What was once active under the same number and is not the same."""
    rows = session.scalars(
        select(ActivationRow).where(
            ActivationRow.bundle == installed.bundle, ActivationRow.version == installed.version
        )
    )
    return next((one for row in rows if (one := _installed(row)).contradicts(installed)), None)


def lock(session: Session) -> None:
    """Keep others from adding rows until the transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(_LOCK)))


def activate(
    session: Session,
    tenant: str,
    installed: Installed,
    *,
    actor: str,
    baseline: Installed | None = None,
    detail: Mapping[str, str] | None = None,
) -> bool:
    """Let a version serve a tenant from now on; False where it does already.

    baseline : what has served by configuration alone. It gets a row of its own, so that a rollback
        leads back to it whatever becomes of the configured folder.
    detail : further words for the audit
    """
    lock(session)
    now = _newest_row(session, tenant, installed.bundle)
    if now is not None and _installed(now) == installed:
        return False
    if now is None and baseline is not None and baseline != installed:
        now = _add(session, tenant, baseline, action="baseline", actor=actor, before_id=None)
    before_id = now.id if now is not None else None
    _add(session, tenant, installed, action="activate", actor=actor, before_id=before_id)
    _audit(session, tenant, "model_activate", actor, installed, now, detail or {})
    return True


def rollback_target(session: Session, tenant: str, bundle: str) -> Installed:
    """What was active before the present version.

    Raises
    ------
    NothingBefore
    """
    return _installed(_before(session, tenant, bundle))


def roll_back(
    session: Session,
    tenant: str,
    bundle: str,
    *,
    actor: str,
    detail: Mapping[str, str] | None = None,
) -> Installed:
    """Go back to what was active before; once more leads further back, never forth again.

    detail : further words for the audit

    Raises
    ------
    NothingBefore
    """
    lock(session)
    now, target = _newest_row(session, tenant, bundle), _before(session, tenant, bundle)
    installed = _installed(target)
    _add(session, tenant, installed, action="rollback", actor=actor, before_id=target.before_id)
    _audit(session, tenant, "model_rollback", actor, installed, now, detail or {})
    return installed


def _before(session: Session, tenant: str, bundle: str) -> ActivationRow:
    now = _newest_row(session, tenant, bundle)
    if now is None:
        raise NothingBefore(f"{tenant}: no version of {bundle} was ever activated")
    if now.before_id is None:
        label = _installed(now).label
        raise NothingBefore(f"{tenant}: nothing was active before {bundle} {label}")
    return session.get_one(ActivationRow, now.before_id)


def _newest_row(session: Session, tenant: str, bundle: str) -> ActivationRow | None:
    return session.scalar(
        select(ActivationRow)
        .where(ActivationRow.tenant == tenant, ActivationRow.bundle == bundle)
        .order_by(ActivationRow.id.desc())
        .limit(1)
    )


def _add(
    session: Session,
    tenant: str,
    installed: Installed,
    *,
    action: str,
    actor: str,
    before_id: int | None,
) -> ActivationRow:
    row = ActivationRow(
        tenant=tenant,
        bundle=installed.bundle,
        version=installed.version,
        calibration_id=installed.calibration_id,
        weights_sha256=installed.weights_sha256,
        manifest_sha256=installed.manifest_sha256,
        folder=installed.folder,
        action=action,
        before_id=before_id,
        actor=actor,
    )
    session.add(row)
    session.flush()
    return row


def _audit(
    session: Session,
    tenant: str,
    action: str,
    actor: str,
    installed: Installed,
    before: ActivationRow | None,
    further: Mapping[str, str],
) -> None:
    detail: Mapping[str, str] = {
        **further,
        "weights_sha256": installed.weights_sha256,
        "before": _installed(before).label if before is not None else "",
    }
    target = f"{installed.bundle} {installed.label}"
    session.add(
        AuditRow(tenant=tenant, actor=actor, action=action, target=target, detail=dict(detail))
    )
    session.flush()


def _installed(row: ActivationRow) -> Installed:
    return Installed(
        row.bundle, row.version, row.calibration_id, row.weights_sha256, row.manifest_sha256
    )
