"""What happened to a study, in sentences for its timeline and for alarms."""

from collections.abc import Callable, Mapping
from typing import Any

from dashboard.words import facts, plain
from db.wording import counted

EVENTS: Mapping[str, str] = {
    "study_opened": "First image received",
    "instances_received": "Images received",
    "inputs_changed": "New images: the study is open again",
    "series_ready": "Analysis queued",
    "findings_stored": "Analysed",
    "not_eligible": "Not analysed",
    "gave_up": "Analysis given up",
    "objects_built": "Result objects built",
    "all_accepted": "Delivered to every destination",
    "some_refused": "Not delivered everywhere",
    "rerun": "Run again by an operator",
    "resend": "Sent again by an operator",
    "result_delivered": "Result accepted",
    "delivery_expired": "A destination could not be reached in time",
    "delivery_postponed": "A destination does not answer; trying again",
    "objects_refused": "A destination refused objects; trying again",
    "delivery_refused": "A destination refused the result for good",
    "delivery_hurried": "To be sent at once, by an operator",
    "delivery_withheld": "Not sent: the result no longer matches its study",
    "instance_quarantined": "An image was set aside",
    "quarantine_discarded": "What was set aside was discarded",
    "delivery_dropped": "Not sent: its images were replaced",
    "withdrawn": "Result withdrawn by an operator",
    "rejection_delivered": "Rejection note accepted",
    "result_committed": "A destination has committed itself to keep the result",
    "commitment_failed": "A destination does not vouch for what it accepted",
    "commitment_refused": "A destination does not give storage commitment",
    "commitment_unanswered": "A destination was asked to vouch for the result and said nothing",
    "not_committed": "Being sent again: a destination does not vouch for it",
    "commitment_judged": "A sender asked whether its images are kept",
    "commitment_reported": "A sender was told which of its images are kept",
    "commitment_not_reported": "A sender could not be told which of its images are kept",
    "commitment_unreadable": "A message of storage commitment could not be read",
    "quarantine_released": "What was set aside was released by an operator",
    "instance_came_again": "An image came again of which an operator has decided",
    "notice_built": "Notice built: the study was not processed",
    "notice_given_up": "The notice could not be built",
    "variant_dropped": "An image came again in another encoding; the first is kept",
}
#: For machines, or shown elsewhere on the page.
_UNSAID = frozenset({"state", "bundle", "series", "instance_id", "by", "result_no"})

Detail = Mapping[str, Any]


def event(kind: str) -> str:
    """What happened, in words; an event that is new to this page by its own name."""
    return EVENTS.get(kind) or plain(kind).replace("_", " ").capitalize()


def particulars(kind: str, detail: Detail) -> str:
    """What a person wants to know of it, in one line; may be empty."""
    if say := _SAID.get(kind):
        return say(detail)
    return facts({key: value for key, value in detail.items() if key not in _UNSAID})


def _images(detail: Detail) -> str:
    n = int(detail.get("n_images") or detail.get("n_instances") or 0)
    return counted(n, "image") if n else ""


def _built(detail: Detail) -> str:
    n = int(detail.get("n_objects") or 0)
    return counted(n, "object") if n else ""


def _given_up(detail: Detail) -> str:
    return plain(detail.get("reason_code") or detail.get("reason") or "")


def _received(detail: Detail) -> str:
    return f"{_images(detail)} from {plain(detail.get('sender') or 'an upload')}".strip()


def _queued(detail: Detail) -> str:
    missing = detail.get("missing")
    gaps = "; ".join(map(str, missing)) if isinstance(missing, list) else str(missing or "")
    missing_words = f"missing: {plain(gaps)}" if gaps else ""
    return "; ".join(part for part in (_images(detail), missing_words) if part)


def _analysed(detail: Detail) -> str:
    number = detail.get("result_no") or 1
    return _images(detail) + (f", revision {number}" if number != 1 else "")


def _refused(detail: Detail) -> str:
    value, limit = (plain(detail.get(key) or "") for key in ("value", "limit"))
    found = f"found {value}" if value else ""
    return ", ".join(part for part in (found, f"limit {limit}" if limit else "") if part)


def _delivered(detail: Detail) -> str:
    n = int(detail.get("n_objects") or 0)
    return f"{counted(n, 'object')} to {plain(detail.get('destination') or '')}"


def _committed(detail: Detail) -> str:
    n, code = int(detail.get("n_objects") or 0), plain(detail.get("reason_code") or "")
    said = f"{counted(n, 'object')}, {plain(detail.get('destination') or '')}"
    return f"{said}, {code}" if code else said


def _set_aside(detail: Detail) -> str:
    out = detail.get("delivered_to")
    named = ", ".join(map(plain, out)) if isinstance(out, list) else ""
    todo = f"out already: {named}; {plain(detail.get('do') or '')}" if named else ""
    return "; ".join(part for part in (plain(detail.get("code") or ""), todo) if part)


def _released(detail: Detail) -> str:
    n, n_replaced = int(detail.get("n_instances") or 0), int(detail.get("n_replaced") or 0)
    corrected = "; the study's patient was corrected" if detail.get("is_other_patient") else ""
    place = f", {n_replaced} in place of another" if n_replaced else ""
    return f"{counted(n, 'image')}{place}, by {plain(detail.get('by') or '')}{corrected}"


def _withdrawn(detail: Detail) -> str:
    names = detail.get("destinations")
    to = ", ".join(map(plain, names)) if isinstance(names, list) and names else "nowhere"
    return f"by {plain(detail.get('by') or '')}, {plain(detail.get('reason') or '')}; out at {to}"


_SAID: Mapping[str, Callable[[Detail], str]] = {
    "study_opened": lambda detail: f"from {plain(detail.get('sender') or 'an upload')}",
    "instances_received": _received,
    "series_ready": _queued,
    "findings_stored": _analysed,
    "not_eligible": _refused,
    "gave_up": _given_up,
    "objects_built": _built,
    "result_delivered": _delivered,
    "rejection_delivered": _delivered,
    "result_committed": _committed,
    "commitment_failed": _committed,
    "commitment_refused": _committed,
    "commitment_unanswered": _committed,
    "instance_quarantined": _set_aside,
    "quarantine_released": _released,
    "withdrawn": _withdrawn,
}
