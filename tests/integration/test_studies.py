"""Moves, jobs and the outbox against a real PostgreSQL."""

import datetime as dt
import threading
import uuid
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from config.tenants import Destination, Tenant
from db import aside, claims, dispatch, operator, outbox, queue, reach, studies
from db.errors import IllegalMove, PermanentError, StaleAnalysis, TransientError
from db.identity import Trouble
from db.job import MAX_ATTEMPTS, JobKind, JobState
from db.meta import Provenance
from db.outbox import DeliveryState
from db.shares import Shares
from db.spool import Spooled
from db.study import AnalysisEvent, AnalysisState
from db.tables import (
    AnalysisRow,
    AuditRow,
    DeliveryRow,
    DestinationRow,
    EventRow,
    JobRow,
    QuarantineRow,
    RequestRow,
    ResultRow,
    StudyRow,
)

TENANT = Tenant(id="north", ae_titles=("NORTH_AI",), models=("one", "two"))
PACS = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=104)
ARCHIVE = Destination(name="archive", ae_title="ARC", host="127.0.0.1", port=105)
_E = AnalysisEvent


def make_analysis(engine: Engine, uid: str = "1.2.3", lane: int = 1, tenant: str = "north") -> int:
    with Session(engine) as session, session.begin():
        study = StudyRow(tenant=tenant, origin="dicom", study_instance_uid=uid, lane=lane)
        session.add(study)
        session.flush()
        studies.ensure_analyses(session, study, TENANT.model_copy(update={"models": ("one",)}))
        return session.scalars(select(AnalysisRow.id).where(AnalysisRow.study_id == study.id)).one()


def go(engine: Engine, analysis_id: int, *events: AnalysisEvent) -> None:
    for event in events:
        with Session(engine) as session, session.begin():
            studies.move(session, studies.load(session, analysis_id), event)


def claim(engine: Engine, kind: JobKind = JobKind.INFER) -> queue.ClaimedJob | None:
    with Session(engine) as session, session.begin():
        return queue.claim(session, [kind], "worker", lease_s=60)


def state_of(engine: Engine, analysis_id: int) -> tuple[str, str]:
    with Session(engine) as session:
        row = session.get_one(AnalysisRow, analysis_id)
        return row.state, session.get_one(StudyRow, row.study_id).state


def built(engine: Engine, *destinations: Destination, uid: str = "1.2.3", lane: int = 1) -> int:
    analysis_id = make_analysis(engine, uid, lane)
    go(engine, analysis_id, _E.SERIES_READY, _E.FINDINGS_STORED)
    owe(engine, analysis_id, 1, *destinations)
    go(engine, analysis_id, _E.OBJECTS_BUILT)
    return analysis_id


def owe(engine: Engine, analysis_id: int, result_no: int, *destinations: Destination) -> None:
    with Session(engine) as session, session.begin():
        analysis = studies.load(session, analysis_id)
        session.execute(
            update(AnalysisRow).where(AnalysisRow.id == analysis_id).values(result_no=result_no)
        )
        result = ResultRow(
            id=uuid.uuid4(), analysis_id=analysis_id, study_id=analysis.study_id, tenant="north",
            origin="dicom", bundle="one", result_no=result_no, finding={}, is_positive=True,
            urgency="STAT",
        )  # fmt: skip
        session.add(result)
        session.flush()
        outbox.enqueue(session, analysis, result.id, [(d, "") for d in destinations])


def claim_delivery(engine: Engine, name: str = "pacs") -> claims.ClaimedDelivery | None:
    with Session(engine) as session, session.begin():
        return claims.claim_due(session, "north", name, "worker")


def test_a_ready_series_queues_one_inference(engine):
    analysis_id = make_analysis(engine)

    go(engine, analysis_id, _E.SERIES_READY)

    assert state_of(engine, analysis_id) == ("QUEUED", "IN_PROGRESS")
    job = claim(engine)
    assert job is not None
    assert job.analysis_id == analysis_id
    assert claim(engine) is None


def test_a_move_is_refused_to_whoever_read_an_older_version(engine):
    analysis_id = make_analysis(engine)
    with Session(engine) as session:
        old = studies.load(session, analysis_id)
    go(engine, analysis_id, _E.SERIES_READY)

    with Session(engine) as session, pytest.raises(StaleAnalysis):
        studies.move(session, old, _E.SERIES_READY)


def test_an_illegal_move_changes_nothing(engine):
    analysis_id = make_analysis(engine)

    with Session(engine) as session, pytest.raises(IllegalMove):
        studies.move(session, studies.load(session, analysis_id), _E.OBJECTS_BUILT)

    assert state_of(engine, analysis_id) == ("WAITING", "RECEIVING")


def test_an_old_inference_never_finishes_a_reopened_analysis(engine):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, _E.SERIES_READY)
    job = claim(engine)
    go(engine, analysis_id, _E.INPUTS_CHANGED, _E.SERIES_READY)

    with Session(engine) as session, pytest.raises(StaleAnalysis):
        queue.analysis_of(session, job)
    with Session(engine) as session, session.begin():
        queue.fail(session, job, StaleAnalysis("reopened"))

    assert state_of(engine, analysis_id)[0] == "QUEUED"
    assert claim(engine).id != job.id


def test_stat_goes_before_an_older_routine_job(engine):
    routine = make_analysis(engine, "1.1", lane=2)
    stat = make_analysis(engine, "1.2", lane=0)
    go(engine, routine, _E.SERIES_READY)
    go(engine, stat, _E.SERIES_READY)

    assert [claim(engine).analysis_id, claim(engine).analysis_id] == [stat, routine]


def test_a_tenant_that_has_had_its_turn_lets_another_go_first(engine):
    shares = Shares([TENANT])
    for uid in ("1.1", "1.2", "1.3"):
        go(engine, make_analysis(engine, uid), _E.SERIES_READY)
    other = make_analysis(engine, "1.4", tenant="south")
    go(engine, other, _E.SERIES_READY)

    ids = []
    for _ in range(2):
        with Session(engine) as session, session.begin():
            ids.append(queue.claim(session, [JobKind.INFER], "w", shares=shares).analysis_id)
    assert ids[1] == other


def test_h42_a_dead_workers_job_comes_back_and_is_given_up_after_three_deaths(engine):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, _E.SERIES_READY)

    for _ in range(queue.MAX_CRASHES):
        with Session(engine) as session, session.begin():
            session.execute(update(JobRow).values(run_after=func.now()))
        assert claim(engine) is not None
        with Session(engine) as session, session.begin():
            session.execute(update(JobRow).values(lease_until=func.now() - dt.timedelta(seconds=1)))
        with Session(engine) as session, session.begin():
            assert queue.requeue_dead(session) == 1

    assert state_of(engine, analysis_id) == ("FAILED", "DONE_WITH_GAPS")


def test_a_transient_failure_waits_and_a_permanent_one_ends(engine):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, _E.SERIES_READY)
    job = claim(engine)
    with Session(engine) as session, session.begin():
        queue.fail(session, job, TransientError("later"))
    assert claim(engine) is None  # backs off
    assert state_of(engine, analysis_id)[0] == "QUEUED"

    with Session(engine) as session, session.begin():
        session.execute(update(JobRow).values(run_after=func.now()))
    again = claim(engine)
    assert again.attempts == 1
    with Session(engine) as session, session.begin():
        queue.fail(session, again, PermanentError("never"))

    with Session(engine) as session:
        row = session.get_one(AnalysisRow, analysis_id)
        assert (row.state, row.reason) == ("FAILED", "never")
        alarm = session.scalars(select(EventRow).where(EventRow.is_alarm)).one()
        assert alarm.kind == "gave_up"


def test_the_last_transient_failure_gives_up(engine):
    analysis_id = make_analysis(engine)
    go(engine, analysis_id, _E.SERIES_READY)
    with Session(engine) as session, session.begin():
        session.execute(update(JobRow).values(attempts=MAX_ATTEMPTS - 1))
    job = claim(engine)

    with Session(engine) as session, session.begin():
        queue.fail(session, job, TransientError("again"))

    assert state_of(engine, analysis_id)[0] == "FAILED"


def test_nothing_of_a_held_study_is_built_or_sent(engine):
    analysis_id = built(engine, PACS)
    other = make_analysis(engine, "1.9")
    go(engine, other, _E.SERIES_READY, _E.FINDINGS_STORED)
    with Session(engine) as session, session.begin():
        session.execute(update(StudyRow).values(is_held=True))

    assert claim(engine, JobKind.BUILD) is None
    assert claim_delivery(engine) is None

    with Session(engine) as session, session.begin():
        session.execute(update(StudyRow).values(is_held=False))
    assert claim(engine, JobKind.BUILD).analysis_id == other
    assert claim_delivery(engine).analysis_id == analysis_id


def test_a_result_is_delivered_once_every_destination_has_it(engine):
    analysis_id = built(engine, PACS, ARCHIVE)

    for name in ("pacs", "archive"):
        assert state_of(engine, analysis_id)[0] == "BUILT"
        delivery = claim_delivery(engine, name)
        with Session(engine) as session, session.begin():
            dispatch.accept(session, delivery, {"1.2": "0x0000"})

    assert state_of(engine, analysis_id) == ("DELIVERED", "DONE")
    assert claim_delivery(engine) is None


def test_no_destination_means_delivered_when_built(engine):
    analysis_id = built(engine)

    with Session(engine) as session, session.begin():
        outbox.settle(session, analysis_id)

    assert state_of(engine, analysis_id)[0] == "DELIVERED"


def test_a_destination_backs_off_as_a_whole_and_its_first_success_releases_all(engine):
    built(engine, PACS, ARCHIVE, uid="1.1")
    built(engine, PACS, uid="1.2", lane=0)
    first = claim_delivery(engine)
    with Session(engine) as session, session.begin():
        dispatch.postpone(session, first, {}, error_code="no_connection")

    assert claim_delivery(engine) is None
    assert claim_delivery(engine, "archive") is not None  # another destination is not delayed

    with Session(engine) as session, session.begin():
        reach.answered(session, "north", "pacs")
    assert claim_delivery(engine).analysis_id == first.analysis_id  # urgent first
    assert claim_delivery(engine) is not None


def test_a_delivery_that_expires_ends_in_part_with_an_alarm(engine):
    analysis_id = built(engine, PACS)
    with Session(engine) as session, session.begin():
        session.execute(update(DeliveryRow).values(expires_at=func.now()))
    delivery = claim_delivery(engine)

    with Session(engine) as session, session.begin():
        dispatch.postpone(session, delivery, {}, error_code="no_connection")

    assert state_of(engine, analysis_id) == ("DELIVERED_IN_PART", "DONE_WITH_GAPS")


def test_five_refusals_end_in_part(engine):
    analysis_id = built(engine, PACS)

    for n in range(dispatch.MAX_REFUSALS):
        assert state_of(engine, analysis_id)[0] == "BUILT", n
        with Session(engine) as session, session.begin():
            session.execute(update(DeliveryRow).values(run_after=func.now()))
        delivery = claim_delivery(engine)
        with Session(engine) as session, session.begin():
            dispatch.refuse(session, delivery, {"1.2": "0xC000"}, error_code="refused")

    assert state_of(engine, analysis_id)[0] == "DELIVERED_IN_PART"


def test_a_newer_result_drops_an_unsent_one_and_waits_for_a_part_sent_one(engine):
    analysis_id = built(engine, PACS, ARCHIVE)
    part = claim_delivery(engine, "archive")
    with Session(engine) as session, session.begin():
        dispatch.postpone(session, part, {"1.2": "0x0000"}, error_code="aborted")
        reach.answered(session, "north", "archive")
        session.execute(update(DeliveryRow).values(run_after=func.now()))

    owe(engine, analysis_id, 2, PACS, ARCHIVE)

    with Session(engine) as session:
        rows = session.scalars(select(DeliveryRow).order_by(DeliveryRow.id)).all()
        by_name = {(row.destination, row.result_id != part.result_id): row.state for row in rows}
    assert by_name["pacs", False] == DeliveryState.DROPPED
    assert claim_delivery(engine, "archive").result_id == part.result_id
    assert claim_delivery(engine, "archive") is None
    assert claim_delivery(engine, "pacs").result_id != part.result_id


def test_resend_owes_the_same_objects_again(engine):
    analysis_id = built(engine, PACS)
    delivery = claim_delivery(engine)
    with Session(engine) as session, session.begin():
        dispatch.accept(session, delivery, {"1.2": "0x0000"})

    with Session(engine) as session, session.begin():
        operator.resend(session, analysis_id, actor="test")

    again = claim_delivery(engine)
    assert (again.id, dict(again.statuses)) == (delivery.id, {"1.2": "again 0x0000"})


def test_rerun_queues_a_finished_analysis(engine):
    analysis_id = built(engine)
    with Session(engine) as session, session.begin():
        outbox.settle(session, analysis_id)

    with Session(engine) as session, session.begin():
        operator.rerun(session, analysis_id, actor="test")

    assert state_of(engine, analysis_id)[0] == AnalysisState.QUEUED
    assert claim(engine) is not None


@pytest.mark.parametrize("action", ["rerun", "resend"])
def test_trail_and_timeline_name_who_asked(engine, action):
    analysis_id = built(engine, PACS)
    with Session(engine) as session, session.begin():
        dispatch.accept(session, claim_delivery(engine, "pacs"), {"1.2": "0x0000"})

    with Session(engine) as session, session.begin():
        getattr(operator, action)(session, analysis_id, actor="dr.who")

    with Session(engine) as session:
        trail = session.scalars(select(AuditRow).where(AuditRow.action == action)).one()
        newest = session.scalars(select(EventRow).order_by(EventRow.id.desc()).limit(1)).one()
    assert (trail.actor, trail.tenant, trail.target) == (
        "dr.who",
        "north",
        f"analysis {analysis_id}",
    )
    assert newest.detail["by"] == "dr.who"


def test_at_most_one_job_of_a_kind_waits_for_an_analysis(engine):
    analysis_id = make_analysis(engine)

    for _ in range(3):
        go(engine, analysis_id, _E.SERIES_READY, _E.INPUTS_CHANGED)
    go(engine, analysis_id, _E.SERIES_READY)

    with Session(engine) as session:
        waiting = session.scalars(select(JobRow).where(JobRow.state == JobState.TODO)).all()
    assert len(waiting) == 1


def test_a_request_for_another_tenants_analysis_is_refused(engine):
    analysis_id = built(engine)
    with Session(engine) as session, session.begin():
        outbox.settle(session, analysis_id)
        ask = {"origin": "dicom", "analysis_id": analysis_id, "action": "rerun", "user_name": "u"}
        session.add(RequestRow(tenant="south", **ask))
        session.add(RequestRow(tenant="north", **ask))

    with Session(engine) as session, session.begin():
        assert operator.carry_out_requests(session) == 2

    with Session(engine) as session:
        outcomes = dict(session.execute(select(RequestRow.tenant, RequestRow.outcome)).all())
    assert outcomes == {"south": "not_yours", "north": "done"}


def test_two_destinations_that_finish_together_leave_it_delivered(engine):
    analysis_id = built(engine, PACS, ARCHIVE)
    one, other = claim_delivery(engine, "pacs"), claim_delivery(engine, "archive")

    def accept_other() -> None:
        with Session(engine) as session, session.begin():
            dispatch.accept(session, other, {"1.2": "0x0000"})

    thread = threading.Thread(target=accept_other)
    with Session(engine) as session, session.begin():
        dispatch.accept(session, one, {"1.2": "0x0000"})
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()  # until this one is committed
    thread.join(10)

    assert state_of(engine, analysis_id) == ("DELIVERED", "DONE")


def test_an_object_that_upsets_a_destination_holds_up_no_other(engine):
    built(engine, PACS, uid="1.1", lane=0)
    other = built(engine, PACS, uid="1.2", lane=1)
    with Session(engine) as session, session.begin():
        dispatch.postpone(session, claim_delivery(engine), {}, error_code="0xA700")

    with Session(engine) as session, session.begin():
        destination = session.scalars(select(DestinationRow)).one()
        wait = destination.retry_at - session.scalar(select(func.now()))
        assert (destination.failures, wait <= dt.timedelta(seconds=2)) == (0, True)
        destination.retry_at = func.now()

    assert claim_delivery(engine).analysis_id == other
    assert claim_delivery(engine) is None


def test_nothing_is_sent_again_that_was_never_sent(engine):
    analysis_id = built(engine)
    with Session(engine) as session, session.begin():
        outbox.settle(session, analysis_id)

    with Session(engine) as session, pytest.raises(IllegalMove):
        operator.resend(session, analysis_id, actor="test")

    assert state_of(engine, analysis_id)[0] == "DELIVERED"


def test_a_delivery_without_a_sender_expires_and_one_under_way_does_not(engine):
    analysis_id = built(engine, PACS, ARCHIVE)
    held = claim_delivery(engine, "archive")
    assert not expire(engine)  # not yet
    with Session(engine) as session, session.begin():
        session.execute(update(DeliveryRow).values(expires_at=func.now()))

    assert (expire(engine), expire(engine)) == (True, False)
    assert state_of(engine, analysis_id)[0] == "BUILT"
    with Session(engine) as session, session.begin():
        dispatch.accept(session, held, {"1.2": "0x0000"})

    assert state_of(engine, analysis_id) == ("DELIVERED_IN_PART", "DONE_WITH_GAPS")
    with Session(engine) as session:
        alarm = session.scalars(select(EventRow).where(EventRow.is_alarm)).one()
        assert (alarm.kind, alarm.detail["destination"]) == ("delivery_expired", "pacs")


def expire(engine: Engine) -> bool:
    with Session(engine) as session, session.begin():
        return dispatch.expire_next(session, "sweep")


@pytest.mark.parametrize("is_taken", [True, False])
def test_whoever_lost_the_lease_writes_nothing(engine, is_taken):
    analysis_id = built(engine, PACS)
    old = claim_delivery(engine)
    with Session(engine) as session, session.begin():
        session.execute(update(DeliveryRow).values(lease_until=func.now()))
    with Session(engine) as session, session.begin():
        assert claims.claim_due(session, "north", "pacs", "another") is None
        session.execute(update(DeliveryRow).values(run_after=func.now()))
        new = claims.claim_due(session, "north", "pacs", "another")
        if not is_taken:
            dispatch.release(session, new)

    for outcome in (dispatch.accept, dispatch.postpone, dispatch.refuse):
        code = {} if outcome is dispatch.accept else {"error_code": "no_answer"}
        with pytest.raises(StaleAnalysis), Session(engine) as session, session.begin():
            outcome(session, old, {"1.2": "0x0000"}, **code)

    assert state_of(engine, analysis_id)[0] == "BUILT"
    with Session(engine) as session:
        row = session.scalars(select(DeliveryRow)).one()
        assert (row.state, row.statuses) == ("SENDING" if is_taken else "WAITING", {})


def conflict(engine: Engine, path: Path) -> list[str]:
    """A second patient comes into the study; returns what the alarm names."""
    path.touch()
    item = Spooled(uuid.uuid4(), "north", path)
    trouble = Trouble("second_patient", "r", is_conflict=True)
    with Session(engine) as session, session.begin():
        study = session.scalars(select(StudyRow)).one()
        aside.quarantine(session, item, Provenance(tenant="north"), trouble, study=study)
    with Session(engine) as session:
        (alarm,) = session.scalars(select(EventRow).where(EventRow.kind == "instance_quarantined"))
        return [name.partition(":")[0] for name in alarm.detail["delivered_to"]]


@pytest.mark.parametrize(
    ("answers", "is_named"),
    [
        ({}, False),
        ({"1.1": "0xA700", "1.2": "context_refused"}, False),
        ({"1.1": "0x0000", "1.2": "0xA900"}, True),
        ({"1.1": "0xB007", "1.2": "no_answer"}, True),
        ({"1.1": "0x0111"}, True),
    ],
)
@pytest.mark.parametrize("outcome", [dispatch.postpone, dispatch.refuse])
def test_the_alarm_of_a_conflict_names_whoever_has_a_part(
    engine, tmp_path, outcome, answers, is_named
):
    built(engine, PACS, ARCHIVE)
    with Session(engine) as session, session.begin():
        delivery = claims.claim_due(session, "north", "pacs", "w")
        outcome(session, delivery, answers, error_code="0xA900")

    assert conflict(engine, tmp_path / "file") == ["pacs"] * is_named


@pytest.mark.parametrize("is_sent_again", [True, False])
def test_the_alarm_of_a_conflict_names_whoever_has_everything(engine, tmp_path, is_sent_again):
    analysis_id = built(engine, ARCHIVE)
    with Session(engine) as session, session.begin():
        delivery = claims.claim_due(session, "north", "archive", "w")
        dispatch.accept(session, delivery, {"1.1": "0x0000"})
        if is_sent_again:
            operator.resend(session, analysis_id, actor="test")

    assert conflict(engine, tmp_path / "file") == ["archive"]


def test_a_held_study_goes_on_once_the_last_conflict_is_discarded(engine):
    built(engine, PACS)
    with Session(engine) as session, session.begin():
        study = session.scalars(select(StudyRow)).one()
        study.is_held = True
        both = [uuid.uuid4(), uuid.uuid4()]
        for key in both:
            session.add(
                QuarantineRow(
                    id=key,
                    tenant="north",
                    origin="dicom",
                    study_id=study.id,
                    code="conflict",
                    reason="r",
                    is_conflict=True,
                )
            )

    for key, is_held in zip(both, (True, False), strict=True):
        with Session(engine) as session, session.begin():
            operator.discard(session, key, actor="test")
        with Session(engine) as session:
            study = session.scalars(select(StudyRow)).one()
            assert (study.is_held, study.state == "HELD") == (is_held, is_held)

    assert claim_delivery(engine) is not None
    with Session(engine) as session, pytest.raises(operator.NotOpen):
        operator.discard(session, both[0], actor="test")
