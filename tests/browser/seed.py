"""A small hospital in rows and files: studies in every state, for the dashboard's tests."""

import datetime as dt
import functools
import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from sqlalchemy import Engine, func
from sqlalchemy.orm import Session

from config.settings import DashboardSettings, NodeSettings, Settings
from config.tenants import Tenant
from db.files import result_folder, store_path
from db.header import InstanceHeader
from db.job import JobKind
from db.result import Finding, ImageRef, KeyImage, RawScore, Urgency
from db.study import AnalysisState, study_state
from db.tables import (
    AnalysisRow,
    DeliveryRow,
    DestinationRow,
    EventRow,
    InstanceRow,
    JobRow,
    ObjectRow,
    ProcessRow,
    ResultRow,
    SenderRow,
    StudyRow,
)
from node.phantom import Kind, Phantom, study
from tests.findings import label_result, make_finding, make_maps, synthetic_headers

NORTH = Tenant(id="north", ae_titles=("NORTH_AI",))
SOUTH = Tenant(id="south", ae_titles=("SOUTH_AI",))
_NOW = dt.datetime.now(dt.UTC)


def settings_for(base: Settings, **dashboard: object) -> Settings:
    """The fixture's settings with our two tenants."""
    return Settings(
        node=NodeSettings(**base.node.model_dump()),
        dashboard=DashboardSettings(**{"port": 0, **dashboard}),  # type: ignore[arg-type]
        tenants=(NORTH, SOUTH),
    )


def finding(images: Sequence[ImageRef], probability: float, *, is_partial: bool = False) -> Finding:
    """A result over `images` whose strongest slice is the middle one; at 8 % prevalence."""
    middle = len(images) // 2
    peak = float(np.log(probability / (1 - probability))) + 0.4
    logits = tuple(peak - 0.14 * (i - middle) ** 2 for i in range(len(images)))
    top = sorted(range(len(images)), key=lambda i: -logits[i])[:3]
    labels = tuple(
        label_result(name, value, top=middle, prevalence=0.08, exploratory=is_exploratory)
        for name, value, is_exploratory in (
            ("any", probability, False),
            ("epidural", 0.4 * probability, False),
            ("subdural", 0.3 * probability, True),
            ("subarachnoid", 0.05, True),
        )
    )
    is_positive = bool(labels[0].is_present)
    quiet = Urgency.URGENT if is_positive else Urgency.ROUTINE
    return make_finding(
        synthetic_headers(1),
        positive=is_positive,
        keys=(0,),
        result_uuid=str(uuid.uuid4()),
        started_at=_NOW.isoformat(),
        images=tuple(images),
        labels=labels,
        image_logits={"any": logits},
        key_images=tuple(KeyImage(i, "any", RawScore(logits[i]), None) for i in sorted(top))
        if is_positive
        else (),
        urgency=Urgency.STAT if probability > 0.8 else quiet,
        is_partial=is_partial,
        notes=("A hole of 10 mm between slices 7 and 9.",) if is_partial else (),
        shows_regions=False,
    )


@dataclass(kw_only=True)
class Case:
    """A study to make. `probability` None: no result."""

    name: str = "PHANTOM^PLAIN"
    patient_id: str = "P-1"
    tenant: str = "north"
    origin: str = "dicom"
    state: AnalysisState = AnalysisState.DELIVERED
    probability: float | None = None
    minutes_ago: float = 10.0
    accession: str = "A-1"
    description: str = "CT HEAD W/O CONTRAST"
    reason: tuple[str, str, str, str] | None = None  # rule, value, limit, sentence
    is_partial: bool = False
    is_held: bool = False
    is_shadow: bool = False
    delivery: str = "DELIVERED"
    error: str = ""
    slices: int = 0  # with pixels, written to store/
    matrix: int = 128


def add(engine: Engine, data_dir: Path, case: Case) -> uuid.UUID:
    """Make a study; returns its public id."""
    with Session(engine) as session, session.begin():
        at = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=case.minutes_ago)
        row = StudyRow(
            tenant=case.tenant, origin=case.origin, study_instance_uid=f"2.25.{uuid.uuid4().int}",
            is_held=case.is_held, patient_name=case.name, patient_id=case.patient_id,
            patient_birth_date="19610402", patient_sex="F", accession_number=case.accession,
            study_date=at.strftime("%Y%m%d"), study_time=at.strftime("%H%M%S"),
            study_description=case.description, sender="CT1", created_at=at,
            last_instance_at=at, n_instances=max(case.slices, 24),
            state=study_state([case.state] if not case.is_shadow else [], is_held=case.is_held),
        )  # fmt: skip
        session.add(row)
        session.flush()
        images = _images(session, data_dir, row, case)
        analysis = AnalysisRow(
            study_id=row.id, tenant=row.tenant, origin=row.origin, bundle="ich", state=case.state,
            is_shadow=case.is_shadow, is_partial=case.is_partial, updated_at=at,
            result_no=0 if case.probability is None else 1,
            reason_code=case.reason[0] if case.reason else "",
            reason=case.reason[3] if case.reason else "",
        )  # fmt: skip
        session.add(analysis)
        session.flush()
        _events(session, row, analysis, case, at)
        if case.probability is not None:
            _result(session, data_dir, row, analysis, case, images, at)
        if case.state in (AnalysisState.QUEUED, AnalysisState.FOUND):
            session.add(
                JobRow(
                    analysis_id=analysis.id, tenant=row.tenant, origin=row.origin,
                    kind=JobKind.INFER, lane=1, analysis_version=0, created_at=at,
                )
            )  # fmt: skip
        return row.public_id


def _images(session: Session, data_dir: Path, row: StudyRow, case: Case) -> list[ImageRef]:
    datasets = pixels(case.slices or 6, case.matrix, case.patient_id) if case.slices else []
    refs = []
    for number in range(case.slices or 24):
        instance_id = uuid.uuid4()
        dataset = datasets[number] if datasets else None
        position = float(dataset.ImagePositionPatient[2]) if dataset is not None else 5.0 * number
        uid = f"2.25.{uuid.uuid4().int}"
        header = InstanceHeader(
            sop_class_uid="1.2.840.10008.5.1.4.1.1.2", sop_instance_uid=uid,
            study_instance_uid=row.study_instance_uid, series_instance_uid="2.25.7",
            transfer_syntax_uid="1.2.840.10008.1.2.1", modality="CT", instance_number=number + 1,
            rows=case.matrix, columns=case.matrix,
            orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), position=(0.0, 0.0, position),
        )  # fmt: skip
        session.add(
            InstanceRow(
                id=instance_id, study_id=row.id, tenant=row.tenant, origin=row.origin,
                sop_instance_uid=uid, sop_class_uid=header.sop_class_uid,
                series_instance_uid="2.25.7", transfer_syntax_uid="1.2.840.10008.1.2.1",
                header=header.to_json(), pixel_sha256="", identity_sha256="", size_bytes=1,
                sender="CT1", received_at=func.now(), stored_at=func.now(),
            )
        )  # fmt: skip
        if dataset is not None:
            path = store_path(data_dir, row.tenant, row.id, instance_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(path, enforce_file_format=True)
        refs.append(
            ImageRef(
                str(instance_id), header.sop_class_uid, uid, "2.25.7", None, number + 1, position,
                case.matrix, case.matrix,
            )
        )  # fmt: skip
    return refs


@functools.cache
def pixels(slices: int, matrix: int, salt: str) -> list[Dataset]:
    phantom = Phantom(
        kind=Kind.LESION,
        slices=slices,
        matrix=matrix,
        localiser=False,
        step_mm=150 / slices,
        salt=salt,
    )
    return study(phantom)


def _events(
    session: Session, row: StudyRow, analysis: AnalysisRow, case: Case, at: dt.datetime
) -> None:
    def event(kind: str, seconds: float, *, is_alarm: bool = False, **detail: object) -> None:
        session.add(
            EventRow(
                tenant=row.tenant, origin=row.origin, study_id=row.id, analysis_id=analysis.id,
                kind=kind, detail=detail, is_alarm=is_alarm, at=at + dt.timedelta(seconds=seconds),
            )
        )  # fmt: skip

    event("series_ready", 20, bundle="ich", state="QUEUED")
    if case.state is AnalysisState.NOT_ANALYSED and case.reason:
        rule, value, limit, _ = case.reason
        event("not_eligible", 21, rule=rule, value=value, limit=limit)
    if case.state is AnalysisState.FAILED and case.reason:
        event("gave_up", 21, is_alarm=True, reason_code=case.reason[0])
    if case.probability is not None:
        event("findings_stored", 24, n_images=24, result_no=1)
        event("objects_built", 25, n_objects=6)
    if case.state is AnalysisState.DELIVERED:
        event("result_delivered", 27, destination="pacs", n_objects=6)
    if case.state is AnalysisState.DELIVERED_IN_PART:
        event("delivery_refused", 40, is_alarm=True, destination="pacs", reason_code=case.error)


def _result(
    session: Session,
    data_dir: Path,
    row: StudyRow,
    analysis: AnalysisRow,
    case: Case,
    images: list[ImageRef],
    at: dt.datetime,
) -> None:
    assert case.probability is not None
    found = finding(images, case.probability, is_partial=case.is_partial)
    result_id = uuid.UUID(found.result_uuid)
    session.add(
        ResultRow(
            id=result_id, analysis_id=analysis.id, study_id=row.id, tenant=row.tenant,
            origin=row.origin, bundle="ich", result_no=1, finding=found.to_json(),
            is_positive=found.is_positive, urgency=found.urgency, probability=case.probability,
            at=at + dt.timedelta(seconds=24),
        )
    )  # fmt: skip
    session.flush()
    folder = result_folder(data_dir, row.tenant, result_id)
    folder.mkdir(parents=True, exist_ok=True)
    if found.key_images:
        (folder / "maps.npz").write_bytes(_maps(found))
    uid = f"2.25.{uuid.uuid4().int}"
    (folder / f"{uid}.dcm").write_bytes(b"\0" * 128 + b"DICM")
    session.add(
        ObjectRow(
            id=uuid.uuid4(), result_id=result_id, analysis_id=analysis.id, study_id=row.id,
            tenant=row.tenant, origin=row.origin, variant="", role="sr", seq=1, sop_class_uid="1.2",
            sop_instance_uid=uid, series_instance_uid="2.25.9", transfer_syntax_uid="1.2",
            sha256="", size_bytes=132,
        )
    )  # fmt: skip
    for destination in ("pacs",):
        is_open = case.delivery in ("WAITING", "SENDING")
        session.add(
            DeliveryRow(
                result_id=result_id, analysis_id=analysis.id, study_id=row.id, tenant=row.tenant,
                origin=row.origin, destination=destination, state=case.delivery, lane=1,
                attempts=1, expires_at=at + dt.timedelta(days=10), error_code=case.error,
                created_at=at + dt.timedelta(seconds=25),
                finished_at=None if is_open else at + dt.timedelta(seconds=27),
            )
        )  # fmt: skip


def _maps(found: Finding) -> bytes:
    file = io.BytesIO()
    maps = {f"cam_{number}": cam for number, cam in make_maps(found).items()}
    np.savez_compressed(file, **maps)
    return file.getvalue()


_S = AnalysisState
HOSPITAL = (
    Case(name="ADEYEMI^TUNDE", patient_id="N-10023", accession="ACC-88121", probability=0.93,
         minutes_ago=4, slices=24, matrix=256),
    Case(name="LINDQVIST^MAJA^E", patient_id="N-10419", accession="ACC-88125", probability=0.44,
         minutes_ago=11, slices=12, matrix=128, is_partial=True),
    Case(name="SMITH^JOHN", patient_id="N-09911", accession="ACC-88101", probability=0.015,
         minutes_ago=45),
    Case(name="GARCÍA^LUCÍA", patient_id="N-10500", accession="ACC-88130", probability=0.12,
         minutes_ago=18, state=_S.BUILT, delivery="WAITING"),
    Case(name="WEBER^ANNA", patient_id="N-10501", accession="ACC-88131", minutes_ago=0.4,
         state=_S.WAITING),
    Case(name="NOVÁK^PETR", patient_id="N-10502", accession="ACC-88132", minutes_ago=1.5,
         state=_S.QUEUED),
    Case(name="TANAKA^HANAKO=田中^花子", patient_id="N-10333", accession="ACC-88119",
         minutes_ago=160, state=_S.NOT_ANALYSED, description="CTA HEAD",
         reason=("contrast", "IOMERON 400", "none", "The series was made with a contrast agent.")),
    Case(name="OKAFOR^CHIDI", patient_id="N-10334", accession="ACC-88117", minutes_ago=220,
         state=_S.FAILED,
         reason=("undecodable", "", "", "An image ended its decoder each time it was read.")),
    Case(name="HELD^CASE", patient_id="N-10335", accession="ACC-88116", minutes_ago=300,
         probability=0.71, is_held=True, state=_S.BUILT, delivery="WAITING"),
    Case(name="<script>alert(1)</script>^=cmd()", patient_id="\u202eDI-1", accession='"><b>x</b>',
         minutes_ago=400, probability=0.2, description="=HYPERLINK(1)"),
    Case(name="SOUTH^PATIENT", patient_id="S-1", accession="SOUTH-1", tenant="south",
         probability=0.88, minutes_ago=7, slices=8, matrix=64),
    Case(name="SOUTH^REFUSED", patient_id="S-2", accession="SOUTH-2", tenant="south",
         probability=0.5, minutes_ago=90, state=_S.DELIVERED_IN_PART, delivery="REFUSED",
         error="context_refused"),
)  # fmt: skip


def hospital(engine: Engine, data_dir: Path) -> dict[str, uuid.UUID]:
    """The whole of it: studies by accession number, destinations, senders, processes."""
    made = {case.accession: add(engine, data_dir, case) for case in HOSPITAL}
    with Session(engine) as session, session.begin():
        session.add(DestinationRow(tenant="north", name="pacs", last_success_at=_NOW))
        session.add(
            DestinationRow(tenant="south", name="pacs", failures=4, last_error="no_connection")
        )
        session.add(SenderRow(tenant="north", ae_title="CT1", n_instances=3120))
        session.add(SenderRow(tenant="south", ae_title="CT_SOUTH", n_instances=410))
        for stage, detail in (
            ("scp", {}),
            ("inference", {"device": "cpu", "models": {"ich": "1.0.0"}}),
            ("deliver", {}),
        ):
            session.add(ProcessRow(name=f"host/{stage}/7", stage=stage, detail=detail))
    return made


def history(engine: Engine, data_dir: Path, days: int = 30) -> None:
    """A month of quiet work, for the trend."""
    rng = np.random.default_rng(7)
    for day in range(1, days):
        for n in range(int(rng.integers(2, 7))):
            positive = rng.random() < 0.2
            case = Case(
                name=f"PAST^N{day}X{n}", patient_id=f"H-{day}-{n}", accession=f"H-{day}-{n}",
                probability=0.9 if positive else 0.05, minutes_ago=day * 1440 + n * 60,
                tenant="north" if n % 3 else "south",
            )  # fmt: skip
            add(engine, data_dir, case)
