"""A node that is killed and cut off on purpose, and what must be as if it had not been.

Studies here come in three kinds, each to a tenant of its own, so that the ways of a result with
overlays, of one without, and of a page AI NOT PROCESSED are all gone. What a study ends as depends
on its pixels alone: an undisturbed one tells what a disturbed one of its kind must end as.
"""

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pydicom
from pydicom import Dataset
from pydicom.uid import generate_uid
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from db.faults import POINTS, VARIABLE
from db.files import result_folder, store_path
from db.tables import (
    AnalysisRow,
    DeliveryRow,
    InstanceRow,
    JobRow,
    NoticeRow,
    ObjectRow,
    QuarantineRow,
    ResultRow,
    StudyRow,
)
from node.running import free_port
from tests.builders import changed
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series
from tests.e2e import hospital
from tests.e2e.hospital import ENDED, QUIET_S, Hospital

#: Tenant -> what differs: the same head is found, cleared, or (with a bone kernel) refused.
KINDS = {
    "found": 'thresholds = { "head.any" = 0.1 }',
    "clear": 'thresholds = { "head.any" = 0.9 }',
    "refused": f"max_wait_s = {QUIET_S + 1}",
}
#: The process at whose points a fault kills, by its module's name in the command line. Those of
#: storage commitment, which these archives do not give, and of an operator's hand are not among
#: them.
ORDINARY = {
    name: process
    for process, points in POINTS.items()
    for name in points
    if process not in ("commitment", "operator")
}
DEADLINE_S = 600.0


@dataclass
class Study:
    """One that is sent, and what is remembered of it."""

    kind: str
    number: int
    images: list[Dataset] = field(repr=False)
    paths: list[Path] = field(repr=False)

    @property
    def uid(self) -> str:
        return str(self.images[0].StudyInstanceUID)


@dataclass(frozen=True)
class Outcome:
    """What a study has come to, without what differs from study to study."""

    state: str
    reason_code: str
    is_partial: bool
    result_no: int
    scores: tuple[str, ...]  # of each result: every logit, probability and word in it
    objects: dict[str, int]  # role -> how many were built
    deliveries: dict[str, int]  # state -> how many
    received: dict[str, int]  # role -> how many the PACS has, each SOP Instance UID once


def images_of(kind: str, number: int) -> list[Dataset]:
    """A head of 16 slices; from both ends inwards, so that whatever is lacking leaves a hole."""
    series = changed(
        head_series(),
        StudyInstanceUID=generate_uid(),
        SeriesInstanceUID=generate_uid(),
        PatientID=f"P-{number}",
        PatientName=f"PHANTOM^{number}",
        ConvolutionKernel="BONE" if kind == "refused" else "STANDARD",
    )
    for image in series:
        image.SOPInstanceUID = generate_uid()
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    half = len(series) // 2
    pairs = zip(series[:half], reversed(series[half:]), strict=True)
    return [image for pair in pairs for image in pair]


class Disturbed:
    """The hospital, its fault points, and the studies that were sent to it."""

    def __init__(self, hospital: Hospital, faults: Path) -> None:
        self.hospital, self.faults = hospital, faults
        self.studies: list[Study] = []

    def study(self, kind: str) -> Study:
        number = len(self.studies)
        images = images_of(kind, number)
        folder = self.hospital.folder / "sent" / f"{number:04}"
        study = Study(kind, number, images, hospital.written(images, folder))
        self.studies.append(study)
        return study

    def send(self, study: Study, deadline_s: float = DEADLINE_S) -> int:
        """As a modality does: all of it again until all is acknowledged; how many tries it took."""
        deadline = time.monotonic() + deadline_s
        for tries in range(1, 1000):
            with contextlib.suppress(KeyError, IndexError):  # it is not listening yet
                if self.hospital.send(study.paths, study.kind).returncode == 0:
                    return tries
            assert time.monotonic() < deadline, f"study {study.number} is not taken"
            time.sleep(0.3)
        raise AssertionError("unreachable")

    def settled(self, study: Study) -> bool:
        """Whether nothing more is to come of it; no where the database cannot be asked."""
        try:
            return not self.hospital.spooled() and self._is_settled(study)
        except (DBAPIError, FileNotFoundError):
            return False

    def _is_settled(self, study: Study) -> bool:
        rows = self.hospital.study_rows(AnalysisRow, study.uid, study.kind)
        if not rows or any(row.state not in ENDED or row.judge_at for row in rows):
            return False
        if len(self.hospital.stored(study.uid, study.kind)) < len(study.images):
            return False
        jobs = select(JobRow.id).where(
            JobRow.analysis_id == rows[0].id, JobRow.state.in_(["TODO", "DOING"])
        )
        owed = select(DeliveryRow.id).where(
            DeliveryRow.analysis_id == rows[0].id, DeliveryRow.state.in_(["WAITING", "SENDING"])
        )
        return not self.hospital.query(jobs) and not self.hospital.query(owed)

    def wait(self, study: Study, deadline_s: float = DEADLINE_S) -> Outcome:
        hospital.eventually(lambda: self.settled(study), deadline_s)
        return self.outcome(study)

    def outcome(self, study: Study) -> Outcome:
        (analysis,) = self.hospital.study_rows(AnalysisRow, study.uid, study.kind)
        objects = self.hospital.study_rows(ObjectRow, study.uid, study.kind)
        role = {one.sop_instance_uid: one.role for one in objects}
        states = Counter(
            one.state for one in self.hospital.study_rows(DeliveryRow, study.uid, study.kind)
        )
        results = self.hospital.results(study.uid, study.kind)
        return Outcome(
            analysis.state,
            analysis.reason_code,
            analysis.is_partial,
            analysis.result_no,
            tuple(scores(result.finding) for result in results),
            dict(Counter(role.values())),
            dict(states),
            dict(Counter(role.get(uid, "unknown") for uid in self.received(study))),
        )

    def received(self, study: Study) -> dict[str, list[bytes]]:
        """SOP Instance UID -> the bytes of each C-STORE of it, as the PACS wrote them."""
        found: dict[str, list[bytes]] = {}
        for path in sorted(self.hospital.archives[study.kind].folder.iterdir()):
            try:
                with pydicom.dcmread(path) as dataset:
                    if dataset.get("StudyInstanceUID") == study.uid:
                        found.setdefault(dataset.SOPInstanceUID, []).append(path.read_bytes())
            except (pydicom.errors.InvalidDicomError, EOFError):
                continue  # being written, or cut off when the PACS was killed
        return found

    def n_sent_again(self, study: Study) -> int:
        """How often the PACS got what it had: allowed between an answer and its record."""
        return sum(len(copies) - 1 for copies in self.received(study).values())

    def wrongs(self, study: Study) -> list[str]:
        """Whatever must hold of every study, disturbed or not, and does not."""
        rows = self.hospital.study_rows(InstanceRow, study.uid, study.kind)
        objects = self.hospital.study_rows(ObjectRow, study.uid, study.kind)
        said = [
            *self._wrong_instances(study, rows),
            *self._wrong_objects(study, objects),
            *self._wrong_deliveries(study, {one.sop_instance_uid for one in objects}),
        ]
        return [f"study {study.number} ({study.kind}): {one}" for one in said]

    def _wrong_instances(self, study: Study, rows: list[InstanceRow]) -> Iterator[str]:
        sent = {str(image.SOPInstanceUID): image for image in study.images}
        had = Counter(row.sop_instance_uid for row in rows)
        if had != Counter(sent.keys()):
            yield f"{len(sent - had.keys())} instances lost, {sum(had.values()) - len(had)} doubled"
        (owner,) = self.hospital.query(
            select(StudyRow).where(
                StudyRow.study_instance_uid == study.uid, StudyRow.tenant == study.kind
            )
        )
        if not owner.n_instances == owner.inputs_version == len(sent):
            yield f"n_instances {owner.n_instances}, inputs_version {owner.inputs_version}"
        paths = {store_path(self.var, row.tenant, row.study_id, row.id): row for row in rows}
        folder = self.var / "store" / study.kind / str(owner.id)
        if set(folder.iterdir()) != paths.keys():
            yield "the store's files are not the rows'"
        for path, row in paths.items():
            kept, image = pydicom.dcmread(path), sent.get(row.sop_instance_uid)
            if row.stored_at is None or image is None or kept.PixelData != image.PixelData:
                yield f"instance row {row.id} is not what was sent"

    def _wrong_objects(self, study: Study, objects: list[ObjectRow]) -> Iterator[str]:
        for one in objects:
            path = result_folder(self.var, study.kind, one.result_id)
            data = (path / f"{one.sop_instance_uid}.dcm").read_bytes()
            if hashlib.sha256(data).hexdigest() != one.sha256:
                yield f"object {one.role} is not what its row says"

    def _wrong_deliveries(self, study: Study, built: set[str]) -> Iterator[str]:
        for uid, copies in self.received(study).items():
            if uid not in built:
                yield "the PACS has an object that was never built"
            if len(set(copies)) > 1:
                yield "the PACS got other bytes under one SOP Instance UID"

    def leftovers(self) -> list[str]:
        """What must be nowhere once all is settled."""
        found = [str(path) for path in self.var.rglob("*.part") if "database" not in path.parts]
        found += map(str, self.hospital.spooled())
        known = {
            *self.hospital.query(select(ResultRow.id)),
            *self.hospital.query(select(NoticeRow.id)),
        }
        for folder in (self.var / "results").glob("*/*"):
            # Heat maps of a run that died before its rows: nobody reads them, they only lie there.
            names = {path.name for path in folder.iterdir()}
            if UUID(folder.name) not in known and names - {"maps.npz"}:
                found.append(str(folder))
        if n := self.hospital.query(select(func.count()).select_from(QuarantineRow))[0]:
            found.append(f"{n} in quarantine")
        return found

    @property
    def var(self) -> Path:
        return self.hospital.folder / "var"

    def armed(self) -> list[str]:
        """Points that nobody has come through yet."""
        return sorted(path.name for path in (self.faults / "armed").iterdir())

    def disarm(self) -> None:
        for path in (self.faults / "armed").iterdir():
            path.unlink(missing_ok=True)

    def passed(self) -> set[str]:
        """The points that some process has come through, since the last `forget_passed`."""
        return set(os.listdir(self.faults / "passed"))

    def forget_passed(self) -> None:
        for name in self.passed():
            (self.faults / "passed" / name).unlink()


def scores(finding: dict[str, Any]) -> str:
    """A finding without what is of one study or one moment alone; numbers to five digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if key not in OF_ONE_STUDY}
        if isinstance(value, list):
            return [plain(one) for one in value]
        return f"{value:.5g}" if isinstance(value, float) else value

    return repr(plain(finding))


OF_ONE_STUDY = frozenset(
    {
        "result_uuid", "started_at", "ended_at", "instance_id", "sop_instance_uid",
        "series_instance_uid", "study_instance_uid",
    }
)  # fmt: skip


@contextlib.contextmanager
def running(folder: Path, *, database_url: str = "") -> Iterator[Disturbed]:
    """A node with a small untrained bundle, whose processes watch the fault points."""
    faults = folder / "faults"
    for name in ("armed", "passed"):
        (faults / name).mkdir(parents=True)
    bundle = make_bundle(folder / "head", "head", seed=4)  # says 0.55 of this head
    with hospital.running(
        folder,
        tenants={name: f'models = ["head"]\n{more}' for name, more in KINDS.items()},
        destinations={"refused": "send = { not_processed = true }"},
        scp_port=free_port(),  # the same one after a restart, as any site has it
        database_url=database_url,
        inference=f'models = ["{bundle}"]\ndevice = "cpu"\nloaders = 1',
        environment={VARIABLE: str(faults), "OMP_NUM_THREADS": "1"},
    ) as found:
        yield Disturbed(found, faults)
