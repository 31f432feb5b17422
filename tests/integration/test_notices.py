"""AI NOT PROCESSED: from an analysis without a result to a page in a real PACS, or to silence."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import ImageDraw
from pydicom import Dataset, dcmwrite
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from config.tenants import Destination, SendFlags
from dashboard import metrics, overview
from db import operator, queue
from db.job import MAX_ATTEMPTS, JobKind, JobState
from db.sandbox import Sandbox
from db.tables import (
    AnalysisRow,
    BundleRow,
    DeliveryRow,
    DestinationRow,
    EventRow,
    InstanceRow,
    JobRow,
    NoticeRow,
    ObjectRow,
    ResultRow,
    StudyRow,
)
from dicom_sr.deliver import Deliverer
from node import status
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series
from tests.peers import Pacs
from tests.stage import Stages
from tests.validators import dciodvfy

SC = "1.2.840.10008.5.1.4.1.1.7"
SR = "1.2.840.10008.5.1.4.1.1.88.34"
AGENT = "IOMERON 300"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=1, memory_mb=4096, cpu_s=60) as pool:
        yield pool


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    with Pacs() as peer:
        yield peer


class Node:
    """Spool, readiness, inference and delivery, one after the other."""

    def __init__(self, stages: Stages, sandbox: Sandbox) -> None:
        self.stages, self.engine, self._sandbox = stages, stages.engine, sandbox

    @property
    def deliverer(self) -> Deliverer:
        settings = self.stages.settings
        return Deliverer(self.engine, settings, self._sandbox, worker="test", version="0.1.0")

    def takes(self, images: list[Dataset]) -> None:
        self.stages.receive(images)
        self.stages.judge()
        self.stages.infer()

    def run(self, images: list[Dataset]) -> None:
        """All the way to the PACS."""
        self.takes(images)
        self.deliverer.run_once()

    def analysis(self) -> AnalysisRow:
        with Session(self.engine) as session:
            return session.scalars(select(AnalysisRow)).one()

    def rows(self, table: type) -> list:
        with Session(self.engine) as session:
            return list(session.scalars(select(table)))

    def events(self) -> list[str]:
        return [row.kind for row in self.rows(EventRow)]


@pytest.fixture
def make_node(engine, settings, tmp_path, pacs, sandbox):
    """Makes nodes that send notices to `pacs`, unless told otherwise."""
    made: list[Stages] = []

    def make(
        *,
        max_wait_s: float = 0.001,
        others: tuple[Destination, ...] = (),
        owner: dict[str, object] | None = None,
        **send: bool,
    ) -> Node:
        flags = SendFlags(**{"not_processed": True, **send})
        pacs_ = Destination(
            name="pacs", ae_title="PACS", host="127.0.0.1", port=pacs.port, send=flags
        )
        stages = Stages(
            engine,
            settings,
            make_bundle(tmp_path / "head"),
            destinations=(pacs_, *others),
            max_wait_s=max_wait_s,
            quiet_period_s=min(60.0, max_wait_s),
            **(owner or {}),
        )
        made.append(stages)
        return Node(stages, sandbox)

    yield make
    for stages in made:
        stages.close()


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """Every text that stands on a page."""
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def noted(self, xy, text, *args, **kwargs):
        texts.append(text)
        return draw(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return texts


@pytest.fixture
def node(make_node) -> Node:
    return make_node()


def patient(datasets: list[Dataset], series: str = "1.2.3.1") -> list[Dataset]:
    """One made-up patient; every instance its own UID."""
    for dataset in datasets:
        dataset.PatientID, dataset.PatientName = "P1", "DOE^JANE"
        dataset.PatientBirthDate, dataset.StudyDate = "19700101", "20260101"
        dataset.StudyTime, dataset.StudyID = "120000", "S1"
        dataset.SeriesInstanceUID = series
        text = series + str(dataset.ImagePositionPatient)
        number = int(hashlib.sha256(text.encode()).hexdigest()[:20], 16)
        dataset.SOPInstanceUID = f"2.25.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return datasets


def with_contrast() -> list[Dataset]:
    return patient(head_series(ContrastBolusAgent=AGENT))


def plain(series: str = "1.2.3.2") -> list[Dataset]:
    return patient(head_series(), series)


def cut_short() -> list[Dataset]:
    images = plain()
    images[3].PixelData = images[3].PixelData[:1000]
    return images


def classes(received: list[Dataset]) -> list[str]:
    return [str(one.SOPClassUID) for one in received]


def test_a_head_that_cannot_be_judged_gets_one_page_that_says_so(node, pacs, tmp_path):
    images = with_contrast()

    node.run(images)

    (page,) = pacs.received
    assert (page.SOPClassUID, page.SeriesNumber, page.Modality) == (SC, 9901, "OT")
    assert page.StudyInstanceUID == images[0].StudyInstanceUID
    assert (page.PatientID, page.PatientName) == ("P1", "DOE^JANE")
    assert page.DerivationDescription.startswith("AI did not process this study")
    assert page.BodyPartExamined == "HEAD"
    assert (page.BurnedInAnnotation, page.ContentQualification) == ("NO", "RESEARCH")
    assert "SourceImageSequence" not in page
    dcmwrite(tmp_path / "page.dcm", page, enforce_file_format=True)
    assert dciodvfy(tmp_path / "page.dcm", iod="SCImage") == []

    analysis = node.analysis()
    assert (analysis.state, analysis.reason_code) == ("NOT_ANALYSED", "contrast")
    assert analysis.result_no == 0  # it has no result
    assert node.rows(ResultRow) == []
    assert [row.state for row in node.rows(DeliveryRow)] == ["DELIVERED"]
    assert "notice_built" in node.events()
    assert AGENT not in str(node.rows(NoticeRow)[0].notice)


@pytest.mark.parametrize("body_part", ["CHEST", "ABDOMEN"])
def test_another_kind_of_study_stays_silent(node, pacs, body_part):
    node.run(patient(head_series(BodyPartExamined=body_part)))

    assert (node.analysis().state, node.analysis().is_applicable) == ("NOT_ANALYSED", False)
    assert node.rows(JobRow) == node.rows(NoticeRow) == pacs.received == []


def test_a_destination_that_did_not_ask_gets_nothing_and_no_number_is_used(make_node, pacs):
    node = make_node(not_processed=False)
    node.run(with_contrast())
    assert pacs.received == []

    node.run(plain())

    assert node.rows(NoticeRow) == []
    assert {int(one.SeriesNumber) // 10 for one in pacs.received} == {990}
    assert node.analysis().result_no == 1


def test_a_failure_is_said_as_well(node, pacs):
    node.run(cut_short())

    assert (node.analysis().state, node.analysis().reason_code) == ("FAILED", "undecodable")
    assert classes(pacs.received) == [SC]
    (row,) = node.rows(NoticeRow)
    assert (row.notice["is_failure"], row.notice["code"]) == (True, "undecodable")


def test_a_result_that_comes_later_is_revision_2_and_replaces_the_notice(node, pacs):
    node.run(with_contrast())
    (notice,) = pacs.received

    node.run(plain())

    later = pacs.received[1:]
    assert {int(one.SeriesNumber) for one in later} >= {9911, 9913}
    report = next(one for one in later if one.Modality == "SR")
    assert "PredecessorDocumentsSequence" not in report  # a page is no document
    assert "REVISION 2 - replaces AI NOT PROCESSED of" in words_of(report)
    assert notice.SOPInstanceUID not in {one.SOPInstanceUID for one in later}
    analysis = node.analysis()
    assert (analysis.state, analysis.result_no) == ("DELIVERED", 2)
    (result,) = node.rows(ResultRow)
    assert result.result_no == 2


def test_a_notice_after_a_result_takes_nothing_back(node, pacs):
    node.run(plain())
    n_before = len(pacs.received)
    rerun(node)
    fail(node)

    node.deliverer.run_once()

    (page,) = pacs.received[n_before:]
    assert page.SeriesNumber == 9911
    analysis = node.analysis()
    assert (analysis.state, analysis.result_no) == ("FAILED", 1)  # what it found is still there
    (result,) = node.rows(ResultRow)
    assert result.result_no == 1


def test_a_notice_that_was_not_sent_yet_is_dropped_when_the_study_opens_again(node, pacs):
    pacs.rejects = True
    node.run(with_contrast())
    assert [row.state for row in node.rows(DeliveryRow)] == ["WAITING"]

    node.takes(plain())
    pacs.rejects = False
    let_destination_be_tried_again(node)
    node.deliverer.run_once()

    states = {str(row.result_id): row.state for row in node.rows(DeliveryRow)}
    assert states.pop(str(node.rows(NoticeRow)[0].id)) == "DROPPED"
    assert list(states.values()) == ["DELIVERED"]
    assert all("AI did not" not in one.get("DerivationDescription", "") for one in pacs.received)
    report = next(one for one in pacs.received if one.Modality == "SR")
    assert report.SeriesNumber == 9913
    assert "REVISION" not in words_of(report)  # nobody has an earlier one


def test_a_notice_job_of_a_study_that_opened_again_says_nothing(node, pacs):
    node.takes(with_contrast())
    node.takes(plain())

    node.deliverer.run_once()

    assert node.rows(NoticeRow) == []
    assert "SR" in {one.Modality for one in pacs.received}


def test_a_retry_sends_the_same_bytes(node, pacs):
    pacs.answer = 0xA700
    node.run(with_contrast())
    pacs.answer = 0x0000
    let_destination_be_tried_again(node)

    node.deliverer.run_once()

    assert len(pacs.raw) == 2
    assert len(set(pacs.raw)) == len(pacs.instances) == 1


def test_a_build_that_is_tried_again_is_the_same_notice(node, pacs):
    node.takes(with_contrast())
    in_the_way = node.stages.settings.node.data_dir / "results"
    in_the_way.write_bytes(b"")
    node.deliverer.run_once()  # the page is drawn, and cannot be stored
    (first,) = node.rows(NoticeRow)
    assert [(row.state, row.error_code) for row in node.rows(JobRow)] == [("TODO", "storage_error")]

    in_the_way.unlink()
    make_due(node)
    node.deliverer.run_once()

    (page,) = pacs.received
    assert [row.id for row in node.rows(NoticeRow)] == [first.id]
    assert [row.sop_instance_uid for row in node.rows(ObjectRow)] == [page.SOPInstanceUID]


def test_where_no_instance_can_be_read_a_person_is_told_and_it_can_be_tried_again(node, pacs):
    node.takes(with_contrast())
    folder = node.stages.settings.node.data_dir
    hidden = (folder / "store").rename(folder / "hidden")
    node.deliverer.run_once()
    assert [row.state for row in node.rows(JobRow)] == ["FAILED"]
    assert "notice_given_up" in node.events()
    assert node.analysis().state == "NOT_ANALYSED"

    hidden.rename(folder / "store")
    with Session(node.engine) as session, session.begin():
        session.execute(update(JobRow).values(state=JobState.TODO))
    node.deliverer.run_once()

    assert len(pacs.received) == 1


def test_an_instance_that_is_gone_or_broken_leaves_the_patient_to_the_next(node, pacs):
    node.takes(with_contrast())
    gone, broken, third = stored_files(node)[:3]
    gone.unlink()
    broken.write_bytes(b"no DICOM")

    node.deliverer.run_once()

    (page,) = pacs.received
    assert (page.PatientID, page.PatientName) == ("P1", "DOE^JANE")
    (row,) = node.rows(NoticeRow)
    assert row.notice["source"]["instance_id"] == third.stem


def test_a_held_study_gets_no_page_until_it_is_decided(node, pacs):
    node.takes(with_contrast())
    set_held(node, True)
    node.deliverer.run_once()
    assert pacs.received == node.rows(NoticeRow) == []

    set_held(node, False)
    node.deliverer.run_once()

    assert len(pacs.received) == 1


def test_a_page_about_another_patient_is_not_sent(node, pacs):
    pacs.rejects = True
    node.run(with_contrast())
    pacs.rejects = False
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(patient_id="SOMEBODY-ELSE"))
    let_destination_be_tried_again(node)

    node.deliverer.run_once()

    assert pacs.received == []
    assert [row.state for row in node.rows(DeliveryRow)] == ["REFUSED"]
    assert node.analysis().state == "NOT_ANALYSED"


def test_what_may_still_come_is_waited_for(make_node, pacs):
    node = make_node(max_wait_s=600.0)
    node.run(with_contrast())
    assert node.analysis().state == "NOT_ANALYSED"  # which is stated at once
    assert pacs.received == node.rows(NoticeRow) == []
    (job,) = node.rows(JobRow)
    assert (job.kind, job.state, job.attempts) == (JobKind.NOTICE, "TODO", 0)
    assert backlog(node) == [0, 0, 0]  # it is no work that waits

    with Session(node.engine) as session, session.begin():
        long_ago = func.now() - func.make_interval(0, 0, 0, 1)
        session.execute(update(StudyRow).values(last_instance_at=long_ago))
        session.execute(update(JobRow).values(run_after=func.now()))
    node.deliverer.run_once()

    assert len(pacs.received) == 1


def test_notices_of_uploads_stay_here(node, pacs):
    node.takes(with_contrast())
    with Session(node.engine) as session, session.begin():
        for table in (StudyRow, AnalysisRow, InstanceRow, JobRow):
            session.execute(update(table).values(origin="user:1"))

    node.deliverer.run_once()

    assert pacs.received == node.rows(NoticeRow) == []
    assert [row.state for row in node.rows(JobRow)] == ["DONE"]


def test_a_bundle_that_nobody_has_presented_is_waited_for(node, pacs):
    with Session(node.engine) as session, session.begin():
        for row in session.scalars(select(BundleRow)):
            session.delete(row)
    node.run(with_contrast())
    for _ in range(MAX_ATTEMPTS + 1):
        make_due(node)
        node.deliverer.run_once()
    (job,) = node.rows(JobRow)
    assert (job.state, job.error_code, job.attempts) == ("TODO", "bundle_unknown", 0)

    node.stages.fleet.present()
    make_due(node)
    node.deliverer.run_once()

    assert len(pacs.received) == 1


def test_nothing_of_a_notice_is_counted_as_a_result(node, pacs):
    """The tables that statistics are made of have no row of it."""
    node.run(with_contrast())

    with Session(node.engine) as session:
        assert session.scalar(select(func.count()).select_from(ResultRow)) == 0
        joined = select(DeliveryRow).join(ResultRow, ResultRow.id == DeliveryRow.result_id)
        assert session.scalars(joined).all() == []


@pytest.mark.parametrize("refused", [False, True])
def test_a_result_without_its_report_is_a_result_all_the_same(make_node, pacs, drawn, refused):
    node = make_node(sr=refused)
    pacs.answers = {SR: 0xA900}
    node.run(plain())
    images = [one for one in pacs.received if one.Modality == "OT"]
    assert images
    drawn.clear()
    rerun(node)
    fail(node)

    node.deliverer.run_once()

    page = " ".join(drawn)
    assert "neither confirms nor withdraws the AI result of" in page
    assert "neither found nor excluded" not in page


def test_numbers_that_could_not_be_sent_are_not_denied(make_node, pacs, drawn):
    node = make_node(owner={"thresholds": {"head.any": 0.02}})
    node.takes(plain())
    (result,) = node.rows(ResultRow)
    assert result.is_positive
    (maps,) = (node.stages.settings.node.data_dir / "results").rglob("maps.npz")
    maps.unlink()

    node.deliverer.run_once()  # gives the result up
    node.deliverer.run_once()

    assert (node.analysis().state, node.analysis().reason_code) == ("FAILED", "maps_gone")
    (page,) = pacs.received
    assert page.DerivationDescription.startswith("AI result not sent")
    words = " ".join(drawn)
    assert "An AI result exists that was not sent here" in words
    for untrue in ("NOT PROCESSED", "neither found nor excluded", "REVISION"):
        assert untrue not in words


def test_a_destination_that_got_nothing_before_hears_of_no_revision(make_node, pacs, drawn):
    with Pacs() as other:
        silent = Destination(name="b", ae_title="PACS", host="127.0.0.1", port=other.port)
        node = make_node(others=(silent,))
        node.run(with_contrast())
        assert (len(pacs.received), len(other.received)) == (1, 0)

        node.run(plain())

        (told,) = [one for one in pacs.received if one.Modality == "SR"]
        (first,) = [one for one in other.received if one.Modality == "SR"]
    assert "REVISION 2 - replaces AI NOT PROCESSED of" in words_of(told)
    assert "REVISION" not in words_of(first)
    assert told.SeriesNumber == first.SeriesNumber == 9913


def test_an_archive_that_is_too_old_is_not_annotated(make_node, pacs):
    node = make_node(owner={"max_study_age_days": 30})
    old = with_contrast()
    for image in old:
        image.StudyDate = "20200101"

    node.run(old)

    assert (node.analysis().state, node.analysis().reason_code) == ("NOT_ANALYSED", "study_too_old")
    assert node.rows(JobRow) == pacs.received == []


def rerun(node: Node) -> None:
    with Session(node.engine) as session, session.begin():
        operator.rerun(session, node.analysis().id, actor="test")


def fail(node: Node) -> None:
    """Inference gives up."""
    with Session(node.engine) as session, session.begin():
        job = queue.claim(session, [JobKind.INFER], "test")
        assert job is not None
        queue.give_up(session, job, code="undecodable", reason="An image cannot be decoded.")
    assert node.analysis().state == "FAILED"


def words_of(report: Dataset) -> str:
    """Every text in a report."""
    return "\n".join(e.value for e in report.iterall() if e.keyword == "TextValue")


def stored_files(node: Node) -> list[Path]:
    """In the order in which they were received."""
    files = {path.stem: path for path in node.stages.settings.node.data_dir.rglob("store/**/*.dcm")}
    with Session(node.engine) as session:
        order = select(InstanceRow.id).order_by(InstanceRow.received_at, InstanceRow.id)
        return [files[str(one)] for one in session.scalars(order)]


def make_due(node: Node) -> None:
    with Session(node.engine) as session, session.begin():
        session.execute(update(JobRow).values(run_after=func.now()))


def backlog(node: Node) -> list[int]:
    """How many jobs wait, by `vigil status`, by the overview and by the metrics."""
    with Session(node.engine) as session:
        jobs = next(one for one in metrics._numbers(session) if one.name == "vigil_jobs")
        n_metrics = int(sum(sample.value for sample in jobs.samples))
        found = [status._queue(session)["waiting"], overview.queue(session).n_jobs, n_metrics]
        assert overview.queue(session).oldest_job_s is None or found[0]
    return found


def set_held(node: Node, is_held: bool) -> None:
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(is_held=is_held))


def let_destination_be_tried_again(node: Node) -> None:
    with Session(node.engine) as session, session.begin():
        session.execute(update(DestinationRow).values(retry_at=func.now()))
        session.execute(update(DeliveryRow).values(run_after=func.now()))
