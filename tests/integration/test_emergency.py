"""One tenant uploads ten thousand studies while another sends one emergency (H45)."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session

from config.tenants import Sender, Tenant
from db import intake, queue
from db.job import JobKind, Lane
from db.meta import Provenance
from db.shares import Shares
from db.tables import AnalysisRow, JobRow, StudyRow
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series
from tests.integration.test_inference_stage import patient
from tests.stage import Stages, encoded

N = 10_000
NORTH = Tenant(id="north", ae_titles=("NORTH_AI",), lane="routine")
SOUTH = Tenant(id="south", ae_titles=("SOUTH_AI",))

# As readiness leaves them: rows alone, for what is tested here reads no image of theirs.
_BACKLOG = """
    WITH made AS (
        INSERT INTO studies (tenant, origin, study_instance_uid, lane)
        SELECT :tenant, 'dicom', '1.9.' || :tag || '.' || n, :lane FROM generate_series(1, :n) n
        RETURNING id
    ), seen AS (
        INSERT INTO analyses (study_id, tenant, origin, bundle, state, judge_at)
        SELECT id, :tenant, 'dicom', :bundle, CASE WHEN :is_due THEN 'WAITING' ELSE 'QUEUED' END,
            CASE WHEN :is_due THEN now() - interval '1 hour' END FROM made
        RETURNING id
    )
    INSERT INTO jobs (analysis_id, tenant, origin, kind, lane, analysis_version, run_after)
    SELECT id, :tenant, 'dicom', 'INFER', :lane, 0, now() - interval '10 seconds' FROM seen
    WHERE NOT :is_due
"""


def backlog(
    engine: Engine,
    n: int = N,
    *,
    tenant: str = "north",
    lane: Lane = Lane.ROUTINE,
    bundle: str = "head",
    is_due: bool = False,
) -> None:
    values = {"tenant": tenant, "n": n, "lane": int(lane), "bundle": bundle, "is_due": is_due}
    with Session(engine) as session, session.begin():
        tag = session.scalar(select(func.count()).select_from(StudyRow))
        session.execute(text(_BACKLOG), {**values, "tag": str(tag)})


def claimed(engine: Engine, n: int, shares: Shares) -> list[tuple[str, int]]:
    """Tenant and lane of the next claims."""
    found = []
    for _ in range(n):
        with Session(engine) as session, session.begin():
            job = queue.claim(session, [JobKind.INFER], "worker", shares=shares)
        assert job is not None
        found.append((job.tenant, job.lane))
    return found


@pytest.fixture
def stages(engine: Engine, settings, tmp_path: Path) -> Iterator[Stages]:
    south = Tenant(
        id="south", ae_titles=("SOUTH_AI",), models=("head",),
        senders=(Sender(ae_title="CT1", lane="stat"),),
    )  # fmt: skip
    stages = Stages(
        engine, settings, make_bundle(tmp_path / "head"), neighbours=(south,), lane="routine"
    )
    yield stages
    stages.close()


@pytest.mark.parametrize("lane", [Lane.STAT, Lane.URGENT])
def test_h45_an_emergency_is_claimed_next_out_of_ten_thousand(engine, lane):
    backlog(engine)
    shares = Shares([NORTH, SOUTH])
    claimed(engine, 2, shares)

    backlog(engine, 1, tenant="south", lane=lane)

    assert claimed(engine, 1, shares) == [("south", lane)]


def test_h45_a_study_as_urgent_as_the_ten_thousand_waits_for_one_of_them(engine):
    backlog(engine, lane=Lane.URGENT)
    shares = Shares([NORTH, SOUTH])
    claimed(engine, 5, shares)

    backlog(engine, 2, tenant="south", lane=Lane.URGENT)

    assert ("south", Lane.URGENT) in claimed(engine, 2, shares)


def test_h45_a_third_tenant_is_not_forgotten_behind_two_with_a_backlog(engine):
    for tenant in ("north", "south"):
        backlog(engine, 30, tenant=tenant)
    backlog(engine, 3, tenant="east")

    tenants = Counter(tenant for tenant, _ in claimed(engine, 9, Shares([])))

    assert tenants == {"north": 3, "south": 3, "east": 3}


def test_h45_weights_are_kept(engine):
    for tenant in ("north", "south"):
        backlog(engine, 30, tenant=tenant)
    heavy = SOUTH.model_copy(update={"weight": 3})

    tenants = Counter(tenant for tenant, _ in claimed(engine, 20, Shares([NORTH, heavy])))

    assert tenants == {"north": 5, "south": 15}


def test_h45_routine_that_has_aged_moves_and_holds_up_nothing_fresh(engine):
    backlog(engine, 40)
    with Session(engine) as session, session.begin():
        session.execute(update(JobRow).values(run_after=func.now() - text("interval '16 minutes'")))
    backlog(engine, 40, lane=Lane.URGENT)

    lanes = Counter(lane for _, lane in claimed(engine, 20, Shares([NORTH])))

    assert lanes == {Lane.URGENT: 16, Lane.ROUTINE: 4}


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(st.sampled_from(["north", "south", "east"]), st.sampled_from(Lane)),
        min_size=1,
        max_size=12,
    )
)
def test_h45_whatever_waits_is_claimed_once_and_the_urgent_first(engine, arrivals):
    for tenant, lane in arrivals:
        backlog(engine, 1, tenant=tenant, lane=lane)

    found = claimed(engine, len(arrivals), Shares([NORTH, SOUTH]))

    assert sorted(found) == sorted((tenant, int(lane)) for tenant, lane in arrivals)
    assert [lane for _, lane in found] == sorted(int(lane) for _, lane in arrivals)
    with Session(engine) as session, session.begin():
        session.execute(text("DELETE FROM studies"))


def test_h45_readiness_judges_the_emergency_before_ten_thousand_that_are_due(engine, stages):
    backlog(engine, is_due=True)
    stages.receive(patient(head_series()), tenant="south")
    with Session(engine) as session, session.begin():
        emergency = select(AnalysisRow.id).where(AnalysisRow.tenant == "south")
        session.execute(
            update(AnalysisRow)
            .where(AnalysisRow.id.in_(emergency.scalar_subquery()))
            .values(judge_at=func.now())
        )

    assert stages.readiness.sweep_once()

    with Session(engine) as session:
        judged = select(AnalysisRow.state).where(AnalysisRow.tenant == "south")
        assert session.scalars(judged).one() == "QUEUED"


def test_h45_an_emergency_passes_loaders_that_are_full_of_others(engine, stages):
    backlog(engine)
    held = threading.Event()
    load = stages.scheduler._loader.load

    def slow(job, bundle):
        if job.tenant == "north":
            held.wait(60)  # five thousand slices
            raise InterruptedError
        return load(job, bundle)

    stages.scheduler._loader.load = slow
    while stages.scheduler.step():  # as many as it takes
        pass
    n_under_way = len(stages.scheduler._flights)
    stages.receive(patient(head_series()), tenant="south")
    stages.judge()

    deadline = time.monotonic() + 60
    while emergency(engine) != "FOUND":
        assert time.monotonic() < deadline
        stages.scheduler.step()
        stages.scheduler.wait()
    held.set()

    assert n_under_way == len(stages.scheduler._flights) > 1


def emergency(engine: Engine) -> str:
    with Session(engine) as session:
        return session.scalars(select(AnalysisRow.state).where(AnalysisRow.tenant == "south")).one()


def test_h45_a_spool_full_of_one_tenants_images_holds_up_no_other(stages, monkeypatch):
    monkeypatch.setattr(intake, "BATCH", 10)
    images = patient(head_series())
    for tenant, some in (("north", images), ("south", images[:1])):
        for image in some:
            source = Provenance(
                tenant=tenant, calling_ae="CT1", called_ae="AI",
                received_at="2026-01-01T00:00:00+00:00", sop_class_uid=image.SOPClassUID,
                sop_instance_uid=image.SOPInstanceUID,
                transfer_syntax_uid=image.file_meta.TransferSyntaxUID,
            )  # fmt: skip
            stages.spool.keep(source, encoded(image))

    stages.intake.take(stages.settings.node.data_dir / "spool" / "test")

    with Session(stages.engine) as session:
        n = dict(session.execute(select(StudyRow.tenant, StudyRow.n_instances)).all())
    assert n == {"north": 9, "south": 1}
