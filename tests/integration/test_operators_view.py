"""What `vigil where` says of a study's way, and whom an operator's command may mean."""

import datetime as dt
import io
import uuid

import pytest
from rich.console import Console
from sqlalchemy import func, update
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from config.tenants import Tenant
from db import operator, results, studies, withdrawals
from db.result import Eligibility
from db.sandbox import Sandbox
from db.study import AnalysisEvent, WithdrawalReason
from db.tables import DestinationRow, ReturnedRow, StudyRow
from dicom_sr import sending
from node import status, where
from node.cli import app
from tests.delivery import Node, destination, running, wait_until
from tests.peers import Pacs


@pytest.fixture
def node(engine, settings):
    with Sandbox(1) as sandbox:
        yield Node(engine, settings, sandbox)


def story(node: Node) -> dict:
    with Session(node.engine) as session:
        (only,) = where.search(session, node.settings, "ACC-1")
    return only


def shown(one: dict) -> str:
    written = io.StringIO()
    where.show([one], Console(file=written, width=200))
    return written.getvalue()


def named(node: Node) -> int:
    analysis = node.study()
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(accession_number="ACC-1"))
    return analysis


def test_a_delivery_says_what_went_when_and_what_waits_for_what(node):
    with Pacs() as pacs:
        node.sends_to(destination(pacs.port), destination(1, "away"))
        node.found(named(node))
        node.deliverer.run_once()
    with Session(node.engine) as session, session.begin():  # however slow the machine is
        later = func.now() + dt.timedelta(hours=1)
        session.execute(
            update(DestinationRow).where(DestinationRow.name == "away").values(retry_at=later)
        )

    there, away = sorted(story(node)["analyses"][0]["deliveries"], key=lambda d: d["state"])
    assert (there["what"], there["result_no"], there["state"]) == ("result", 1, "DELIVERED")
    assert there["finished_at"]
    assert away["state"] == "WAITING"
    assert away["waits_for"].startswith("next try ")
    assert "no_connection" in away["waits_for"]
    assert "result 1 to away: WAITING" in shown(story(node))


def test_a_held_study_says_that_it_is_held(node):
    node.sends_to(destination(1))
    node.found(named(node))
    node.deliverer.run_once()
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(is_held=True))

    (waiting,) = story(node)["analyses"][0]["deliveries"]

    assert waiting["waits_for"] == "held: an identity conflict is open"


def test_a_reason_does_not_outlive_its_state(node):
    node.sends_to()
    analysis = named(node)
    node.move(analysis, AnalysisEvent.INPUTS_CHANGED)
    refuse(node, analysis)
    assert story(node)["analyses"][0]["reason"] == "Too few images."

    node.move(analysis, AnalysisEvent.RERUN)

    found = story(node)["analyses"][0]
    assert (found["state"], found["reason_code"], found["reason"]) == ("QUEUED", "", "")


def refuse(node: Node, analysis: int) -> None:
    with Session(node.engine) as session, session.begin():
        refusal = Eligibility("images", "3", ">= 8", "Too few images.")
        results.refuse(session, studies.load(session, analysis), refusal)


def test_a_partial_result_says_so(node):
    node.sends_to()
    analysis = named(node)
    node.found(analysis, is_partial=True)
    node.deliverer.run_once()

    one = story(node)
    one["analyses"][0]["is_partial"] = True  # as readiness writes it; the fixture does not

    assert "PARTIAL, result 1" in shown(one)


def test_several_studies_of_one_name_are_listed(node):
    node.sends_to()
    named(node)
    with Session(node.engine) as session, session.begin():
        session.add(
            StudyRow(
                tenant="south",
                origin="dicom",
                study_instance_uid="2.25.7",
                patient_id="P",
                accession_number="ACC-1",
            )
        )

    with Session(node.engine) as session:
        with pytest.raises(where.AmbiguousStudy, match="2 studies go by that name") as told:
            where.find_one(session, "ACC-1")
        ids = [str(row.public_id) for row in where.find(session, "ACC-1")]

    assert all(one in str(told.value) for one in ids)


def test_a_tenant_that_is_none_is_no_study_that_is_none(node):
    node.settings = node.settings.model_copy(
        update={"tenants": (Tenant(id="north", ae_titles=("A",)),)}
    )

    with (
        Session(node.engine) as session,
        pytest.raises(where.UnknownTenant, match="there are: north"),
    ):
        where.search(session, node.settings, "ACC-1", "nowhere")


@pytest.mark.parametrize("command", ["rerun", "resend", "where"])
@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_name_means_no_study(command, blank):
    done = CliRunner().invoke(app, [command, blank])

    assert done.exit_code == 2
    assert "must not be blank" in done.stderr


def test_retry_is_never_in_the_past(node):
    """A destination whose wait is over is due: nothing is waited for."""
    node.sends_to(destination(1))
    node.found(named(node))
    node.deliverer.run_once()
    with Session(node.engine) as session, session.begin():
        past = func.now() - dt.timedelta(hours=1)
        session.execute(update(DestinationRow).values(retry_at=past))

    assert story(node)["analyses"][0]["deliveries"][0]["waits_for"] == ""


def test_h32_a_destination_that_is_back_is_used_at_once_not_when_its_back_off_ends(
    node, monkeypatch
):
    monkeypatch.setattr(sending, "ASK_S", 0.2)
    with Pacs() as pacs:
        node.sends_to(destination(pacs.port))
        pacs.go_down()
        result = node.found(named(node))
        node.deliverer.run_once()
        with Session(node.engine) as session, session.begin():
            later = func.now() + dt.timedelta(minutes=15)
            session.execute(update(DestinationRow).values(retry_at=later))

        with running(node.deliverer):
            pacs.come_back()
            wait_until(lambda: node.delivery(result).state == "DELIVERED")

    assert len(pacs.received) == len(pacs.instances) > 0


def test_a_destination_that_nothing_waits_for_is_not_asked(node):
    with Pacs() as pacs:
        node.sends_to(destination(pacs.port))
        node.found(named(node))
        node.deliverer.run_once()
        n = len(pacs.calling)
        with Session(node.engine) as session, session.begin():
            later = func.now() + dt.timedelta(minutes=15)
            session.execute(
                update(DestinationRow).values(retry_at=later, last_error="no_connection")
            )

        for sender, _ in node.deliverer._senders.values():
            assert not sender.ask_once()

        assert len(pacs.calling) == n


def test_a_result_is_found_by_its_own_uids(node):
    with Pacs() as pacs:
        node.sends_to(destination(pacs.port))
        node.found(named(node))
        node.deliverer.run_once()
    report = pacs.received[0]

    with Session(node.engine) as session:
        for uid in (report.SOPInstanceUID, report.SeriesInstanceUID):
            (only,) = where.search(session, node.settings, str(uid))
            assert only["accession_number"] == "ACC-1"


def test_what_was_refused_is_seen_at_once_and_sent_once_more_by_hand(node):
    with Pacs() as pacs:
        node.sends_to(destination(pacs.port))
        analysis = named(node)
        pacs.answer = 0xC000
        result_id = node.found(analysis)
        node.deliverer.run_once()
        node.forget_waiting()
        node.deliverer.run_once()  # the second time: it waits for hours now
        n = len(pacs.received)

        with Session(node.engine) as session:
            told = status.status(session, node.settings)
            (kept,) = told["deliveries"]
            assert [alarm["kind"] for alarm in told["alarms_24h"]] == ["objects_refused"]
        assert (kept["waiting"], kept["errors"]) == (1, ["0xC000"])
        assert kept["next_s"] > 3600
        assert "0xC000, next try within 5 h" in printed(told)
        pacs.answer = 0x0000
        node.deliverer.run_once()
        assert len(pacs.received) == n

        with Session(node.engine) as session, session.begin():
            operator.resend(session, analysis, actor="admin")
        node.deliverer.run_once()

    assert node.delivery(result_id).state == "DELIVERED"
    assert node.state(analysis) == "DELIVERED"


def printed(told: dict) -> str:
    written = io.StringIO()
    status.show(told, Console(file=written, width=200))
    return written.getvalue()


def test_jobs_of_a_held_study_are_no_backlog(node):
    node.sends_to()
    analysis = node.study()
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(is_held=True, state="HELD"))
    with Session(node.engine) as session:
        told = status.status(session, node.settings)
    assert (told["queue"]["waiting"], told["queue"]["held"]) == (
        1,
        0,
    )  # it is analysed all the same
    node.found(analysis)

    with Session(node.engine) as session:
        told = status.status(session, node.settings)

    assert (told["queue"]["waiting"], told["queue"]["held"]) == (0, 1)
    assert told["queue"]["oldest_s"] is None
    assert "1 held until a person decides" in printed(told)
    named_so = update(StudyRow).values(accession_number="ACC-1")
    with Session(node.engine) as session, session.begin():
        session.execute(named_so)
    assert "FOUND, held until a person decides" in shown(story(node))


def test_own_objects_that_came_back_are_counted(node):
    node.sends_to()
    with Session(node.engine) as session, session.begin():
        session.add(
            ReturnedRow(id=uuid.uuid4(), tenant="north", sop_instance_uid="1.2", sender="P", n=3)
        )

    with Session(node.engine) as session:
        told = status.status(session, node.settings)

    assert told["own_objects_returned"] == 3
    assert "3 of our own objects came back" in printed(told)


def test_what_was_withdrawn_is_marked_where_it_went(node):
    with Pacs() as pacs:
        node.sends_to(destination(pacs.port))
        analysis = named(node)
        node.found(analysis)
        node.deliverer.run_once()
        with Session(node.engine) as session, session.begin():
            withdrawals.withdraw(session, analysis, actor="admin", reason=WithdrawalReason.QUALITY)

        assert "result 1 to pacs: DELIVERED, withdrawn" in shown(story(node))
        with Session(node.engine) as session:
            assert status.status(session, node.settings)["tenants"]["north"]["results"] == 0
