"""Attributes of a data set that may hold anything; what cannot be read is None or empty."""

import datetime as dt
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pydicom.dataset import Dataset

_MAX_TEXT_CHARS = 256  # four times what LO may hold; an index row holds 2704 bytes
# Whatever pydicom raises when a value is not what its VR says.
BAD_VALUE = (
    ValueError, TypeError, AttributeError, KeyError, IndexError, ArithmeticError,
    NotImplementedError, EOFError, OSError,
)  # fmt: skip


def value(ds: Dataset, keyword: str) -> Any:
    """The attribute, looked up in the enhanced objects' functional groups too (PS3.3 C.7.6.16)."""
    with suppress(*BAD_VALUE):
        if keyword in ds:
            return ds[keyword].value
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        with suppress(*BAD_VALUE):
            for macro in ds[groups].value[0]:  # the first frame stands for all
                if macro.VR == "SQ" and macro.value and keyword in macro.value[0]:
                    return macro.value[0][keyword].value
    return None


def texts(ds: Dataset, keyword: str) -> list[str]:
    found = value(ds, keyword)
    if found is None:
        return []
    many = isinstance(found, Sequence) and not isinstance(found, (str, bytes))
    return [_clean(item) for item in (found if many else [found])]


def _clean(item: object) -> str:
    """Text that PostgreSQL can hold: no NUL, no lone surrogate; padding is not significant."""
    held = str(item).encode("utf-8", "replace").decode("utf-8").replace("\0", "")
    return held.strip()[:_MAX_TEXT_CHARS]


def text(ds: Dataset, keyword: str) -> str:
    return "\\".join(texts(ds, keyword))[:_MAX_TEXT_CHARS]


def numbers(ds: Dataset, keyword: str, n: int) -> tuple[float, ...] | None:
    """Exactly `n` finite numbers, or None."""
    with suppress(*BAD_VALUE):
        held = value(ds, keyword)
        found = tuple(float(item) for item in (held if n > 1 else [held]))
        if len(found) == n and all(map(math.isfinite, found)):
            return found
    return None


def number(ds: Dataset, keyword: str) -> float | None:
    found = numbers(ds, keyword, 1)
    return found[0] if found else None


def integer(ds: Dataset, keyword: str) -> int | None:
    found = number(ds, keyword)
    return int(found) if found is not None and abs(found) < 2**53 else None


def date(ds: Dataset, keyword: str) -> str:
    """YYYYMMDD, or empty where that is no day."""
    day = text(ds, keyword).replace(".", "")  # ACR-NEMA wrote 2026.11.23
    with suppress(ValueError):
        if len(day) == 8:
            return dt.datetime.strptime(day, "%Y%m%d").strftime("%Y%m%d")  # noqa: DTZ007 - a day
    return ""
