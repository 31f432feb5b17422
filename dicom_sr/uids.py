"""Identifiers that follow from what they identify, so that building twice gives the same object."""

import hashlib
import uuid

from db.result import ModelIdentity

#: Ours for ever: another value would give every stored result new UIDs.
NAMESPACE = uuid.UUID("6f0a4a36-6a0e-5f43-9d0a-3c1b7d9f2e58")
#: Names the way objects are built; goes up when the same numbers would give other bytes.
OUTPUT_SPEC = "outspec-1"


def _uid(name: str) -> str:
    """A UUID-derived UID (PS3.5 B.2): at most 44 characters, no registration needed."""
    return f"2.25.{uuid.uuid5(NAMESPACE, name).int}"


def result_id(tenant: str, result_uuid: str) -> str:
    """What the UIDs of one result's objects are derived from.

    `result_uuid` is drawn at random with the numbers: two tenants may hold the same Study Instance
    UID for two patients, and a lost database must not issue old UIDs for new bytes.
    """
    return "|".join((tenant, result_uuid, OUTPUT_SPEC))


def object_uid(result: str, role: str, *parts: str) -> str:
    """The UID of a series or instance of a result; `result` is from `result_id`."""
    return _uid("|".join((result, role, *parts)))


def device_uid(model: ModelIdentity, algorithm: str) -> str:
    """Names the observer: another one whenever the model, its weights or its calibration change."""
    named = (algorithm, model.version, model.weights_sha256, model.calibration_id)
    return _uid("|".join(("device", *named)))


def tracking_uid(tenant: str, bundle: str, study_instance_uid: str, what: str) -> str:
    """Follows one finding or region through every revision; unique inside one report."""
    return _uid("|".join(("track", tenant, bundle, study_instance_uid, what)))


def digest(text: str) -> str:
    """A short stable name for a set of choices."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
