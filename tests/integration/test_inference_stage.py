"""Spool to finding: the real intake, readiness, loader and scheduler, with small bundles."""

import hashlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from db import operator
from db.job import MAX_ATTEMPTS
from db.result import Finding
from db.tables import AnalysisRow, EventRow, InstanceRow, JobRow, QuarantineRow, ResultRow
from inference import device as devices
from inference import fleet as fleets
from inference import scheduler as scheduling
from inference.bundle import BundleError
from inference.device import Device, DeviceFault
from inference.fleet import Fleet
from inference.scheduler import Scheduler
from inference.serving import load_served, pick_device
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series, radiograph
from tests.stage import Stages


@pytest.fixture
def stages(engine, settings, tmp_path):
    stages = Stages(engine, settings, make_bundle(tmp_path / "head"))
    yield stages
    stages.close()


def analysis(stages: Stages) -> AnalysisRow:
    with Session(stages.engine) as session:
        return session.scalars(select(AnalysisRow)).one()


def results(stages: Stages) -> list[ResultRow]:
    with Session(stages.engine) as session:
        return list(session.scalars(select(ResultRow).order_by(ResultRow.result_no)))


def test_a_whole_series_becomes_a_finding(stages):
    stages.receive(patient(head_series()))
    assert analysis(stages).state == "WAITING"

    stages.judge()
    assert analysis(stages).state == "QUEUED"
    stages.infer()

    row = analysis(stages)
    (result,) = results(stages)
    finding = Finding.from_json(result.finding)
    assert (row.state, row.result_no, row.is_partial) == ("FOUND", 1, False)
    assert len(finding.images) == 16
    assert [label.label for label in finding.labels] == ["any", "left", "rare"]
    assert np.isfinite(finding.image_logits["any"]).all()


def test_heat_maps_of_key_images_are_kept_in_the_source_matrix(engine, settings, tmp_path):
    stages = Stages(engine, settings, make_bundle(tmp_path / "head"), thresholds={"head.any": 0.02})
    stages.receive(patient(head_series()))
    stages.judge()
    stages.infer()

    (result,) = results(stages)
    finding = Finding.from_json(result.finding)
    folder = stages.settings.node.data_dir / "results" / "north" / finding.result_uuid
    with np.load(folder / "maps.npz") as maps:
        shapes = {name: maps[name].shape for name in maps.files}
    stages.close()
    assert finding.is_positive
    assert shapes == {f"cam_{i}": (128, 128) for i in range(len(finding.key_images))}


def test_a_series_with_a_hole_waits_and_is_then_partial(stages):
    images = patient(head_series())
    del images[7]
    stages.receive(images)

    stages.judge()
    assert analysis(stages).state == "WAITING"
    stages.pass_max_wait()
    stages.judge()
    stages.infer()

    assert analysis(stages).is_partial
    (result,) = results(stages)
    finding = Finding.from_json(result.finding)
    assert finding.is_partial
    assert any("missing" in note for note in finding.notes)


@pytest.mark.parametrize("is_cut_first", [True, False])
def test_an_end_image_that_came_cut_off_is_missed_though_it_leaves_no_hole(stages, is_cut_first):
    *most, last = patient(head_series())
    for part in (True, False) if is_cut_first else (False, True):
        stages.receive([last] if part else most, lost_bytes=100 if part else 0)

    stages.judge()
    assert analysis(stages).state == "WAITING"
    stages.pass_max_wait()
    stages.judge()
    assert (analysis(stages).state, analysis(stages).is_partial) == ("QUEUED", True)
    stages.infer()
    assert Finding.from_json(results(stages)[-1].finding).is_partial

    stages.receive([last])  # sent again, whole
    stages.judge()
    assert (analysis(stages).state, analysis(stages).is_partial) == ("QUEUED", False)


def test_a_rerun_does_not_forget_an_image_that_came_cut_off(stages):
    *most, last = patient(head_series())
    stages.receive(most)
    stages.receive([last], lost_bytes=100)
    stages.pass_max_wait()
    stages.judge()
    stages.infer()

    rerun(stages)
    stages.infer()

    assert partial(stages) == [True, True]
    assert analysis(stages).is_partial


@pytest.mark.parametrize("is_analysed", [True, False])
def test_an_image_that_comes_cut_off_after_the_series_was_judged_reopens_it_once(
    stages, is_analysed
):
    *most, last = patient(head_series())
    stages.receive(most)
    stages.judge()
    if is_analysed:
        stages.infer()

    stages.receive([last], lost_bytes=100)
    assert analysis(stages).judge_at is not None
    stages.judge()
    assert analysis(stages).state == "WAITING"
    stages.pass_max_wait()
    stages.judge()
    stages.infer()
    for _ in range(2):  # again; and another object of the study
        stages.receive([last], lost_bytes=100)
        stages.receive(patient(head_series(n=2, SeriesInstanceUID="1.2.3.99", SeriesNumber=9)))
        stages.judge()
        stages.infer()

    assert partial(stages) == [False, True][not is_analysed :]
    assert analysis(stages).state == "FOUND"

    stages.receive([last])  # whole at last
    stages.judge()
    stages.infer()
    assert partial(stages)[-1] is False
    assert len(partial(stages)) == 2 + is_analysed


def test_an_image_that_comes_cut_off_while_the_series_is_analysed_is_not_forgotten(stages):
    *most, last = patient(head_series())
    stages.receive(most)
    stages.judge()
    stages.infer()
    rerun(stages)
    stages.scheduler.step()  # claimed, and soon loaded, as it was

    stages.receive([last], lost_bytes=100)
    stages.infer()
    stages.judge()
    stages.pass_max_wait()
    stages.judge()
    stages.infer()

    assert analysis(stages).is_partial
    assert partial(stages)[-1]


def stranger(image):
    image.PatientID, image.PatientName = "P2", "ROE^RICHARD"
    return image


@pytest.mark.parametrize("n_before", [0, 1])
def test_another_patients_cut_off_image_makes_no_study_partial(stages, n_before):
    *most, last = patient(head_series())
    stages.receive(most[:n_before])
    stages.receive([stranger(last)], lost_bytes=100)
    stages.receive(most[n_before:])

    stages.judge()

    assert (analysis(stages).state, analysis(stages).is_partial) == ("QUEUED", False)


@pytest.mark.parametrize("uid", ["", "1.2.3.4.5"])
@pytest.mark.parametrize("is_cut_first", [True, False])
def test_a_cut_off_image_sent_under_another_uid_is_not_missed_for_ever(stages, uid, is_cut_first):
    *most, last = patient(head_series())
    for part in (True, False) if is_cut_first else (False, True):
        if part:
            stages.receive([last], lost_bytes=100, uid=uid)
        else:
            stages.receive(most)

    stages.judge()

    assert (analysis(stages).state, analysis(stages).is_partial) == ("QUEUED", False)


def test_a_cut_off_image_that_an_operator_discards_is_no_more_missed(stages):
    *most, last = patient(head_series())
    stages.receive(most)
    stages.receive([last], lost_bytes=100)
    stages.judge()
    assert analysis(stages).state == "WAITING"

    with Session(stages.engine) as session, session.begin():
        row = session.scalars(select(QuarantineRow)).one()
        operator.discard(session, row.id, actor="test")
    while stages.readiness.sweep_once():
        pass

    assert (analysis(stages).state, analysis(stages).is_partial) == ("QUEUED", False)
    stages.infer()
    rerun(stages)
    stages.infer()
    assert partial(stages) == [False, False]


def test_late_slices_reopen_and_a_second_result_is_issued(stages):
    images = patient(head_series())
    stages.receive(images[:-4])
    stages.judge()
    stages.infer()
    assert len(results(stages)) == 1

    stages.receive(images[-4:])
    stages.judge()
    stages.infer()

    first, second = (Finding.from_json(row.finding) for row in results(stages))
    assert (len(first.images), len(second.images)) == (12, 16)
    assert analysis(stages).result_no == 2


def test_the_same_images_again_change_nothing(stages):
    images = patient(head_series())
    for _ in range(2):
        stages.receive(images)
        stages.judge()
        stages.infer()

    assert len(results(stages)) == 1


def test_another_object_in_the_study_issues_nothing_again(stages):
    images = patient(head_series())
    stages.receive(images)
    stages.judge()
    stages.infer()

    other = patient(head_series(n=3, SeriesInstanceUID="1.2.3.99", SeriesNumber=9))
    stages.receive(other)
    stages.judge()
    stages.infer()

    assert len(results(stages)) == 1
    assert analysis(stages).state == "FOUND"


def test_what_does_not_apply_ends_with_a_reason_and_is_reopened_by_what_does(stages):
    stages.receive(patient(head_series(BodyPartExamined="CHEST")))
    stages.judge()
    row = analysis(stages)
    assert row.state == "NOT_ANALYSED"
    assert row.reason

    good = patient(head_series(SeriesInstanceUID="1.2.3.2"))
    stages.receive(good)
    stages.judge()
    stages.infer()

    assert analysis(stages).state == "FOUND"


def test_an_operator_may_run_it_again(stages):
    stages.receive(patient(head_series()))
    stages.judge()
    stages.infer()

    rerun(stages)
    stages.infer()

    first, second = results(stages)
    assert second.result_no == 2
    assert first.finding["image_logits"] == second.finding["image_logits"]


def test_an_image_that_cannot_be_decoded_ends_in_a_stated_failure(stages):
    images = patient(head_series())
    images[3].PixelData = images[3].PixelData[:1000]
    stages.receive(images)
    stages.judge()
    stages.infer()

    row = analysis(stages)
    place = sorted(images, key=lambda image: float(image.ImagePositionPatient[2])).index(images[3])
    number = images[3].InstanceNumber
    assert (row.state, row.reason_code) == ("FAILED", "undecodable")
    assert row.reason == (
        f"Image {place + 1} of {len(images)} (series {images[3].SeriesNumber}, instance {number}): "
        "its pixel data cannot be decoded (ValueError in 1.2.840.10008.1.2.1)."
    )
    assert results(stages) == []
    with Session(stages.engine) as session:
        (alarm,) = session.scalars(select(EventRow).where(EventRow.is_alarm))
        assert alarm.detail["reason_code"] == "undecodable"
        assert len(session.scalars(select(InstanceRow)).all()) == len(images)


def test_what_is_not_stored_yet_is_not_taken_for_missing(stages):
    stages.receive(patient(head_series()))
    with Session(stages.engine) as session, session.begin():
        one = session.scalars(select(InstanceRow).limit(1)).one()
        one.stored_at, key = None, one.id

    stages.judge_once()
    assert analysis(stages).state == "WAITING"

    with Session(stages.engine) as session, session.begin():
        session.get_one(InstanceRow, key).stored_at = func.now()
    stages.judge()
    stages.infer()
    assert analysis(stages).is_partial is False
    assert len(analysis(stages).analysed_ids) == 16


def test_headers_that_no_scanner_writes_stop_nobody(stages):
    strange = patient(head_series(n=4, SeriesInstanceUID="1.2.3.77"))
    for sign, image in zip((1, -1, 1, -1), strange, strict=True):
        image.ImagePositionPatient = ["0", "0", f"{sign}1e308".replace("1-", "-")]
    stages.receive(strange)

    stages.judge()

    assert analysis(stages).state == "NOT_ANALYSED"
    assert analysis(stages).reason


def test_a_repeated_position_issues_nothing_again_when_something_else_arrives(stages):
    images = patient(head_series())
    twin = patient(head_series(SeriesNumber=2))[5]
    twin.SOPInstanceUID = twin.file_meta.MediaStorageSOPInstanceUID = "2.25.4711"
    stages.receive([*images, twin])
    stages.judge()
    stages.infer()
    assert len(results(stages)) == 1

    stages.receive(patient(head_series(n=2, SeriesInstanceUID="1.2.3.99", SeriesNumber=9)))
    stages.judge()
    stages.infer()

    assert len(results(stages)) == 1


def test_a_database_that_is_away_while_loading_costs_the_study_nothing(stages, database_url):
    stages.receive(patient(head_series()))
    stages.judge()
    load, calls = stages.scheduler._loader.load, []

    def cut(job, bundle):
        calls.append(job.id)
        if len(calls) == 1:
            raise OperationalError("", {}, Exception())
        return load(job, bundle)

    stages.scheduler._loader.load = cut
    stages.infer()

    assert len(calls) == 2
    assert analysis(stages).state == "FOUND"


def test_an_error_nobody_foresaw_ends_in_a_stated_failure_not_in_a_crash_loop(stages):
    stages.receive(patient(head_series()))
    stages.judge()

    def broken(job, bundle):
        raise RuntimeError("unforeseen")

    stages.scheduler._loader.load = broken
    for _ in range(MAX_ATTEMPTS):
        with Session(stages.engine) as session, session.begin():
            session.execute(update(JobRow).values(run_after=func.now()))
        stages.infer()

    row = analysis(stages)
    assert (row.state, row.reason_code) == ("FAILED", "inference_crashed")


def test_work_under_way_goes_back_when_the_worker_stops(stages):
    stages.receive(patient(head_series()))
    stages.judge()
    stages.scheduler.step()

    stages.scheduler.close()

    with Session(stages.engine) as session:
        job = session.scalars(select(JobRow)).one()
    assert (job.state, job.attempts, job.crashes) == ("TODO", 0, 0)


def test_a_bundle_of_another_kind_runs_on_the_same_code(engine, settings, tmp_path):
    stages = Stages(engine, settings, make_bundle(tmp_path / "chest", "chest"))
    rng = np.random.default_rng(3)
    picture = rng.integers(200, 3800, (96, 80)).astype(np.uint16)
    stages.receive(patient([radiograph(picture)]))
    stages.judge()
    stages.infer()
    row = analysis(stages)
    stages.close()

    assert (row.state, row.reason) == ("FOUND", "")
    (result,) = results(stages)
    assert len(Finding.from_json(result.finding).images) == 1


def test_altered_weights_are_refused_and_the_other_bundle_serves(tmp_path):
    good, bad = make_bundle(tmp_path / "head"), make_bundle(tmp_path / "chest", "chest")
    weights = bytearray((bad / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (bad / "model.safetensors").write_bytes(weights)

    served, refused = load_served([str(good), str(bad)], pick_device("cpu"))

    assert list(served) == ["head"]
    assert [(one.name, one.code) for one in refused] == [("chest", "weights_hash")]


def rerun(stages: Stages) -> None:
    with Session(stages.engine) as session, session.begin():
        operator.rerun(session, analysis(stages).id, actor="test")


def partial(stages: Stages) -> list[bool]:
    return [Finding.from_json(row.finding).is_partial for row in results(stages)]


def patient(datasets):
    """One made-up patient; the study's own UID stays."""
    for dataset in datasets:
        dataset.PatientID, dataset.PatientName = "P1", "DOE^JANE"
        text = dataset.SeriesInstanceUID + str(getattr(dataset, "ImagePositionPatient", ""))
        number = int(hashlib.sha256(text.encode()).hexdigest()[:20], 16)
        dataset.SOPInstanceUID = f"2.25.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return datasets


def test_h41_studies_wait_for_a_device_that_fails_and_none_fails_for_it(stages):
    stages.receive(patient(head_series()))
    stages.judge()
    score = stages.scheduler._device.score

    def gone(*_):
        raise DeviceFault("made up")

    stages.scheduler._device.score = gone
    for _ in range(MAX_ATTEMPTS + 1):
        with pytest.raises(DeviceFault):  # the stage ends, and is started anew
            stages.infer()
    with Session(stages.engine) as session:
        job = session.scalars(select(JobRow)).one()
    assert (job.state, job.attempts, job.crashes) == ("TODO", 0, 0)
    assert analysis(stages).state == "QUEUED"

    stages.scheduler._device.score = score
    stages.infer()
    assert analysis(stages).state == "FOUND"


def test_h41_a_device_call_that_hangs_ends_the_stage_and_costs_no_study_a_try(stages, monkeypatch):
    stages.receive(patient(head_series()))
    stages.judge()
    ended, stuck = threading.Event(), threading.Event()
    statuses = []

    def die(status):
        statuses.append(status)
        ended.set()

    scheduler = Scheduler(
        stages.engine, stages.settings, stages.fleet, Device(torch.device("cpu"), 8), "hung",
        stuck, die=die,
    )  # fmt: skip
    scheduler._longest_call_s = 0.2
    monkeypatch.setattr(devices, "logits", lambda *_: stuck.wait(60) and np.zeros((16, 3)))
    thread = threading.Thread(target=scheduler.run)
    thread.start()

    assert ended.wait(60)
    with Session(stages.engine) as session:
        job = session.scalars(select(JobRow)).one()
    assert (job.state, job.attempts, job.crashes, job.error_code) == ("TODO", 0, 0, "")
    assert statuses == [devices.HUNG]

    monkeypatch.undo()
    stages.infer()  # the stage that was started anew
    assert analysis(stages).state == "FOUND"
    stuck.set()
    thread.join(60)


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_h41_nothing_keeps_a_stage_whose_device_hangs_alive(stages, monkeypatch, trouble):
    """Not even a database that does not answer when its studies are given back."""
    monkeypatch.setattr(scheduling, "_RELEASED_WITHIN_S", 0.1)
    died, over = threading.Event(), threading.Event()

    def release():
        if trouble == "fails":
            raise TimeoutError("no connection is free")
        over.wait(60)

    stages.scheduler._die = lambda _: died.set()
    monkeypatch.setattr(stages.scheduler, "_release_all", release)
    if trouble == "fails":
        with pytest.raises(TimeoutError):
            stages.scheduler._abandon()
    else:
        thread = threading.Thread(target=stages.scheduler._abandon)
        thread.start()

    assert died.wait(60)
    over.set()


def test_h41_a_model_that_hangs_while_it_is_loaded_ends_the_stage_too(stages, monkeypatch):
    """A version that is activated while studies are scored: those are not at fault."""
    stages.receive(patient(head_series()))
    stages.judge()
    ended, stuck = threading.Event(), threading.Event()
    device, stop = Device(torch.device("cpu"), 8), threading.Event()

    def hang(*_):
        stuck.wait(60)
        raise BundleError("let go at last")

    def die(_):
        ended.set()
        stop.set()

    monkeypatch.setattr(fleets, "make_served", hang)
    loading = threading.Thread(target=Fleet(stages.engine, stages.settings, device).refresh)
    scheduler = Scheduler(
        stages.engine, stages.settings, stages.fleet, device, "beside", stop, die=die
    )
    scheduler._longest_call_s = 0.2
    scheduler._claim()
    loading.start()
    thread = threading.Thread(target=scheduler.run)
    thread.start()

    assert ended.wait(60)
    thread.join(60)
    stuck.set()
    loading.join(60)
    with Session(stages.engine) as session:
        job = session.scalars(select(JobRow)).one()
    assert job.crashes == 0
    assert job.state in ("TODO", "DONE")


def test_h41_a_model_that_hangs_at_the_start_ends_the_stage(settings, tmp_path):
    config = tmp_path / "vigil.toml"
    config.write_text(
        f'[node]\ndata_dir = "{settings.node.data_dir}"\n'
        f'database_url = "{settings.node.database_url.get_secret_value()}"\n'
        f'[inference]\nmodels = ["{make_bundle(tmp_path / "head")}"]\ndevice_timeout_s = 0.5\n'
        '[[tenants]]\nid = "north"\nae_titles = ["NORTH_AI"]\nmodels = ["head"]\n'
    )
    hanging = (
        "import pathlib, sys, time; from inference import __main__ as stage, fleet;"
        "fleet.make_served = lambda *_: time.sleep(600);"
        f"sys.exit(stage.main(pathlib.Path({str(config)!r})))"
    )

    ended = subprocess.run([sys.executable, "-c", hanging], capture_output=True, timeout=200)

    assert ended.returncode == devices.HUNG
    assert b"device_hung" in ended.stdout + ended.stderr
