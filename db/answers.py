"""What a destination answered, as it is stored: SOP Instance UID -> the last answer.

An answer is a status (0xA700), or a word where there was none.
"""

import re
from collections.abc import Mapping

from sqlalchemy import ColumnElement, cast, func
from sqlalchemy.dialects.postgresql import JSONPATH

from db.tables import DeliveryRow

#: Before the answer for an object that the destination has and is to get once more.
AGAIN = "again "
#: Sent, and not yet answered: should no answer come, nobody knows whether it arrived.
IN_DOUBT = "in_doubt"
# PS3.4 Table B.2-1: success, or a warning; 0111 says that the peer has the instance already.
_DELIVERED = f"^({AGAIN})?0x(0000|0111|B[0-9A-F]{{3}})$"


def is_delivered(code: str) -> bool:
    """Whether the destination has the object."""
    return re.match(_DELIVERED, code) is not None


def is_in_doubt(code: str) -> bool:
    """Whether the destination may have the object."""
    return code == IN_DOUBT


def is_due(code: str) -> bool:
    """Whether the object is still to be sent."""
    return code.startswith(AGAIN) or not is_delivered(code)


def to_send_again(statuses: Mapping[str, str]) -> dict[str, str]:
    """Everything is due once more, and what the destination has is not forgotten."""
    return {
        uid: AGAIN + code.removeprefix(AGAIN)
        for uid, code in statuses.items()
        if is_delivered(code)
    }


def merged(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """The later answers over the earlier; a refusal of what it has does not take that away."""
    result = dict(old)
    for uid, code in new.items():
        if is_delivered(code) or not is_delivered(old.get(uid, "")):
            result[uid] = code
    return result


def has_something() -> ColumnElement[bool]:
    """Whether the destination has any object of a delivery row."""
    return _any_is(_DELIVERED)


def may_have_something() -> ColumnElement[bool]:
    """Whether the destination has any object of a delivery row, or may have."""
    return _any_is(f"{_DELIVERED}|^{IN_DOUBT}$")


def _any_is(pattern: str) -> ColumnElement[bool]:
    path = f'$.* ? (@ like_regex "{pattern}")'
    return func.jsonb_path_exists(DeliveryRow.statuses, cast(path, JSONPATH))
