"""Which files a study's page shows: the images of its stack, the objects of its result."""

import uuid
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.files import result_folder, store_path
from db.header import InstanceHeader
from db.result import Finding
from db.tables import DeliveryRow, InstanceRow, ObjectRow, StudyRow


@dataclass(frozen=True, slots=True)
class StackImage:
    """One picture of the stack: an instance in store/, or one frame of it."""

    instance_id: uuid.UUID
    path: Path
    frame: int | None  # 1-based for a multi-frame instance
    instance_number: int | None
    position_mm: float | None
    modality: str


def stack(
    session: Session, data_dir: Path, study: StudyRow, finding: Finding | None
) -> tuple[StackImage, ...]:
    """The images to show, in order along the normal: those analysed, else the largest series."""
    rows = {
        row.id: InstanceHeader.from_json(row.header)
        for row in session.scalars(
            select(InstanceRow).where(
                InstanceRow.study_id == study.id, InstanceRow.stored_at.is_not(None)
            )
        )
    }
    places = _analysed(finding, rows) if finding else _largest_series(rows)
    return tuple(
        StackImage(
            instance_id,
            store_path(data_dir, study.tenant, study.id, instance_id),
            frame,
            header.instance_number,
            position,
            header.modality,
        )
        for instance_id, header, frame, position in places
    )


_Place = tuple[uuid.UUID, InstanceHeader, int | None, float | None]


def _analysed(finding: Finding, rows: dict[uuid.UUID, InstanceHeader]) -> list[_Place]:
    found: list[_Place] = []
    for image in finding.images:
        instance_id = uuid.UUID(image.instance_id)
        # Retention may have taken the original: the place stays, the picture says so.
        header = rows.get(instance_id) or InstanceHeader(
            sop_class_uid="",
            sop_instance_uid="",
            study_instance_uid="",
            series_instance_uid="",
            transfer_syntax_uid="",
            instance_number=image.instance_number,
        )
        found.append((instance_id, header, image.frame, image.position_mm))
    return found


def _largest_series(rows: dict[uuid.UUID, InstanceHeader]) -> list[_Place]:
    series: dict[str, list[_Place]] = {}
    for instance_id, header in rows.items():
        if not (header.rows and header.columns):
            continue
        places = series.setdefault(header.series_instance_uid, [])
        frames = range(1, header.frames + 1) if header.frames > 1 else (None,)
        places += [(instance_id, header, frame, _position(header)) for frame in frames]
    largest = max(series.values(), key=len, default=[])
    return sorted(
        largest, key=lambda p: (p[3] or 0.0, p[1].instance_number or 0, str(p[0]), p[2] or 0)
    )


def _position(header: InstanceHeader) -> float | None:
    """Where an image lies along its normal, mm (PS3.3 C.7.6.2.1.1)."""
    if header.orientation is None or header.position is None:
        return None
    x0, x1, x2, y0, y1, y2 = header.orientation
    normal = (x1 * y2 - x2 * y1, x2 * y0 - x0 * y2, x0 * y1 - x1 * y0)
    return sum(a * b for a, b in zip(normal, header.position, strict=True))


def objects_of(
    session: Session, data_dir: Path, study: StudyRow, result_id: uuid.UUID
) -> list[Path]:
    """The DICOM files of a result's plain variant, or of whichever there is, in sending order.

    A report may be built in several SOP classes, for peers that take only one of them: here it is
    the one that was sent, or else the preferred one.
    """
    variant = session.scalar(
        select(func.min(ObjectRow.variant)).where(ObjectRow.result_id == result_id)
    )
    rows = session.execute(
        select(ObjectRow.sop_instance_uid, ObjectRow.role)
        .where(ObjectRow.result_id == result_id, ObjectRow.variant == variant)
        .order_by(ObjectRow.seq)
    ).all()
    statuses = session.scalars(
        select(DeliveryRow.statuses).where(
            DeliveryRow.result_id == result_id, DeliveryRow.variant == variant
        )
    )
    sent = {uid for answers in statuses for uid in answers}
    reports = [uid for uid, role in rows if role == "sr"]
    kept = [uid for uid in reports if uid in sent] or reports[:1]
    uids = [uid for uid, role in rows if role != "sr" or uid in kept]
    folder = result_folder(data_dir, study.tenant, result_id)
    # Our own UIDs; the name alone is taken, so that no row could ever lead out of the folder.
    return [folder / Path(f"{uid}.dcm").name for uid in uids]
