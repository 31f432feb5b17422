"""Clocks that are set, DST nights and scanners a year off: order and leases hold (H44).

Leases and waits rest on the database's clock alone. That it jumped is here that every moment it
has written moves the other way: PostgreSQL can tell no difference.
"""

import datetime as dt
import time

import pytest
from sqlalchemy import DateTime, create_engine, func, select, update
from sqlalchemy.orm import Session

from db import claims, notices, queue
from db.job import JobKind
from db.meta import Provenance
from db.sandbox import Sandbox
from db.spool import Spool, scan
from db.study import AnalysisEvent
from db.tables import AnalysisRow, Base, DeliveryRow, DestinationRow, JobRow, ResultRow, StudyRow
from dicom_sr.deliver import Deliverer
from dicom_sr.times import minute, parse_time
from tests.builders import changed
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series
from tests.delivery import destination
from tests.integration.test_inference_stage import patient
from tests.integration.test_studies import (
    built,
    claim,
    claim_delivery,
    go,
    make_analysis,
)
from tests.peers import Pacs
from tests.stage import Stages

HOUR = dt.timedelta(hours=1)
JUMPS = pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["ahead", "back"])


@pytest.fixture
def jump_by(database_url):
    """Set the clock of the database, as its owner."""
    owner = create_engine(database_url)

    def set_clock(by: dt.timedelta) -> None:
        with owner.begin() as connection:
            for table in Base.metadata.sorted_tables:
                moments = [one for one in table.columns if isinstance(one.type, DateTime)]
                if moments:
                    connection.execute(update(table).values({one: one - by for one in moments}))

    yield set_clock
    owner.dispose()


@pytest.fixture
def pacs():
    with Pacs() as peer:
        yield peer


@pytest.fixture
def stages(engine, settings, tmp_path, pacs):
    bundle = make_bundle(tmp_path / "head")
    stages = Stages(engine, settings, bundle, destinations=(destination(pacs.port),))
    yield stages
    stages.close()


def analysis(stages: Stages) -> AnalysisRow:
    with Session(stages.engine) as session:
        return session.scalars(select(AnalysisRow)).one()


def n_results(stages: Stages) -> int:
    with Session(stages.engine) as session:
        return session.scalar(select(func.count()).select_from(ResultRow))


def sweeps(stages: Stages) -> int:
    """How many analyses readiness judges before it rests; a handful at most."""
    for n in range(6):
        if not stages.readiness.sweep_once():
            return n
    raise AssertionError("readiness judges the same analysis for ever")


@JUMPS
def test_h44_a_clock_that_jumps_between_any_two_steps_delays_and_doubles_nothing(
    stages, jump_by, jump, pacs
):
    with Sandbox(size=1) as sandbox:
        deliverer = Deliverer(
            stages.engine, stages.settings, sandbox, worker="test", version="0.1.0"
        )
        stages.receive(patient(head_series()))
        jump_by(jump)
        assert sweeps(stages) >= 1
        assert analysis(stages).state == "QUEUED"
        jump_by(jump)
        stages.infer()
        assert analysis(stages).state == "FOUND"
        jump_by(jump)
        assert deliverer._builder.build_once()
        assert analysis(stages).state == "BUILT"
        jump_by(jump)
        deliverer.run_once()
        assert sweeps(stages) == 0

    assert (analysis(stages).state, analysis(stages).result_no) == ("DELIVERED", 1)
    assert len(pacs.received) == len(pacs.instances) > 0


@JUMPS
def test_h44_a_clock_that_jumps_while_a_study_is_analysed_leaves_one_result(stages, jump_by, jump):
    stages.receive(patient(head_series()))
    stages.judge()
    while not stages.scheduler.is_busy:
        stages.scheduler.step()

    jump_by(jump)
    stages.readiness.requeue_dead()  # takes the lease for lapsed, as nobody has renewed it yet
    with Session(stages.engine) as session, session.begin():
        session.execute(update(JobRow).values(run_after=func.now()))
    stages.infer()

    assert (analysis(stages).state, n_results(stages)) == ("FOUND", 1)


def test_h44_a_lease_that_was_renewed_since_the_jump_is_kept(engine, jump_by):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, AnalysisEvent.SERIES_READY)
    job = claim(engine)

    for jump in (HOUR, -HOUR):
        jump_by(jump)
        with Session(engine) as session, session.begin():
            assert queue.renew(session, [job.id], job.worker, lease_s=60) == 1
            assert queue.requeue_dead(session) == 0

    with Session(engine) as session, session.begin():
        queue.finish(session, job)


def test_h44_a_clock_set_back_makes_no_series_with_a_hole_judged_for_ever(stages, jump_by):
    images = patient(head_series())
    del images[7]
    stages.receive(images)
    stages.judge()

    jump_by(-HOUR)
    sweeps(stages)  # comes to an end
    assert analysis(stages).state == "WAITING"
    jump_by(dt.timedelta(seconds=601))  # the tenant's ten minutes, from then on
    sweeps(stages)

    assert (analysis(stages).state, analysis(stages).is_partial) == ("QUEUED", True)


def test_h44_a_clock_set_back_delays_no_delivery(engine, jump_by):
    built(engine, destination(1))

    jump_by(-HOUR)

    assert claim_delivery(engine) is not None


def test_h44_a_destinations_wait_from_before_the_clock_was_set_back_is_over(engine, jump_by):
    built(engine, destination(1))
    with Session(engine) as session, session.begin():
        soon = func.now() + dt.timedelta(seconds=600)
        session.execute(update(DestinationRow).values(retry_at=soon))
    assert claim_delivery(engine) is None

    jump_by(-HOUR)

    assert claim_delivery(engine) is not None


def test_h44_a_dead_senders_lease_ends_though_the_clock_was_set_back(engine, jump_by):
    built(engine, destination(1))
    first = claim_delivery(engine)

    jump_by(-HOUR)
    assert claim_delivery(engine) is None  # taken from the dead, and due in a moment
    with Session(engine) as session, session.begin():
        session.execute(update(DeliveryRow).values(run_after=func.now()))

    again = claim_delivery(engine)
    assert again is not None
    assert again.id == first.id


def test_h44_a_living_sender_keeps_its_lease_once_it_is_renewed(engine, jump_by):
    built(engine, destination(1))
    delivery = claim_delivery(engine)

    jump_by(-HOUR)
    with Session(engine) as session, session.begin():
        assert claims.renew(session, delivery)

    assert claim_delivery(engine) is None


def test_h44_a_page_that_there_is_no_result_waits_no_longer_for_a_clock_set_back(engine, jump_by):
    go(engine, make_analysis(engine), AnalysisEvent.NOT_ELIGIBLE)
    job = claim(engine, JobKind.NOTICE)

    jump_by(-HOUR)
    assert rest_of_wait(engine, job) <= dt.timedelta(seconds=600)
    jump_by(dt.timedelta(seconds=601))

    assert rest_of_wait(engine, job) <= dt.timedelta(0)


def rest_of_wait(engine, job) -> dt.timedelta:
    with Session(engine) as session, session.begin():
        return notices.rest_of_wait(session, job, 600.0)


def test_h44_what_a_destination_refused_still_waits_its_hours(engine, jump_by):
    built(engine, destination(1))
    with Session(engine) as session, session.begin():
        later = func.now() + claims.REFUSAL_WAIT
        session.execute(update(DeliveryRow).values(refusals=2, run_after=later))

    assert claim_delivery(engine) is None
    jump_by(dt.timedelta(hours=4))
    assert claim_delivery(engine) is None


def test_h44_what_came_first_is_taken_in_first_though_the_clock_was_set_back(tmp_path, monkeypatch):
    source = Provenance(tenant="north", sop_instance_uid="1.2.3")
    at = time.time_ns()
    with Spool(tmp_path, "scp-0") as box:
        ids = [box.keep(source, b"1")]
        monkeypatch.setattr(time, "time_ns", lambda: at - 3_600 * 10**9)
        ids += [box.keep(source, b"2"), box.keep(source, b"3")]
    with Spool(tmp_path, "scp-0") as box:  # after a restart, too
        ids.append(box.keep(source, b"4"))

        assert [item.id for item in scan(box.folder)] == ids


@pytest.mark.parametrize("date", ["20250301", "20270301", "20991231", "19700101"])
def test_h44_a_scanner_whose_clock_is_years_off_changes_neither_outcome_nor_order(stages, date):
    first = patient(changed(head_series(), StudyDate=date, StudyTime="235959"))
    second = patient(changed(head_series(), StudyInstanceUID="1.2.4", SeriesInstanceUID="1.2.4.1"))
    stages.receive(first)
    stages.receive(second)
    stages.judge()

    order = []
    with Session(stages.engine) as session, session.begin():
        while job := queue.claim(session, [JobKind.INFER], "test"):
            order.append(session.get_one(StudyRow, job.study_id).study_instance_uid)

    assert order == [first[0].StudyInstanceUID, "1.2.4"]


def test_h44_the_hour_that_a_dst_night_has_twice_is_told_apart(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        said = [
            minute(parse_time(at).astimezone())
            for at in ("2026-10-25T00:30:00+00:00", "2026-10-25T01:30:00+00:00")
        ]
    finally:
        monkeypatch.undo()
        time.tzset()

    assert said == ["2026-10-25 02:30 UTC+02:00", "2026-10-25 02:30 UTC+01:00"]
