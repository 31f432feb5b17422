"""From a stored finding to objects in a PACS: real PostgreSQL, real files, real associations."""

import hashlib
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, func, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from config.settings import ScpSettings, Settings
from config.tenants import Tenant
from db import operator, queue, results, studies
from db.files import result_folder
from db.job import JobKind
from db.sandbox import Sandbox
from db.study import AnalysisEvent, AnalysisState
from db.tables import (
    AnalysisRow,
    DeliveryRow,
    DestinationRow,
    JobRow,
    ObjectRow,
    ResultRow,
    StudyRow,
)
from tests.builders import ct_series
from tests.certificates import Authority
from tests.delivery import Node, analysed, destination, free_port, running, wait_until
from tests.findings import make_finding
from tests.peers import Pacs
from tests.validators import need

SC = "1.2.840.10008.5.1.4.1.1.7"
SR_3D = "1.2.840.10008.5.1.4.1.1.88.34"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=1, memory_mb=4096, cpu_s=60) as pool:
        yield pool


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    with Pacs() as peer:
        yield peer


@pytest.fixture
def node(engine: Engine, settings: Settings, sandbox: Sandbox) -> Node:
    return Node(engine, settings, sandbox)


def test_a_finding_becomes_objects_in_the_pacs(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    result_id = node.found(analysis_id)

    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert [d.Modality for d in pacs.received] == ["OT", "OT", "OT", "OT", "SR", "KO"]
    assert set(node.delivery(result_id).statuses.values()) == {"0x0000"}
    assert {str(d.PatientID) for d in pacs.received} == {"PHANTOM-PLAIN-1"}


def test_stored_objects_are_what_their_rows_say(node, pacs):
    node.sends_to(destination(pacs.port))
    result_id = node.found(node.study())

    node.deliverer.run_once()

    rows = node.objects()
    assert [row.role for row in rows] == ["summary", *["overlay"] * 3, "sr", "sr", "sr", "ko"]
    folder = result_folder(node.data_dir, "north", result_id)
    for row in rows:
        data = (folder / f"{row.sop_instance_uid}.dcm").read_bytes()
        assert hashlib.sha256(data).hexdigest() == row.sha256
        assert len(data) == row.size_bytes


def test_a_negative_that_a_site_does_not_want_is_still_delivered(node, pacs):
    node.sends_to(destination(pacs.port, emit_negative="none"))
    analysis_id = node.study()
    node.found(analysis_id, positive=False)

    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert pacs.received == []


def test_without_a_destination_results_are_kept(node):
    node.sends_to()
    analysis_id = node.study()
    node.found(analysis_id)

    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert [row.role for row in node.objects()] == ["summary", *["overlay"] * 3, "sr", "ko"]


def test_an_upload_is_never_sent_to_a_pacs(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study(origin="user:7")
    node.found(analysis_id)

    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert pacs.received == []
    assert node.objects()


def test_a_shadow_result_is_never_built_nor_sent(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    with Session(node.engine) as session, session.begin():
        session.execute(update(AnalysisRow).values(is_shadow=True))
    node.found(analysis_id)

    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert pacs.received == []
    assert node.objects() == []


def test_h34_a_full_pacs_gets_it_later_and_only_what_it_lacks(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    pacs.answers = {SR_3D: 0xA700}

    node.deliverer.run_once()
    assert node.state(analysis_id) == AnalysisState.BUILT
    pacs.answers = {}
    node.forget_waiting()
    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert [d.Modality for d in pacs.received] == ["OT"] * 4 + ["SR", "SR", "KO"]
    assert len(pacs.instances) == 6


def test_h32_a_dead_pacs_gets_the_same_bytes_once_it_is_back(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    pacs.go_down()

    node.deliverer.run_once()
    before = [row.sha256 for row in node.objects()]
    assert node.delivery(result_id).error_code == "no_connection"
    pacs.come_back()
    node.forget_waiting()
    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert [row.sha256 for row in node.objects()] == before
    assert len(pacs.received) == 6


def test_h37_a_kill_between_send_and_record_changes_nothing_in_the_pacs(node, pacs):
    node.sends_to(destination(pacs.port))
    result_id = node.found(node.study())
    node.deliverer.run_once()
    once = list(pacs.raw)

    with Session(node.engine) as session, session.begin():  # as if it had not been written down
        session.execute(update(DeliveryRow).values(state="WAITING", statuses={}, finished_at=None))
    node.deliverer.run_once()

    assert pacs.raw == once + once
    assert len(pacs.instances) == 6
    assert node.delivery(result_id).state == "DELIVERED"


def test_h33_a_pacs_without_secondary_capture_gets_the_rest(node):
    with Pacs(refuses=(SC,)) as pacs:
        node.sends_to(destination(pacs.port))
        analysis_id = node.study()
        result_id = node.found(analysis_id)
        for _ in range(5):
            node.deliverer.run_once()
            node.forget_waiting()

        assert node.state(analysis_id) == AnalysisState.DELIVERED_IN_PART
        assert [d.Modality for d in pacs.received] == ["SR", "KO"]
        statuses = list(node.delivery(result_id).statuses.values())
        assert statuses.count("context_refused") == 4
        assert "delivery_refused" in node.events()


def test_h33_the_class_that_was_taken_is_written_down_once(node):
    with Pacs(refuses=(SR_3D,)) as pacs:
        node.sends_to(destination(pacs.port))
        analysis_id = node.study()
        result_id = node.found(analysis_id)
        node.deliverer.run_once()

        assert node.state(analysis_id) == AnalysisState.DELIVERED
        assert len(node.delivery(result_id).statuses) == 6
        assert len([d for d in pacs.received if d.Modality == "SR"]) == 1


def test_h36_a_stalled_destination_delays_no_other(node, pacs):
    with Pacs() as stalled:
        stalled.stalls = True
        node.sends_to(destination(stalled.port, "slow"), destination(pacs.port))
        result_id = node.found(node.study())
        with running(node.deliverer):
            # One after the other they would take three minutes: half a minute for each answer.
            wait_until(lambda: len(pacs.received) == 6, timeout_s=90)

            assert stalled.is_stalled.wait(90)
            assert node.delivery(result_id, "slow").state == "SENDING"
            stalled.let_go()


def test_h8_a_held_study_is_not_sent(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    assert node.deliverer._builder.build_once()
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(is_held=True))

    node.deliverer.run_once()
    assert pacs.received == []
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(is_held=False))
    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED


@pytest.mark.parametrize(
    "change",
    [{"patient_id": "OTHER-9"}, {"study_instance_uid": "2.25.5"}],
)
def test_h8_a_corrected_study_is_not_sent_under_its_old_identity(node, pacs, change):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    assert node.deliverer._builder.build_once()
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(**change))

    node.deliverer.run_once()

    assert pacs.received == []
    assert node.delivery(result_id).error_code == "study_changed"
    assert node.state(analysis_id) == AnalysisState.DELIVERED_IN_PART
    assert "delivery_withheld" in node.events()


def test_h21_a_second_result_names_the_report_it_replaces(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    node.deliverer.run_once()
    (first,) = [d for d in pacs.received if d.Modality == "SR"]

    node.move(analysis_id, AnalysisEvent.RERUN)
    node.found(analysis_id)
    node.deliverer.run_once()

    first, second = [d for d in pacs.received if d.Modality == "SR"]
    reference = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert reference.SeriesInstanceUID == first.SeriesInstanceUID
    old = reference.ReferencedSOPSequence[0]
    assert old.ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert (first.SeriesNumber, second.SeriesNumber) == (9903, 9913)
    assert len(pacs.instances) == 12


def test_h21_a_result_nobody_had_is_replaced_by_nobody(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    old = node.found(analysis_id)
    pacs.go_down()
    node.deliverer.run_once()

    node.move(analysis_id, AnalysisEvent.RERUN)
    node.found(analysis_id)
    pacs.come_back()
    node.forget_waiting()
    node.deliverer.run_once()

    (report,) = [d for d in pacs.received if d.Modality == "SR"]
    assert "PredecessorDocumentsSequence" not in report
    assert node.delivery(old).state == "DROPPED"


def test_h21_a_part_sent_result_is_finished_first_and_then_named(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    pacs.answers = {SR_3D: 0xA700}
    node.deliverer.run_once()

    node.move(analysis_id, AnalysisEvent.RERUN)
    node.found(analysis_id)
    assert node.deliverer._builder.build_once()  # while the old report is still on its way
    pacs.answers = {}
    pacs.received.clear()
    node.forget_waiting()
    node.deliverer.run_once()

    first, second = [d for d in pacs.received if d.Modality == "SR"]
    assert [int(d.SeriesNumber) for d in (first, second)] == [9903, 9913]
    named = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert named.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert node.state(analysis_id) == AnalysisState.DELIVERED


def test_a_resend_sends_the_same_bytes(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    node.deliverer.run_once()
    once = list(pacs.raw)

    with Session(node.engine) as session, session.begin():
        operator.resend(session, analysis_id, actor="admin")
    node.deliverer.run_once()

    assert pacs.raw == once + once
    assert node.state(analysis_id) == AnalysisState.DELIVERED


def test_lost_sources_end_in_a_stated_outcome(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    for path in (node.data_dir / "store").rglob("*.dcm"):
        path.unlink()

    node.deliverer.run_once()

    with Session(node.engine) as session:
        row = session.get_one(AnalysisRow, analysis_id)
        assert (row.state, row.reason_code) == ("FAILED", "instance_gone")


def test_a_swapped_source_is_never_reported_on(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    first, second, *_ = sorted((node.data_dir / "store").rglob("*.dcm"))
    swapped = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swapped)

    node.deliverer.run_once()

    with Session(node.engine) as session:
        assert session.get_one(AnalysisRow, analysis_id).reason_code == "wrong_source"
    assert pacs.received == []


def test_a_build_that_was_killed_runs_again_without_doubling(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    with Session(node.engine) as session, session.begin():
        job = queue.claim(session, [JobKind.BUILD], "killed", lease_s=-1)
    assert job is not None
    builder = node.deliverer._builder
    with Session(node.engine) as session:
        (result_id,) = session.scalars(select(ResultRow.id))
        subject = builder._assembler.subject(session, result_id)
        owed = builder._owed(subject.tenant, subject.origin)
    builder._ensure(subject, owed, is_shadow=False)  # objects stored, then killed

    with Session(node.engine) as session, session.begin():
        assert queue.requeue_dead(session) == 1
        session.execute(update(JobRow).values(run_after=func.now()))
    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert len(pacs.received) == 6
    assert len(node.objects()) == 8


def test_a_lost_object_is_built_again_with_the_same_bytes(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    builder = node.deliverer._builder
    assert builder.build_once()
    row = node.objects()[0]
    path = result_folder(node.data_dir, "north", result_id) / f"{row.sop_instance_uid}.dcm"
    path.unlink()

    with Session(node.engine) as session:
        subject = builder._assembler.subject(session, result_id)
        owed = builder._owed(subject.tenant, subject.origin)
    builder._ensure(subject, owed, is_shadow=False)

    assert hashlib.sha256(path.read_bytes()).hexdigest() == row.sha256


def test_a_pacs_whose_certificate_is_not_trusted_gets_it_once_it_is(node, tmp_path):
    (tmp_path / "stranger").mkdir()
    authority, stranger = Authority(tmp_path), Authority(tmp_path / "stranger")
    ours, trusted = authority.signs("vigil"), tmp_path / "trusted.pem"
    trusted.write_bytes(stranger.cert.read_bytes())
    scp = ScpSettings(tls_ca=str(trusted), tls_cert=str(ours.cert), tls_key=str(ours.key))
    with Pacs(tls=authority.server(authority.signs("pacs"))) as pacs:
        node.settings = node.settings.model_copy(update={"scp": scp})
        deliverer = node.sends_to(destination(pacs.port, tls=True)).deliverer
        analysis_id = node.study()
        result_id = node.found(analysis_id)

        deliverer.run_once()
        tried = node.delivery(result_id)
        with Session(node.engine) as session:
            pacs_row = session.scalars(select(DestinationRow)).one()
        assert pacs.received == []
        trusted.write_bytes(authority.cert.read_bytes())  # and nothing is restarted
        node.forget_waiting()
        deliverer.run_once()

        assert (tried.state, tried.error_code) == ("WAITING", "certificate_not_trusted")
        assert (pacs_row.failures, pacs_row.last_error) == (1, "certificate_not_trusted")
        assert node.state(analysis_id) == AnalysisState.DELIVERED
        assert len(pacs.instances) == 6


def test_two_tenants_with_one_study_uid_reach_their_own_pacs(node, pacs):
    """H4: the UIDs of what they get have nothing in common."""
    node.sends_to(destination(pacs.port))
    node.found(node.study())
    node.deliverer.run_once()
    north = set(pacs.instances)

    with Pacs() as other:
        south = Tenant(id="south", ae_titles=("SOUTH_AI",), destinations=(destination(other.port),))
        node.settings = node.settings.model_copy(
            update={"tenants": (*node.settings.tenants, south)}
        )
        with Session(node.engine) as session, session.begin():
            for row in (StudyRow, AnalysisRow, ResultRow, DeliveryRow, JobRow, ObjectRow):
                session.execute(update(row).values(tenant="south"))
            session.execute(update(DestinationRow).values(tenant="south"))
            session.execute(update(ResultRow).values(id=ResultRow.id))
        folder = node.data_dir / "results"
        (folder / "north").rename(folder / "south")
        (node.data_dir / "store" / "north").rename(node.data_dir / "store" / "south")
        with Session(node.engine) as session, session.begin():
            (analysis_id,) = session.scalars(select(AnalysisRow.id))
            studies.move(session, studies.load(session, analysis_id), AnalysisEvent.RERUN)
            job = queue.claim(session, [JobKind.INFER], "infer")
            finding = make_finding(
                sorted(ct_series(), key=lambda d: float(d.ImagePositionPatient[2])),
                result_uuid=str(uuid.uuid4()),
                positive=False,
            )
            results.store_finding(session, job, finding, analysed(finding))

        node.deliverer.run_once()

        assert len(other.instances) == 2
        assert not other.instances & north
        assert len(pacs.received) == 6


def test_dcmtk_takes_everything_and_a_resend_leaves_its_count_unchanged(node, tmp_path):
    """An archive that files by SOP Instance UID: the strictest reader of our associations."""
    storescp = need("storescp")
    folder = tmp_path / "received"
    folder.mkdir()
    port = free_port()
    process = subprocess.Popen(
        [storescp, "-od", str(folder), "+xe", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        node.sends_to(destination(port))
        analysis_id = node.study()
        result_id = node.found(analysis_id)

        def delivered() -> bool:
            node.forget_waiting()
            node.deliverer.run_once()
            return node.delivery(result_id).state == "DELIVERED"

        wait_until(delivered)
        names = sorted(path.name for path in folder.iterdir())
        with Session(node.engine) as session, session.begin():
            operator.resend(session, analysis_id, actor="admin")
        wait_until(delivered)

        assert len(names) == 6
        assert sorted(path.name for path in folder.iterdir()) == names
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def cut_once(engine: Engine, part: str) -> Iterator[list[str]]:
    """Let the server end the connection on which a statement with `part` is about to run, once."""
    cut: list[str] = []
    owner = create_engine(engine.url)  # without the role of a stage, which may end nothing

    def listen(connection, _cursor, statement, *_rest) -> None:
        if part in statement and not cut:
            cut.append(statement)
            pid = connection.connection.driver_connection.info.backend_pid
            with owner.connect() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            time.sleep(0.2)  # it ends when it next looks

    event.listen(engine, "before_cursor_execute", listen)
    try:
        yield cut
    finally:
        event.remove(engine, "before_cursor_execute", listen)
        owner.dispose()


def test_what_the_pacs_has_is_written_down_though_the_database_was_away(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    assert node.deliverer._builder.build_once()

    with cut_once(node.engine, "finished_at=now()") as cut:
        node.deliverer.run_once()

    assert cut
    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert len(node.delivery(result_id).statuses) == 6
    assert len(pacs.received) == 6


def reads_only(connection, cursor) -> None:
    """A failover: the server that answers is a standby."""
    cursor.execute("SET TRANSACTION READ ONLY")


def closed(connection, cursor) -> None:
    connection.connection.driver_connection.close()


@contextmanager
def fails_once(engine: Engine, part: str, fail: Callable) -> Iterator[list[str]]:
    """Let the next statement with `part` fail as the database itself would."""
    failed: list[str] = []

    def listen(connection, cursor, statement, *_rest) -> None:
        if part in statement and not failed:
            failed.append(statement)
            fail(connection, cursor)

    event.listen(engine, "before_cursor_execute", listen)
    try:
        yield failed
    finally:
        event.remove(engine, "before_cursor_execute", listen)


@pytest.mark.parametrize("fail", [reads_only, closed])
def test_what_the_pacs_has_is_written_down_though_the_database_failed_over(node, pacs, fail):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    assert node.deliverer._builder.build_once()

    with fails_once(node.engine, "finished_at=now()", fail) as failed:
        node.deliverer.run_once()

    assert failed
    assert node.state(analysis_id) == AnalysisState.DELIVERED
    assert len(pacs.received) == 6


@pytest.mark.parametrize("fail", [reads_only, closed])
def test_an_answer_that_cannot_be_noted_at_once_is_written_down_at_the_end(node, pacs, fail):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    assert node.deliverer._builder.build_once()

    with fails_once(node.engine, "SET statuses=", fail) as failed:
        node.deliverer.run_once()

    assert failed
    assert len(node.delivery(result_id).statuses) == 6
    assert len(pacs.received) == 6


def test_a_database_that_fails_while_a_delivery_is_prepared_is_none_of_its_tries(node, pacs):
    node.sends_to(destination(pacs.port))
    result_id = node.found(node.study())
    assert node.deliverer._builder.build_once()

    with fails_once(node.engine, "FROM objects", closed), pytest.raises(DBAPIError):
        node.deliverer.run_once()

    row = node.delivery(result_id)
    assert (row.state, row.attempts, row.lease_until) == ("WAITING", 0, None)


def test_a_database_that_fails_while_objects_are_built_is_none_of_the_jobs_tries(node, pacs):
    node.sends_to(destination(pacs.port))
    node.found(node.study())

    with fails_once(node.engine, "FROM objects", closed), pytest.raises(DBAPIError):
        node.deliverer.run_once()

    with Session(node.engine) as session:
        job = session.scalars(select(JobRow).where(JobRow.kind == JobKind.BUILD)).one()
        assert (job.state, job.attempts, job.error_code) == ("TODO", 0, "")


def test_what_was_built_is_written_down_though_the_database_was_away(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)

    with cut_once(node.engine, "INSERT INTO deliveries") as cut:
        assert node.deliverer._builder.build_once()

    assert cut
    assert node.state(analysis_id) == AnalysisState.BUILT


def spoil_last(node: Node, result_id: uuid.UUID) -> Path:
    row = node.objects()[-1]
    path = result_folder(node.data_dir, "north", result_id) / f"{row.sop_instance_uid}.dcm"
    path.write_bytes(b"no data set")
    return path


def test_a_stored_object_that_changed_is_withheld(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    assert node.deliverer._builder.build_once()
    spoil_last(node, result_id)

    node.deliverer.run_once()

    assert pacs.received == []
    assert node.delivery(result_id).error_code == "objects_gone"
    assert node.state(analysis_id) == AnalysisState.DELIVERED_IN_PART


def test_a_crash_in_one_delivery_is_one_of_its_tries_and_does_not_end_the_sender(node, pacs):
    node.sends_to(destination(pacs.port))
    result_id = node.found(node.study())
    assert node.deliverer._builder.build_once()
    last = node.objects()[-1]
    path = result_folder(node.data_dir, "north", result_id) / f"{last.sop_instance_uid}.dcm"
    whole = path.read_bytes()
    spoil_last(node, result_id)
    expect_last(node, path)

    with running(node.deliverer):
        wait_until(lambda: node.delivery(result_id).attempts == 1)
        row = node.delivery(result_id)
        path.write_bytes(whole)
        expect_last(node, path)
        node.forget_waiting()
        wait_until(lambda: node.delivery(result_id).state == "DELIVERED")

    assert (row.state, row.error_code, row.lease_until) == ("WAITING", "sending_crashed", None)
    assert row.run_after > row.created_at  # not again at once


def expect_last(node: Node, path: Path) -> None:
    """As if the last object had been built as it is now."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with Session(node.engine) as session, session.begin():
        last = select(func.max(ObjectRow.seq)).scalar_subquery()
        session.execute(update(ObjectRow).where(ObjectRow.seq == last).values(sha256=digest))


def test_what_no_sender_is_left_for_expires(node, pacs):
    node.sends_to(destination(pacs.port))
    analysis_id = node.study()
    node.found(analysis_id)
    assert node.deliverer._builder.build_once()
    with Session(node.engine) as session, session.begin():
        session.execute(update(DeliveryRow).values(expires_at=func.now()))
    node.sends_to()

    assert node.deliverer.sweep()

    assert node.state(analysis_id) == AnalysisState.DELIVERED_IN_PART
