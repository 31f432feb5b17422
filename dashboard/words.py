"""Values as people read them: names, dates, durations, and a sentence for every state."""

import datetime as dt
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from db.job import Lane
from db.outbox import DeliveryState
from db.study import AnalysisState, StudyState

STUDY_STATES: Mapping[str, str] = {
    StudyState.RECEIVING: "Receiving",
    StudyState.IN_PROGRESS: "In progress",
    StudyState.DONE: "Done",
    # By whose fault is said beside each study: `study_words`.
    StudyState.DONE_WITH_GAPS: "Failed or not delivered",
    StudyState.HELD: "Held for a decision",
}
ANALYSIS_STATES: Mapping[str, str] = {
    AnalysisState.WAITING: "waiting for images",
    AnalysisState.QUEUED: "being analysed",
    AnalysisState.FOUND: "writing the report",
    AnalysisState.BUILT: "being sent",
    AnalysisState.DELIVERED: "delivered",
    AnalysisState.DELIVERED_IN_PART: "not delivered everywhere",
    AnalysisState.NOT_ANALYSED: "not analysed",
    AnalysisState.FAILED: "analysis failed",
    AnalysisState.WITHDRAWN: "withdrawn",
}
DELIVERY_STATES: Mapping[str, str] = {
    DeliveryState.WAITING: "waiting",
    DeliveryState.SENDING: "sending",
    DeliveryState.DELIVERED: "delivered",
    DeliveryState.REFUSED: "refused",
    DeliveryState.EXPIRED: "expired",
    DeliveryState.DROPPED: "replaced by a newer result",
    DeliveryState.WITHDRAWN: "withdrawn",
}

_LOOKS_LIKE_NOTHING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Joiners are needed in Persian, Hindi and other names, and turn nothing round.
_HARMLESS = {"\u200c", "\u200d"}


def plain(value: object) -> str:
    """Text without invisible or direction-turning characters; each is shown by its number (H51)."""
    return "".join(
        f"[U+{ord(char):04X}]"
        if unicodedata.category(char) in _LOOKS_LIKE_NOTHING and char not in _HARMLESS
        else char
        for char in str(value)
    )


def person(name: str) -> str:
    """A DICOM person name (PS3.5 6.2.1.2) as `Family, Given`, other writings in brackets."""
    groups = [_group(part) for part in plain(name).split("=")]
    written = [group for group in groups if group]
    if not written:
        return "(no name)"
    first, *others = written
    return f"{first} ({', '.join(others)})" if others else first


def _group(text: str) -> str:
    family, *rest = (part.strip() for part in text.split("^"))
    given = " ".join(part for part in rest[:2] if part)
    return ", ".join(part for part in (family, given) if part)


def date(value: str) -> str:
    """A DICOM date as 2026-01-31; anything else as it is."""
    if len(value) == 8 and value.isascii() and value.isdigit():
        return f"{value[:4]}-{value[4:6]}-{value[6:]}"
    return plain(value)


def time_of_day(value: str) -> str:
    """A DICOM time as 14:05."""
    digits = value.partition(".")[0]
    if len(digits) >= 4 and digits.isascii() and digits.isdigit():
        return f"{digits[:2]}:{digits[2:4]}"
    return ""


def moment(value: dt.datetime | None) -> str:
    """UTC, to the second; the page's script turns it into the browser's time."""
    return "" if value is None else value.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(value: dt.datetime) -> str:
    return value.astimezone(dt.UTC).isoformat(timespec="milliseconds")


def duration(seconds: float | None) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 10 min`, `5 d`; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d"


def number(value: float) -> str:
    """With thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u2009")


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def lane(value: int) -> str:
    return Lane(value).name.lower() if value in set(Lane) else str(value)


def study_state(value: str) -> str:
    return STUDY_STATES.get(value, plain(value))


def study_words(state: str, analyses: Iterable[str]) -> str:
    """A study's state; where something is missing in the end, what it is."""
    if state == StudyState.DONE and AnalysisState.WITHDRAWN in set(analyses):
        return "Result withdrawn"
    if state != StudyState.DONE_WITH_GAPS:
        return study_state(state)
    is_failed = AnalysisState.FAILED in set(analyses)
    return "Analysis failed" if is_failed else "Not delivered everywhere"


def analysis_state(value: str) -> str:
    return ANALYSIS_STATES.get(value, plain(value))


def delivery_state(value: str) -> str:
    return DELIVERY_STATES.get(value, plain(value))


def facts(detail: Mapping[str, Any]) -> str:
    """An event's or process's details in one line."""
    return ", ".join(
        f"{plain(key).replace('_', ' ')} {_fact(value)}"
        for key, value in detail.items()
        if value not in (None, "", [], {})
    )


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({facts(value)})"
    if isinstance(value, list):
        return ", ".join(_fact(item) for item in value)
    return plain(value)


def sentence(value: object) -> str:
    """A capital first; the rest as it is."""
    text = plain(value)
    return text[:1].upper() + text[1:]


FILTERS: dict[str, Callable[..., str]] = {
    "plain": plain,
    "person": person,
    "date": date,
    "time_of_day": time_of_day,
    "moment": moment,
    "iso": iso,
    "duration": duration,
    "number": number,
    "share": share,
    "size": size,
    "lane": lane,
    "study_state": study_state,
    "analysis_state": analysis_state,
    "delivery_state": delivery_state,
    "facts": facts,
    "sentence": sentence,
}
