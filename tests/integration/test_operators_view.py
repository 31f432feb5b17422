"""What `vigil where` says of a study's way, and whom an operator's command may mean."""

import datetime as dt
import io

import pytest
from rich.console import Console
from sqlalchemy import func, update
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from config.tenants import Tenant
from db import results, studies
from db.result import Eligibility
from db.sandbox import Sandbox
from db.study import AnalysisEvent
from db.tables import DestinationRow, StudyRow
from dicom_sr import sending
from node import where
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

        for sender in node.deliverer._senders.values():
            assert not sender.ask_once()

        assert len(pacs.calling) == n
