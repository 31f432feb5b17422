"""Times as they are stored, and as pages and reports say them."""

import datetime as dt


def parse_time(text: str) -> dt.datetime:
    """ISO 8601 with an offset; without one it is UTC."""
    at = dt.datetime.fromisoformat(text)
    return at if at.tzinfo else at.replace(tzinfo=dt.UTC)


def minute(at: dt.datetime) -> str:
    """To the minute, with its offset: 2026-03-01 14:05 UTC+01:00."""
    return f"{at:%Y-%m-%d %H:%M} {_offset(at)}"


def _offset(at: dt.datetime) -> str:
    minutes = int((at.utcoffset() or dt.timedelta()).total_seconds()) // 60
    if minutes == 0:
        return "UTC"
    sign = "+" if minutes > 0 else "-"
    return f"UTC{sign}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"
