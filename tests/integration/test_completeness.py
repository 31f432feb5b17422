"""Studies in pieces, mixed, late, tiny or huge: one final result, or a reason (H22, H24, H25)."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage, XRayRadiationDoseSRStorage
from sqlalchemy import select
from sqlalchemy.orm import Session

from db.meta import Provenance
from db.result import Finding
from db.tables import AnalysisRow, InstanceRow, JobRow, ResultRow, StudyRow
from tests.bundles.make import make_bundle
from tests.bundles.sources import ct_slice, head_series, image
from tests.clock import Clock
from tests.integration.test_inference_stage import patient
from tests.stage import Stages

QUIET_S, DAY_S = 20.0, 24 * 3600.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "head")


@pytest.fixture
def clock(database_url) -> Iterator[Clock]:
    clock = Clock(database_url)
    yield clock
    clock.close()


@pytest.fixture
def stages(clock, engine, settings, bundle, request) -> Iterator[Stages]:
    options = {"quiet_period_s": QUIET_S, **getattr(request, "param", {})}
    stages = Stages(engine, settings, bundle, **options)
    yield stages
    stages.close()


def pass_time(stages: Stages, clock: Clock, seconds: float) -> None:
    """Move the clock on, and let the node do what is due then."""
    clock.advance(seconds)
    while stages.readiness.sweep_once():
        pass
    stages.infer()


def outcome(stages: Stages, study_uid: str = "1.2.3") -> AnalysisRow:
    with Session(stages.engine) as session:
        query = select(AnalysisRow).join(StudyRow, StudyRow.id == AnalysisRow.study_id)
        return session.scalars(query.where(StudyRow.study_instance_uid == study_uid)).one()


def findings(stages: Stages, study_uid: str = "1.2.3") -> list[Finding]:
    with Session(stages.engine) as session:
        query = select(ResultRow).join(StudyRow, StudyRow.id == ResultRow.study_id)
        rows = session.scalars(
            query.where(StudyRow.study_instance_uid == study_uid).order_by(ResultRow.result_no)
        )
        return [Finding.from_json(row.finding) for row in rows]


def said(stages: Stages) -> list[tuple[int, bool]]:
    """Images and partiality of each result, oldest first."""
    return [(len(one.images), one.is_partial) for one in findings(stages)]


def test_h40_what_waits_in_the_spool_is_not_taken_for_missing(stages, clock):
    """The database was away for longer than missing images are waited for."""
    series = head_series()
    stages.receive(series[::2])
    waiting = stages.spool.keep(Provenance(tenant="north", calling_ae="CT1"), b"rest of it")
    (path,) = stages.spool.folder.rglob(f"{waiting}.dcm")
    long_ago = time.time() - 700
    os.utime(path, (long_ago, long_ago))

    pass_time(stages, clock, 700)
    assert said(stages) == []

    path.unlink()
    stages.receive(series[1::2])
    pass_time(stages, clock, QUIET_S + 1)
    assert said(stages) == [(16, False)]


@pytest.mark.parametrize(
    ("stages", "results"),
    [
        ({"max_wait_s": 1800.0}, [(16, False)]),
        # Ten minutes are up: what is there is told as PARTIAL, and replaced by the whole.
        ({"max_wait_s": 600.0}, [(11, True), (16, False)]),
    ],
    indirect=["stages"],
)
def test_h22_three_associations_with_gaps_of_6_s_and_20_min_have_one_final_result(
    stages, clock, results
):
    images = patient(head_series())

    stages.receive(images[0::3])
    pass_time(stages, clock, 6.0)
    assert said(stages) == []
    stages.receive(images[1::3])
    for _ in range(4):
        pass_time(stages, clock, 300.0)
    stages.receive(images[2::3])
    pass_time(stages, clock, QUIET_S + 1)
    pass_time(stages, clock, DAY_S)

    assert said(stages) == results
    assert (outcome(stages).state, outcome(stages).is_partial) == ("FOUND", False)


def test_h22_a_gap_of_6_s_is_no_end(stages, clock):
    *most, last = patient(head_series())

    stages.receive(most)
    pass_time(stages, clock, 6.0)
    stages.receive([last])
    pass_time(stages, clock, QUIET_S - 6.0)
    assert said(stages) == []
    pass_time(stages, clock, 7.0)

    assert said(stages) == [(16, False)]


def test_h22_two_studies_interleaved_on_one_association_have_a_result_each(stages, clock):
    one = patient(head_series())
    other = patient(head_series(SeriesInstanceUID="1.2.4.1", StudyInstanceUID="1.2.4"))
    for image_of_other in other:
        image_of_other.PatientID, image_of_other.PatientName = "P2", "ROE^RICHARD"

    stages.receive([x for pair in zip(one, other, strict=True) for x in pair])
    pass_time(stages, clock, QUIET_S + 1)

    for uid, series in (("1.2.3", one), ("1.2.4", other)):
        (finding,) = findings(stages, uid)
        assert {x.sop_instance_uid for x in finding.images} == {x.SOPInstanceUID for x in series}


def test_h24_a_second_series_the_next_day_does_not_replace_a_result_it_does_not_better(
    stages, clock
):
    stages.receive(patient(head_series()))
    pass_time(stages, clock, QUIET_S + 1)
    before = outcome(stages)

    stages.receive(
        patient(head_series(SeriesInstanceUID="1.2.3.8", SeriesNumber=8, ConvolutionKernel="BONE"))
    )
    pass_time(stages, clock, DAY_S)

    assert said(stages) == [(16, False)]
    assert outcome(stages).row_version == before.row_version


def test_h24_a_better_series_the_next_day_has_the_last_word_once(stages, clock):
    stages.receive(patient(head_series(ConvolutionKernel="SOFT", SliceThickness=8.0)))
    pass_time(stages, clock, QUIET_S + 1)

    stages.receive(patient(head_series(SeriesInstanceUID="1.2.3.8", SeriesNumber=8)))
    pass_time(stages, clock, DAY_S)
    pass_time(stages, clock, DAY_S)

    first, second = findings(stages)
    assert {one.series_instance_uid for one in first.images} == {"1.2.3.1"}
    assert {one.series_instance_uid for one in second.images} == {"1.2.3.8"}


def dose_report() -> Dataset:
    report = image(np.zeros((8, 8), np.int16), SOPClassUID=XRayRadiationDoseSRStorage)
    for keyword in ("PixelData", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"):
        delattr(report, keyword)
    report.Modality, report.SeriesInstanceUID, report.SeriesNumber = "SR", "1.2.3.99", 99
    return report


def localiser() -> Dataset:
    return ct_slice(
        np.zeros((128, 128), np.int16), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        SeriesInstanceUID="1.2.3.98", SeriesNumber=1, ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
    )  # fmt: skip


@pytest.mark.parametrize("first", [dose_report, localiser])
@pytest.mark.parametrize("gap_s", [1.0, QUIET_S + 1])
def test_h24_a_dose_report_or_localiser_first_keeps_nothing_from_its_one_result(
    stages, clock, first, gap_s
):
    stages.receive(patient([first()]))
    pass_time(stages, clock, gap_s)
    stages.receive(patient(head_series()))
    pass_time(stages, clock, QUIET_S + 1)

    assert said(stages) == [(16, False)]
    assert outcome(stages).state == "FOUND"


def test_h24_a_study_of_one_slice_says_why_it_is_not_analysed(stages, clock):
    stages.receive(patient(head_series())[:1])
    pass_time(stages, clock, QUIET_S + 1)
    pass_time(stages, clock, 601.0)

    row = outcome(stages)
    assert (row.state, row.reason_code, said(stages)) == ("NOT_ANALYSED", "images", [])
    assert row.reason


@pytest.mark.timeout(1200)
def test_h24_a_study_of_5000_slices_ends_in_a_reason_and_with_a_plain_head_in_its_result(
    stages, clock
):
    """249 passes over 20 places, as a perfusion scan sends them, and then 20 slices of a head."""
    picture = np.zeros((8, 8), np.int16)
    many = [
        ct_slice(
            picture, z=5.0 * place, SeriesInstanceUID="1.2.3.7", SeriesNumber=7,
            SOPInstanceUID=f"2.25.{1000 * time + place}", InstanceNumber=20 * time + place,
        )
        for time in range(249)
        for place in range(20)
    ]  # fmt: skip
    for one in many:
        one.PatientID, one.PatientName = "P1", "DOE^JANE"

    stages.receive(many)
    pass_time(stages, clock, QUIET_S + 1)
    refused = outcome(stages)
    stages.receive(patient(head_series(n=20)))
    pass_time(stages, clock, QUIET_S + 1)

    assert refused.state == "NOT_ANALYSED"
    assert refused.reason
    with Session(stages.engine) as session:
        assert session.scalars(select(StudyRow.n_instances)).one() == 5000
    (finding,) = findings(stages)
    assert {one.series_instance_uid for one in finding.images} == {"1.2.3.1"}


def capture() -> Dataset:
    return image(
        np.zeros((64, 64), np.uint16), SOPClassUID=SecondaryCaptureImageStorage, Modality="OT",
        SeriesInstanceUID="1.2.3.97", SeriesNumber=97, Manufacturer="Other AI Ltd",
        ImageType=["DERIVED", "SECONDARY"], BodyPartExamined="HEAD",
    )  # fmt: skip


def test_h25_another_vendors_capture_is_stored_and_changes_no_result(stages, clock):
    stages.receive(patient(head_series()))
    pass_time(stages, clock, QUIET_S + 1)
    stages.receive(patient([capture()]))
    pass_time(stages, clock, QUIET_S + 1)

    with Session(stages.engine) as session:
        classes = session.scalars(select(InstanceRow.sop_class_uid)).all()
        assert len(session.scalars(select(JobRow.id).where(JobRow.kind == "INFER")).all()) == 1
    assert classes.count(SecondaryCaptureImageStorage) == 1
    assert said(stages) == [(16, False)]


def test_h25_another_vendors_capture_alone_is_not_for_this_bundle(stages, clock):
    stages.receive(patient([capture()]))
    pass_time(stages, clock, QUIET_S + 1)

    row = outcome(stages)
    assert (row.state, row.is_applicable) == ("NOT_ANALYSED", False)


def test_h25_a_scanners_own_reformat_of_5_mm_is_analysed_as_the_manifest_says(stages, clock):
    reformat = head_series(ImageType=["DERIVED", "SECONDARY", "AXIAL"])
    stages.receive(patient(reformat))
    pass_time(stages, clock, QUIET_S + 1)
    assert said(stages) == [(16, False)]

    mpr = head_series(
        ImageType=["DERIVED", "SECONDARY", "MPR"], SeriesInstanceUID="1.2.4.1",
        StudyInstanceUID="1.2.4",
    )  # fmt: skip
    stages.receive(patient(mpr))
    pass_time(stages, clock, QUIET_S + 1)
    row = outcome(stages, "1.2.4")
    assert (row.state, row.reason_code) == ("NOT_ANALYSED", "image_type")
