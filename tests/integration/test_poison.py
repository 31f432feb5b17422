"""Studies that crash or hang the decoder every time: FAILED with a reason, and others flow (H42).

That kill the worker itself: tests/e2e/test_faults.py.
"""

import os
import struct
import time

import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless
from sqlalchemy import select
from sqlalchemy.orm import Session

from db.files import store_path
from db.tables import AnalysisRow, InstanceRow, StudyRow
from inference import loader
from tests.builders import changed
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series
from tests.integration.test_inference_stage import patient
from tests.stage import Stages

SIZE = 12288  # rows and columns: 300 MB of pixels in 5 MB of file
TIMEOUT_S = 15.0


def bomb(image: Dataset) -> Dataset:
    """The same image, so large that no decoder may hold it: runs of 128 zeros (PS3.5 G.3.1)."""
    segment = b"\x81\x00" * (SIZE * SIZE // 128)
    offsets = struct.pack("<16I", 2, 64, 64 + len(segment), *[0] * 13)
    image.Rows = image.Columns = SIZE
    image.PixelData = encapsulate([offsets + segment + segment])
    image["PixelData"].VR = "OB"
    image.file_meta.TransferSyntaxUID = RLELossless
    return image


@pytest.fixture
def stages(engine, settings, tmp_path):
    limits = {"loader_memory_mb": 640, "loader_timeout_s": TIMEOUT_S}
    bundle = make_bundle(tmp_path / "head")
    manifest = (bundle / "manifest.toml").read_text()  # whose rule would refuse so large a matrix
    (bundle / "manifest.toml").write_text(manifest.replace("2048]", "20000]"))
    stages = Stages(engine, settings, bundle, inference=limits)
    yield stages
    stages.close()


def other() -> list[Dataset]:
    """Another patient's study."""
    images = patient(changed(head_series(), StudyInstanceUID="1.2.9", SeriesInstanceUID="1.2.9.1"))
    return changed(images, PatientID="P2")


def outcomes(stages: Stages) -> dict[str, AnalysisRow]:
    with Session(stages.engine) as session:
        query = select(StudyRow.study_instance_uid, AnalysisRow).join(
            AnalysisRow, AnalysisRow.study_id == StudyRow.id
        )
        return {uid: row for uid, row in session.execute(query)}


def run_both(stages: Stages, poison: str) -> tuple[AnalysisRow, AnalysisRow]:
    """Each study's end, the poison's first; it was claimed first, too."""
    stages.judge()
    deadline = time.monotonic() + 30 * TIMEOUT_S
    while stages.scheduler.step() or stages.scheduler.is_busy:
        assert time.monotonic() < deadline
        stages.scheduler.wait()
    found = outcomes(stages)
    return found[poison], found["1.2.9"]


def test_h42_an_image_that_crashes_its_decoder_every_time_fails_its_study_alone(stages):
    images = [bomb(image) for image in patient(head_series(13))]  # a series has one matrix
    stages.receive(images)
    stages.receive(other())

    poison, clean = run_both(stages, images[0].StudyInstanceUID)

    assert (poison.state, poison.reason_code) == ("FAILED", "decoder_killed")
    assert poison.reason == (
        "Image 1 of 13 (series 2, instance 13): it ended its decoder each time it was read."
    )
    assert clean.state == "FOUND"


def test_h42_an_image_that_hangs_its_decoder_every_time_fails_its_study_alone(stages, monkeypatch):
    tried = []
    decode = stages.scheduler._loader._sandbox.run
    monkeypatch.setattr(
        stages.scheduler._loader._sandbox,
        "run",
        lambda function, path, *more, **options: (
            tried.append(path) or decode(function, path, *more, **options)
        ),
    )
    images = patient(head_series())
    stages.receive(images)
    stages.receive(other())
    with Session(stages.engine) as session:
        row = session.scalars(
            select(InstanceRow).where(InstanceRow.sop_instance_uid == images[4].SOPInstanceUID)
        ).one()
        path = store_path(stages.settings.node.data_dir, "north", row.study_id, row.id)
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for ever

    poison, clean = run_both(stages, images[0].StudyInstanceUID)

    assert (poison.state, poison.reason_code) == ("FAILED", "decoder_killed")
    assert tried.count(str(path.resolve())) == loader.MAX_DEATHS == 3
    assert clean.state == "FOUND"
