"""Moments of the database's clock, which may be set: DST never moves it, an administrator can."""

import datetime as dt
from typing import Any

from sqlalchemy import ColumnElement, func, or_
from sqlalchemy.orm import InstrumentedAttribute

_SPARE = dt.timedelta(seconds=60)


def is_past(
    moment: InstrumentedAttribute[Any], furthest: dt.timedelta | ColumnElement[dt.timedelta]
) -> ColumnElement[bool]:
    """Whether a moment has come; also where it lies further ahead than anything is ever put.

    Then it was written before the clock was set back, and nobody is to wait for it.
    """
    return or_(moment <= func.now(), moment > func.now() + furthest + _SPARE)
