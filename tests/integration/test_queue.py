"""Races and deaths round the queue, with two sessions at once against a real PostgreSQL."""

import datetime as dt
import threading

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from db import queue, studies
from db.errors import DiskFull, StaleAnalysis
from db.files import make_folder
from db.job import MAX_ATTEMPTS, JobKind, JobState
from db.refusals import Refused, forget, note, noted
from db.study import AnalysisEvent
from db.tables import AnalysisRow, JobRow, StudyRow
from tests.integration.test_studies import claim, go, make_analysis, state_of

_E = AnalysisEvent


def lapse(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        ago = func.now() - dt.timedelta(seconds=1)
        session.execute(update(JobRow).where(JobRow.state == "DOING").values(lease_until=ago))


def sweep(engine: Engine) -> int:
    with Session(engine) as session, session.begin():
        return queue.requeue_dead(session)


def due(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        session.execute(update(JobRow).values(run_after=func.now()))


def test_a_void_job_that_comes_back_never_takes_the_live_ones_place(engine):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, _E.SERIES_READY)
    claim(engine)
    lapse(engine)
    go(engine, analysis_id, _E.INPUTS_CHANGED, _E.SERIES_READY)
    live = claim(engine)

    sweep(engine)
    with Session(engine) as session, session.begin():
        queue.release(session, live)

    assert claim(engine).id == live.id


def test_deaths_of_several_jobs_at_once_count_against_none(engine):
    ids = [make_analysis(engine, f"1.{n}") for n in range(2)]
    for analysis_id in ids:
        go(engine, analysis_id, _E.SERIES_READY)

    for _ in range(queue.MAX_CRASHES + 1):
        due(engine)
        assert claim(engine)
        assert claim(engine)
        lapse(engine)
        assert sweep(engine) == 2

    assert {state_of(engine, analysis_id)[0] for analysis_id in ids} == {"QUEUED"}
    due(engine)
    assert claim(engine).is_suspect


def test_a_worker_that_is_known_to_be_dead_is_not_waited_for(engine):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, _E.SERIES_READY)
    first = claim(engine)

    with Session(engine) as session, session.begin():
        assert queue.requeue_dead(session, lambda worker: worker != first.worker) == 0
        assert queue.requeue_dead(session, lambda worker: worker == first.worker) == 1
    due(engine)

    again = claim(engine)
    assert (again.id, again.crashes, again.is_suspect) == (first.id, 1, True)


def test_whoever_lost_the_lease_cannot_finish_the_job(engine):
    go(engine, make_analysis(engine), _E.SERIES_READY)
    late = claim(engine)
    lapse(engine)
    sweep(engine)
    due(engine)
    with Session(engine) as session, session.begin():
        queue.claim(session, [JobKind.INFER], "another", lease_s=60)

    with Session(engine) as session:
        try:
            queue.finish(session, late)
            refused = False
        except StaleAnalysis:
            refused = True
    assert refused


def test_a_full_disk_is_no_try_of_the_studys(engine):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, _E.SERIES_READY)

    for _ in range(MAX_ATTEMPTS + 2):
        due(engine)
        job = claim(engine)
        with Session(engine) as session, session.begin():
            queue.fail(session, job, DiskFull("no room"))

    assert state_of(engine, analysis_id)[0] == "QUEUED"


def test_h44_a_clock_that_was_set_back_keeps_nothing_waiting(engine):
    go(engine, make_analysis(engine), _E.SERIES_READY)
    with Session(engine) as session, session.begin():
        session.execute(update(JobRow).values(run_after=func.now() + dt.timedelta(hours=1)))

    assert claim(engine) is not None


def test_a_study_without_its_job_gets_it_again(engine):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, _E.SERIES_READY)
    with Session(engine) as session, session.begin():
        session.execute(update(JobRow).values(state=JobState.DONE))
        long_ago = func.now() - dt.timedelta(hours=1)
        session.execute(update(AnalysisRow).values(updated_at=long_ago))

    with Session(engine) as session, session.begin():
        assert queue.restore_lost(session) == 1
        assert queue.restore_lost(session) == 0

    assert claim(engine).analysis_id == analysis_id


def test_two_bundles_of_one_study_that_move_together_do_not_deadlock(engine):
    with Session(engine) as session, session.begin():
        study = StudyRow(tenant="north", origin="dicom", study_instance_uid="1.7")
        session.add(study)
        session.flush()
        for bundle in ("one", "two"):
            session.add(
                AnalysisRow(study_id=study.id, tenant="north", origin="dicom", bundle=bundle)
            )
    with Session(engine) as session:
        ids = list(session.scalars(select(AnalysisRow.id)))
    errors: list[Exception] = []

    def shuttle(analysis_id: int) -> None:
        try:
            for _ in range(15):
                go(engine, analysis_id, _E.SERIES_READY, _E.INPUTS_CHANGED)
        except Exception as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=shuttle, args=(one,)) for one in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    with Session(engine) as session:
        assert studies.load(session, ids[0]).row_version == 30


def test_a_torn_note_of_a_refusal_does_not_stop_the_next(tmp_path):
    make_folder(tmp_path)
    refused = Refused(code="called_ae", address="10.0.0.1")
    note(tmp_path, refused)
    with (tmp_path / "refusals.jsonl").open("ab") as file:
        file.write(b'{"code": "call')
    note(tmp_path, refused)

    found, n_lines = noted(tmp_path)

    assert (found, n_lines) == ([refused, refused], 3)
    forget(tmp_path, n_lines)
    assert noted(tmp_path) == ([], 0)
