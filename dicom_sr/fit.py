"""Whether what was built still fits its study as that is now: held back where it does not (H8)."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from db import replaced
from db.describe import describe
from db.identity import is_same_patient
from db.notices import Notice
from db.result import Finding
from db.sandbox import Sandbox
from db.tables import StudyRow
from dicom_sr.inputs import READ_TIMEOUT_S, Subject
from dicom_sr.push import Parcel

OTHER_PATIENT = "study_changed"
INPUTS_REPLACED = "inputs_replaced"


def why_not(session: Session, sandbox: Sandbox, subject: Subject, parcels: Sequence[Parcel]) -> str:
    """Why a result or notice may not be sent; empty where it may.

    An operator has replaced an image that it rests on, or corrected whose study it is.
    """
    if replaced.any_of(session, images_of(subject)):
        return INPUTS_REPLACED
    study = session.get_one(StudyRow, subject.study_id)
    return "" if not parcels or _is_about(sandbox, parcels[0], study) else OTHER_PATIENT


def images_of(subject: Subject) -> list[str]:
    """Ids of the instances that a result or notice rests on; of a withdrawal there are none."""
    if isinstance(subject.content, Finding):
        return [image.instance_id for image in subject.content.images]
    return [subject.content.source.instance_id] if isinstance(subject.content, Notice) else []


def _is_about(sandbox: Sandbox, parcel: Parcel, study: StudyRow) -> bool:
    """Whether the object still names the patient and study that the row names now."""
    path = str(parcel.path.resolve())  # the child runs in another folder
    told, _ = sandbox.run(describe, path, timeout_s=READ_TIMEOUT_S)
    same_study: bool = told["header"]["study_instance_uid"] == study.study_instance_uid
    return same_study and is_same_patient(told["patient"], _patient_of(study))


def _patient_of(study: StudyRow) -> dict[str, str]:
    return {
        "patient_id": study.patient_id,
        "issuer_of_patient_id": study.issuer_of_patient_id,
        "patient_name": study.patient_name,
        "patient_birth_date": study.patient_birth_date,
    }
