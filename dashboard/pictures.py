"""What a study's page fetches beside itself: slices, heat maps, downloads."""

import io
import json
import uuid
import zipfile
from dataclasses import dataclass

import anyio
import anyio.to_thread
from fastapi import APIRouter, Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from dashboard import audit, images, stack
from dashboard.auth import CurrentViewer
from dashboard.context import Context, Ctx, NotThere
from dashboard.looking import Bundle, viewed, visible_study
from dashboard.tenancy import Viewer, acting_as
from db.result import Finding
from db.tables import AnalysisRow, ResultRow, StudyRow

router = APIRouter(include_in_schema=False)

#: Pictures are decoded by few children: whoever waits for one must not keep pages waiting.
_PICTURES = anyio.CapacityLimiter(6)


@router.get("/study/{study_id}/image/{number}.png")
async def image(
    context: Ctx,
    viewer: CurrentViewer,
    study_id: uuid.UUID,
    number: int,
    window: images.Window = "display",
    bundle: Bundle = "",
) -> Response:
    def picture() -> bytes:
        looked = _look(context, viewer, study_id, bundle)
        if not 0 <= number < len(looked.images):
            raise images.NoPicture("There is no such image.")
        output = looked.finding.output if looked.finding else None
        limit = context.settings.inference.max_pixels
        return images.slice_png(
            context.images, context.sandbox, looked.images[number], window, output, limit
        )

    data = await anyio.to_thread.run_sync(picture, limiter=_PICTURES)
    return Response(data, media_type="image/png")


@router.get("/study/{study_id}/heatmap/{number}.png")
async def heat_map(
    context: Ctx, viewer: CurrentViewer, study_id: uuid.UUID, number: int, bundle: Bundle = ""
) -> Response:
    def picture() -> bytes:
        looked = _look(context, viewer, study_id, bundle)
        if looked.finding is None:
            raise images.NoPicture("There is no result.")
        data_dir = context.settings.node.data_dir
        cam = images.heat_map(data_dir, looked.tenant, looked.finding, number)
        image = looked.images[looked.finding.key_images[number].image]
        limit = context.settings.inference.max_pixels
        scale = looked.finding.map_scale
        return images.heat_map_png(context.images, context.sandbox, image, cam, scale, limit)

    data = await anyio.to_thread.run_sync(picture, limiter=_PICTURES)
    return Response(data, media_type="image/png")


@dataclass(frozen=True, slots=True)
class _Looked:
    tenant: str
    finding: Finding | None
    images: tuple[stack.StackImage, ...]  # those of the finding, in its order, if there is one


def _look(context: Context, viewer: Viewer, study_id: uuid.UUID, bundle: str) -> _Looked:
    with acting_as(context.engine, viewer) as session:
        row = visible_study(session, viewer, study_id)
        result_id, finding = _finding(session, row, bundle)
        key = (row.id, row.inputs_version, result_id)
        data_dir = context.settings.node.data_dir
        found = context.images.stack(key, lambda: stack.stack(session, data_dir, row, finding))
        viewed(context, session, viewer, "images_viewed", target=str(study_id))
        return _Looked(row.tenant, finding, found)


@router.get("/study/{study_id}/result.json")
def result_json(
    context: Ctx, viewer: CurrentViewer, study_id: uuid.UUID, bundle: Bundle = ""
) -> Response:
    with acting_as(context.engine, viewer) as session:
        row = visible_study(session, viewer, study_id)
        result_id, finding = _finding(session, row, bundle)
        if finding is None:
            raise NotThere(viewer, str(study_id))
        audit.record(session, viewer, "result_downloaded", target=str(study_id), format="json")
    text = json.dumps(finding.to_json(), indent=2)
    return _download(text.encode(), f"vigil-{result_id}.json", "application/json")


@router.get("/study/{study_id}/result.zip")
def result_zip(
    context: Ctx, viewer: CurrentViewer, study_id: uuid.UUID, bundle: Bundle = ""
) -> Response:
    with acting_as(context.engine, viewer) as session:
        row = visible_study(session, viewer, study_id)
        result_id, _ = _finding(session, row, bundle)
        if result_id is None:
            raise NotThere(viewer, str(study_id))
        data_dir = context.settings.node.data_dir
        paths = stack.objects_of(session, data_dir, row, result_id)
        audit.record(session, viewer, "result_downloaded", target=str(study_id), format="dicom")
    kept = [path for path in paths if path.is_file()]
    if not kept:
        raise images.NoPicture(
            "The objects of this result are not built yet, or not kept any more."
        )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in kept:
            archive.write(path, path.name)
    return _download(file.getvalue(), f"vigil-{result_id}.zip", "application/zip")


def _finding(
    session: Session, study: StudyRow, bundle: str
) -> tuple[uuid.UUID | None, Finding | None]:
    """The newest result of a bundle, or of the first that has one."""
    row = session.scalar(
        select(ResultRow)
        .join(
            AnalysisRow,
            (AnalysisRow.id == ResultRow.analysis_id)
            & (AnalysisRow.result_no == ResultRow.result_no),
        )
        .where(AnalysisRow.study_id == study.id, AnalysisRow.is_shadow.is_(False))
        .order_by(AnalysisRow.bundle != bundle, AnalysisRow.id)
        .limit(1)
    )
    if row is None or (bundle and row.bundle != bundle):
        return None, None
    return row.id, Finding.from_json(row.finding)


def _download(data: bytes, name: str, media_type: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(data, media_type=media_type, headers=headers)
