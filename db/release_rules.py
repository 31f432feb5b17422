"""What an operator may release, and why not: nothing that would mix identities in a study."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import filing, replaced, withdrawals
from db.aside import Arrival
from db.errors import CutOff, NotDicom, PermanentError, StaleAnalysis
from db.identity import (
    conflict,
    is_same_patient,
    names_somebody,
    patient_differences,
    uid_trouble,
    who,
)
from db.tables import DeliveryRow, InstanceRow, ObjectRow, QuarantineRow, StudyRow

CONFLICT, SECOND_PATIENT, MISMATCH = "identity_conflict", "second_patient", "uid_mismatch"
#: Reasons of which an operator may think otherwise; what release means for each is in `outlook`.
RELEASABLE = frozenset({CONFLICT, SECOND_PATIENT, MISMATCH, replaced.CODE})


class CannotBeReleased(PermanentError):
    """What was set aside may not join a study, whatever an operator thinks of it."""

    code: ClassVar[str] = "cannot_be_released"


class ResultsOut(PermanentError):
    """Results under the identity that is to change are out: they must be withdrawn first."""

    code: ClassVar[str] = "results_out"


def outlook(code: str) -> str:
    """What releasing something that was set aside for this reason means, or why it cannot be."""
    return _OUTLOOK.get(code, "cannot be released: it could not be read. Have it sent again")


_OUTLOOK: Mapping[str, str] = {
    CONFLICT: "takes the place of the first, which is set aside; of another patient: only with all"
    " of its study",
    SECOND_PATIENT: "only with all of its study, if that is to be this patient's. Else have it sent"
    " under another Study Instance UID",
    MISMATCH: "is filed under the UID that stands in the image, if that is free",
    replaced.CODE: "takes its place again",
    "missing_uid": "cannot be released: it lacks a UID, and cannot be filed. Have it sent right",
    "bad_uid": "cannot be released: under such UIDs it cannot be filed. Have it sent right",
    CutOff.code: "cannot be released: it ends in the middle. Have it sent whole",
    NotDicom.code: "cannot be released: it is no DICOM data set",
    "cannot_be_filed": "cannot be released: the database does not accept its header",
}


def without_doubles(arrivals: Sequence[Arrival]) -> tuple[list[Arrival], list[Arrival]]:
    """One of each UID, and the others, which say the same."""
    kept: dict[str, Arrival] = {}
    doubles: list[Arrival] = []
    for item in arrivals:
        before = kept.setdefault(item.uid, item)
        if before is item:
            continue
        same = ("pixel_sha256", "identity_sha256")
        if any(getattr(before.described, name) != getattr(item.described, name) for name in same):
            raise CannotBeReleased(
                f"{before.spooled.id} and {item.spooled.id} contradict each other: discard one"
            )
        doubles.append(item)
    return list(kept.values()), doubles


def check_fit(session: Session, arrival: Arrival) -> None:
    """Refuse what no study may hold: without usable UIDs, or of our own making."""
    trouble = uid_trouble(arrival.described, arrival.source)
    if trouble is not None and trouble.code != MISMATCH:
        raise CannotBeReleased(trouble.reason)
    issued = session.scalar(
        select(ObjectRow.id).where(ObjectRow.sop_instance_uid == arrival.uid).limit(1)
    )
    if arrival.described.is_ours or issued is not None:
        raise CannotBeReleased("it is a result of ours")


def check_place(
    study: StudyRow,
    first: InstanceRow,
    arrival: Arrival,
    row: QuarantineRow,
    told: tuple[str, ...] | None,
) -> None:
    """Refuse to put something in the place of an instance where that would mix identities.

    told : whom the instance names
    """
    if first.stored_at is None:
        raise StaleAnalysis("the instance that was there first is not stored yet")
    if conflict(filing.stored(study, first), arrival.described) is None:
        raise CannotBeReleased("the study has the same image already: discard it")
    if row.code == MISMATCH:
        raise CannotBeReleased(
            "the UID that stands in it is taken by another image: have it sent under a UID of its"
            " own, and discard it"
        )
    patient = arrival.described.patient
    if who(patient) not in (told, who(filing.patient_of(study))):
        differing = [one.what for one in patient_differences(filing.patient_of(study), patient)]
        raise CannotBeReleased(
            f"it differs in {', '.join(differing)}, and a study is one patient's: when all of the"
            f" study has come again so, `vigil quarantine release --study {study.public_id}`"
        )


def _check_nothing_out(session: Session, study: StudyRow) -> None:
    out = session.scalars(
        select(DeliveryRow.destination)
        .where(DeliveryRow.study_id == study.id, withdrawals.is_out())
        .distinct()
    ).all()
    if out:
        raise ResultsOut(
            f"results under the present identity are out at {', '.join(sorted(out))}:"
            f" `vigil withdraw {study.public_id}` first"
        )


def check_study(session: Session, arrival: Arrival, study: StudyRow | None) -> None:
    """Refuse what may be in no study, or not in the one that it says it is of."""
    check_fit(session, arrival)
    patient = arrival.described.patient
    if study is not None and not is_same_patient(filing.patient_of(study), patient):
        raise CannotBeReleased(
            "it is of another patient than its study. If the study is wrong, all of it must"
            f" come again as that patient: then `vigil quarantine release --study"
            f" {study.public_id}`. If the image is wrong, have it sent under another Study"
            " Instance UID, and discard it"
        )


def check_correction(
    session: Session,
    study: StudyRow,
    arrivals: Sequence[Arrival],
    others: Sequence[tuple[str, ...]],
) -> bool:
    """Refuse what would mix identities; returns whether the study's own changes.

    others : whom those instances name that have not come again
    """
    for item in arrivals:
        check_fit(session, item)
        if item.described.header.study_instance_uid != study.study_instance_uid:
            raise CannotBeReleased(f"{item.spooled.id} says it is of another study: discard it")
    named = {who(item.described.patient) for item in arrivals}
    if len(named) > 1:
        raise CannotBeReleased(
            f"what is set aside names {len(named)} patients: discard what is wrong first"
        )
    (new,) = named
    patient = arrivals[0].described.patient
    if not names_somebody(patient):
        raise CannotBeReleased("it names nobody: neither a patient ID nor a name")
    if new == who(filing.patient_of(study)):
        return False
    if n := sum(1 for old in others if old != new):
        raise CannotBeReleased(
            f"{n} of the study's {study.n_instances} instances have not come again as that"
            " patient; a study is one patient's. It stays held: have all of it sent again"
        )
    _check_nothing_out(session, study)
    return True
