"""Looking at a study: only if it is the viewer's to see, and never unrecorded."""

import uuid
from typing import Annotated

from fastapi import Query
from sqlalchemy.orm import Session

from dashboard import audit, study_page
from dashboard.context import Context, NotThere
from dashboard.tenancy import Viewer
from db.tables import StudyRow

Bundle = Annotated[str, Query(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")]


def visible_study(session: Session, viewer: Viewer, study_id: uuid.UUID) -> StudyRow:
    row = study_page.find(session, study_id)
    if row is None:
        raise NotThere(viewer, str(study_id))
    return row


def viewed(
    context: Context,
    session: Session,
    viewer: Viewer,
    action: str,
    *,
    target: str = "",
    **detail: str,
) -> None:
    """Record a look; one that repeats within minutes, as live pages do, is one look."""
    if context.once.is_new(viewer.user_id, action, target, *detail.values()):
        audit.record(session, viewer, action, target=target, **detail)
