"""Who did or saw what: appended in the transaction of what it records."""

import time
from collections import OrderedDict
from threading import Lock
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from dashboard.tenancy import Viewer
from db.tables import AuditRow

#: A page that refreshes itself is one view for this long, not one every two seconds.
SAME_VIEW_S = 600.0
_MAX_REMEMBERED = 10_000


def record(
    session: Session,
    viewer: Viewer,
    action: str,
    *,
    target: str = "",
    outcome: str = "ok",
    tenant: str = "",
    **detail: Any,
) -> None:
    """Append one line; `target` and `detail` hold public ids and plain facts, no patient data."""
    # Inline: the id is not asked back, for a reader may append to the audit but not read it.
    session.execute(
        insert(AuditRow)
        .inline()
        .values(
            tenant=tenant or viewer.tenant,
            actor=viewer.name or "unknown",
            action=action,
            target=target,
            outcome=outcome,
            detail=detail,
        )
    )


class Once:
    """Remembers what was recorded lately, so that repeats of one view are recorded once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seen: OrderedDict[tuple[str, ...], float] = OrderedDict()

    def is_new(self, *key: str) -> bool:
        """Whether `key` was not seen within SAME_VIEW_S; remembers it then."""
        now = time.monotonic()
        with self._lock:
            last = self._seen.get(key)
            if last is not None and now - last < SAME_VIEW_S:
                return False
            self._seen[key] = now
            self._seen.move_to_end(key)
            while len(self._seen) > _MAX_REMEMBERED:
                self._seen.popitem(last=False)
            return True
