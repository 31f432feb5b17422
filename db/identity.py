"""Whose instance it is: the rules by which intake files, or sets aside, what has arrived."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from db.header import InstanceHeader
from db.meta import Provenance
from db.pixel_digest import encoding_of

# PS3.5 9.1, less strict: a leading zero in a component is common and harms nobody.
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_MAX_UID = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What `db.describe` found in a file."""

    header: InstanceHeader
    patient: Mapping[str, str]
    pixel_sha256: str
    identity_sha256: str
    is_ours: bool

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Described":
        return cls(
            header=InstanceHeader.from_json(value["header"]),
            patient={str(key): str(text) for key, text in value["patient"].items()},
            pixel_sha256=str(value["pixel_sha256"]),
            identity_sha256=str(value["identity_sha256"]),
            is_ours=bool(value["is_ours"]),
        )


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why an instance may not join its study; `reason` is for a person and names no patient."""

    code: str
    reason: str
    is_conflict: bool = False  # holds the study: the newcomer may be the correction


def uid_trouble(found: Described, source: Provenance) -> Trouble | None:
    """UIDs that cannot be filed, or that do not agree with the command (uploads: the file meta)."""
    header = found.header
    uids = {
        "SOP Class UID": header.sop_class_uid,
        "SOP Instance UID": header.sop_instance_uid,
        "Study Instance UID": header.study_instance_uid,
        "Series Instance UID": header.series_instance_uid,
    }
    if absent := [name for name, uid in uids.items() if not uid]:
        return Trouble("missing_uid", f"The data set has no {', no '.join(absent)}.")
    if bad := [name for name, uid in uids.items() if not is_uid(uid)]:
        return Trouble("bad_uid", f"The data set's {' and '.join(bad)} cannot be a UID.")
    if header.sop_instance_uid != source.sop_instance_uid:
        return Trouble(
            "uid_mismatch", "The SOP Instance UID in the data set is not the one it was sent under."
        )
    if header.sop_class_uid != source.sop_class_uid:
        return Trouble(
            "uid_mismatch", "The SOP Class UID in the data set is not the one it was sent under."
        )
    return None


def is_uid(text: str) -> bool:
    return len(text) <= _MAX_UID and _UID.fullmatch(text) is not None


def is_same_patient(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two instances of one Study Instance UID are of one patient.

    Equal non-blank PatientID, and equal issuer where both have one. Without any PatientID, as in
    an emergency, name and birth date must agree, be they blank: who was not registered yet is one
    patient in all images of his study. This is asked within one study only: across studies a blank
    never matches.
    """
    if one["patient_id"] != other["patient_id"]:
        return False
    if not one["patient_id"]:
        return _name(one) == _name(other) and _birth(one) == _birth(other)
    issuers = one["issuer_of_patient_id"], other["issuer_of_patient_id"]
    return issuers[0] == issuers[1] or not all(issuers)


def names_somebody(patient: Mapping[str, str]) -> bool:
    """Whether it says whose it is at all."""
    return bool(patient["patient_id"] or _name(patient))


def _name(patient: Mapping[str, str]) -> str:
    return patient["patient_name"].rstrip("^= ")


def _birth(patient: Mapping[str, str]) -> str:
    return patient["patient_birth_date"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a row remembers of the first instance with a SOP Instance UID."""

    header: InstanceHeader
    pixel_sha256: str
    identity_sha256: str
    patient: Mapping[str, str]  # as its study has it; that of its own file may be spelled otherwise


def conflict(first: Stored, newcomer: Described) -> Trouble | None:
    """Why a second instance of a UID is another one; None: it is the same, or a variant of it."""
    differing = _differing(first, newcomer)
    if not differing:
        return None
    words = ", ".join(differing)
    return Trouble(
        "identity_conflict",
        f"An instance with this SOP Instance UID is stored already and differs in {words}.",
        is_conflict=True,
    )


def _differing(first: Stored, newcomer: Described) -> list[str]:
    found = []
    if first.identity_sha256 != newcomer.identity_sha256:
        found = [
            *(one.what for one in patient_differences(first.patient, newcomer.patient)),
            *(one.what for one in header_differences(first.header, newcomer.header)),
        ]
        found = list(dict.fromkeys(found)) or ["the patient or a frame's geometry"]
    same = is_same_encoding(first.header.transfer_syntax_uid, newcomer.header.transfer_syntax_uid)
    if same and first.pixel_sha256 != newcomer.pixel_sha256:
        found.append("pixel data")
    return found


def is_same_encoding(first: str, newcomer: str) -> bool:
    """Whether equal pixels are equal bytes in both transfer syntaxes, and so can be compared."""
    return encoding_of(first) == encoding_of(newcomer)


@dataclass(frozen=True, slots=True)
class Difference:
    """In what a newcomer differs; its values are for an operator's eyes, never for a log."""

    what: str
    first: str
    newcomer: str


def patient_differences(first: Mapping[str, str], newcomer: Mapping[str, str]) -> list[Difference]:
    """In what two instances do not name the same person in the same words."""
    pairs = zip(_WHO.values(), who(first), who(newcomer), strict=True)
    return [Difference(words, old, new) for words, old, new in pairs if old != new]


def header_differences(first: InstanceHeader, newcomer: InstanceHeader) -> list[Difference]:
    """In what two instances of one UID differ, other than patient and pixels."""
    old, new = first.to_json(), newcomer.to_json()
    return [
        Difference(words, str(old[field]), str(new[field]))
        for field, words in _COMPARED.items()
        if old[field] != new[field]
    ]


def who(patient: Mapping[str, str]) -> tuple[str, ...]:
    """All by which a study says whose it is: its instances must not disagree in it."""
    return tuple(_name(patient) if key == "patient_name" else patient[key] for key in _WHO)


_WHO = {  # field of the study's row -> what to call it
    "patient_id": "patient ID",
    "issuer_of_patient_id": "issuer of the patient ID",
    "patient_name": "patient name",
    "patient_birth_date": "birth date",
    "patient_sex": "sex",
}
_COMPARED = {  # header field -> what to call it
    "sop_class_uid": "SOP class",
    "study_instance_uid": "study",
    "series_instance_uid": "series",
    "frame_of_reference_uid": "frame of reference",
    "rows": "matrix",
    "columns": "matrix",
    "frames": "number of frames",
    "bits_stored": "bit depth",
    "pixel_representation": "bit depth",
    "orientation": "orientation",
    "position": "position",
    "pixel_spacing": "spacing",
    "slice_thickness": "slice thickness",
    "gantry_tilt": "gantry tilt",
    "patient_position": "patient position",
    "laterality": "laterality",
    "rescale_slope": "rescale",
    "rescale_intercept": "rescale",
    "rescale_type": "rescale",
}
