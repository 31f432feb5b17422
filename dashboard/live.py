"""One stream of hints to each open page: something changed, look again. No data travels in it."""

from collections import Counter
from collections.abc import AsyncIterator
from threading import Lock

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from dashboard import auth, sessions
from dashboard.auth import Session
from dashboard.context import Context, Ctx
from dashboard.tenancy import DOORMAN, acting_as
from db.tables import EventRow

router = APIRouter(include_in_schema=False)

POLL_S = 2.0
#: Ages and counters move without an event as well.
TICK_EVERY = 8  # polls
MAX_PER_USER = 12
MAX_STREAMS = 300

_open: Counter[str] = Counter()
_open_lock = Lock()


@router.get("/live")
async def live(request: Request, context: Ctx, found: Session) -> Response:
    user = found.viewer.user_id
    if not _enter(user):
        return Response("Too many open pages.\n", 429)
    token = request.cookies.get(auth.cookie_name(context), "")
    return StreamingResponse(_hints(context, user, token), media_type="text/event-stream")


async def _hints(context: Context, user: str, token: str) -> AsyncIterator[str]:
    last, polls = -1, 0
    try:
        yield "retry: 3000\n\n"
        while not context.stopping.is_set():
            newest = await anyio.to_thread.run_sync(_newest_event, context, token)
            if newest is None:  # signed out, disabled, expired: the stream ends with the session
                yield "event: gone\ndata: -\n\n"
                return
            if last not in (-1, newest) or polls % TICK_EVERY == TICK_EVERY - 1:
                yield "event: changed\ndata: -\n\n"
            last, polls = newest, polls + 1
            await anyio.sleep(POLL_S)
    finally:
        with _open_lock:
            _open[user] -= 1


def _newest_event(context: Context, token: str) -> int | None:
    """The newest event that this session's viewer may see, 0 when none; None without a session."""
    try:
        with acting_as(context.engine, DOORMAN) as session:
            found = sessions.find(session, token)
        if found is None:
            return None
        with acting_as(context.engine, found.viewer) as session:
            return session.scalar(select(func.max(EventRow.id))) or 0
    except OperationalError:
        return 0  # the page asks again, and says then that the database is away


def _enter(user: str) -> bool:
    with _open_lock:
        if _open[user] >= MAX_PER_USER or _open.total() >= MAX_STREAMS:
            return False
        _open[user] += 1
        return True
