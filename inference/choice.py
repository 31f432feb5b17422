"""Which of a study's stored images a bundle analyses."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog
from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from db.errors import CutOff
from db.header import InstanceHeader
from db.result import Eligibility
from db.tables import InstanceRow, QuarantineRow
from inference.eligibility import Selection, judge
from inference.manifest import Manifest

log = structlog.get_logger()


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
