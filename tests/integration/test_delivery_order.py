"""What goes to a destination first, what makes way for what, and what is never forgotten."""

import datetime as dt
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, delete, func, update
from sqlalchemy.orm import Session

from config.settings import Settings
from db import dispatch, operator
from db.sandbox import Sandbox
from db.study import AnalysisEvent, AnalysisState
from db.tables import DeliveryRow, ResultRow, StudyRow
from tests.delivery import Node, destination
from tests.peers import Pacs

KO = "1.2.840.10008.5.1.4.1.1.88.59"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=1, memory_mb=4096, cpu_s=60) as pool:
        yield pool


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    with Pacs() as peer:
        yield peer


@pytest.fixture
def node(engine: Engine, settings: Settings, sandbox: Sandbox, pacs: Pacs) -> Node:
    return Node(engine, settings, sandbox).sends_to(destination(pacs.port))


def reports(pacs: Pacs) -> list[bool]:
    """Of each report that was sent, whether it names the one that it replaces."""
    return ["PredecessorDocumentsSequence" in d for d in pacs.received if d.Modality == "SR"]


def is_refused_by(pacs: Pacs, node: Node) -> None:
    """One try, which the PACS answers as told; later tries it takes."""
    node.deliverer.run_once()
    pacs.answer, pacs.answers = 0x0000, {}
    pacs.received.clear()
    node.forget_waiting()


def test_a_notice_takes_no_results_place(node, pacs):
    a, b = destination(pacs.port, "a"), destination(pacs.port, "b")
    node.sends_to(a, b)
    analysis_id = node.study()
    result = node.found(analysis_id)
    node.builds()

    node.given_up(analysis_id, a)
    node.deliverer.run_once()

    assert [node.delivery(result, name).state for name in "ab"] == ["DELIVERED", "DELIVERED"]
    assert reports(pacs) == [False, False]


def test_a_newer_result_drops_an_older_one_only_where_it_goes_itself(node, pacs):
    a, b = destination(pacs.port, "a"), destination(pacs.port, "b")
    node.sends_to(a, b)
    analysis_id = node.study()
    older = node.found(analysis_id)
    node.builds()
    node.sends_to(a)

    node.revised(analysis_id)
    node.builds()

    assert [node.delivery(older, name).state for name in "ab"] == ["DROPPED", "WAITING"]


@pytest.mark.parametrize("answer", [0xC000, 0xA700])
def test_a_result_that_was_refused_whole_is_dropped_for_a_newer_one(node, pacs, answer):
    analysis_id = node.study()
    older = node.found(analysis_id)
    pacs.answer = answer
    is_refused_by(pacs, node)

    newer = node.revised(analysis_id)
    node.deliverer.run_once()

    assert (node.delivery(older).state, node.delivery(newer).state) == ("DROPPED", "DELIVERED")
    assert reports(pacs) == [False]


def test_a_result_that_was_refused_in_part_holds_up_no_newer_one(node, pacs):
    analysis_id = node.study()
    older = node.found(analysis_id)
    pacs.answers = {KO: 0xA900}
    is_refused_by(pacs, node)

    newer = node.revised(analysis_id)
    node.deliverer.run_once()

    assert (node.delivery(older).state, node.delivery(newer).state) == ("REFUSED", "DELIVERED")
    assert reports(pacs) == [True]
    assert "delivery_refused" in node.events()


@pytest.mark.parametrize(
    ("outcome", "answers", "state"),
    [
        (dispatch.refuse, {"1.2": "0xA900"}, "REFUSED"),
        (dispatch.refuse, {"1.2": "0xA900", "1.3": "0x0000"}, "REFUSED"),
        (dispatch.postpone, {"1.2": "0xA700"}, "DROPPED"),
        (dispatch.postpone, {"1.2": "0xA700", "1.3": "0x0000"}, "WAITING"),
    ],
)
def test_what_is_overtaken_in_mid_send_makes_way_when_it_fails(node, outcome, answers, state):
    analysis_id = node.study()
    older = node.found(analysis_id)
    node.builds()
    delivery = node.claim()
    node.revised(analysis_id)
    node.builds()

    with Session(node.engine) as session, session.begin():
        outcome(session, delivery, answers, error_code="0xA900")

    assert node.delivery(older).state == state


@pytest.mark.parametrize("answers", [{}, {"1.2": "0xC000"}])
def test_a_result_that_fails_does_not_make_way_for_a_notice(node, pacs, answers):
    analysis_id = node.study()
    result = node.found(analysis_id)
    node.builds()
    delivery = node.claim()
    node.given_up(analysis_id, destination(pacs.port))

    with Session(node.engine) as session, session.begin():
        outcome = dispatch.refuse if answers else dispatch.postpone
        outcome(session, delivery, answers, error_code="no_answer")

    assert node.delivery(result).state == "WAITING"


def test_a_notice_that_was_refused_ends_when_the_study_is_opened_again(node, pacs):
    analysis_id = node.study()
    notice = node.given_up(analysis_id, destination(pacs.port))
    delivery = node.claim()
    with Session(node.engine) as session, session.begin():
        dispatch.refuse(session, delivery, {"1.2": "0xC000"}, error_code="0xC000")

    node.move(analysis_id, AnalysisEvent.RERUN)

    assert node.delivery(notice).state == "DROPPED"


@pytest.mark.parametrize("is_opened", [True, False])
def test_a_notice_is_not_sent_once_the_study_was_opened_again(node, pacs, is_opened):
    analysis_id = node.study()
    notice = node.given_up(analysis_id, destination(pacs.port))
    delivery = node.claim()
    if is_opened:
        node.move(analysis_id, AnalysisEvent.RERUN)
    with Session(node.engine) as session, session.begin():
        dispatch.postpone(session, delivery, {}, error_code="association_rejected")
    node.forget_waiting()

    node.deliverer.run_once()

    assert node.delivery(notice).state == ("DROPPED" if is_opened else "DELIVERED")


def test_a_resend_does_not_forget_what_the_pacs_has(node, pacs):
    analysis_id = node.study()
    node.found(analysis_id)
    node.deliverer.run_once()
    with Session(node.engine) as session, session.begin():
        operator.resend(session, analysis_id, actor="admin")
    pacs.rejects = True
    node.deliverer.run_once()

    node.revised(analysis_id)
    node.builds()
    pacs.rejects = False
    node.forget_waiting()
    node.deliverer.run_once()

    assert reports(pacs) == [False, False, True]  # the first, once more the same, the revision


def test_a_revision_whose_sources_are_gone_is_sent_as_it_was_built(node, pacs):
    analysis_id = node.study()
    node.found(analysis_id)
    pacs.aborts_after = 2
    node.deliverer.run_once()
    pacs.aborts_after = None
    newer = node.revised(analysis_id)
    node.builds()  # before the older report has arrived: it names none
    (node.data_dir / "store").rename(node.data_dir / "hidden")
    node.forget_waiting()

    node.deliverer.run_once()

    assert node.delivery(newer).state == "DELIVERED"
    assert reports(pacs) == [False, False]


def test_a_delivery_whose_result_is_gone_is_withheld(node, pacs):
    analysis_id = node.study()
    result = node.found(analysis_id)
    node.builds()
    with Session(node.engine) as session, session.begin():
        session.execute(delete(ResultRow))

    node.deliverer.run_once()

    row = node.delivery(result)
    assert (row.state, row.error_code, pacs.received) == ("REFUSED", "result_gone", [])
    assert node.state(analysis_id) == AnalysisState.DELIVERED_IN_PART


def overdue(node: Node, **changes: object) -> None:
    past = func.now() - dt.timedelta(hours=1)
    with Session(node.engine) as session, session.begin():
        session.execute(update(DeliveryRow).values(**{"expires_at": past, **changes}))


def test_after_a_long_outage_of_the_node_a_delivery_gets_its_last_try(node, pacs):
    analysis_id = node.study()
    node.found(analysis_id)
    node.builds()
    overdue(node)
    deliverer = node.deliverer

    assert not deliverer.sweep()
    deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.DELIVERED


def test_what_was_tried_since_the_start_expires(node):
    result = node.found(node.study())
    node.builds()
    deliverer = node.deliverer
    assert not deliverer.sweep()
    overdue(node, run_after=func.now() + dt.timedelta(minutes=15))

    assert deliverer.sweep()

    assert node.delivery(result).state == "EXPIRED"


def test_what_is_held_expires_when_a_person_has_had_a_day(node):
    node.found(node.study())
    node.builds()
    overdue(node, run_after=func.now() - dt.timedelta(days=3))
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(is_held=True))
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(days=2)

    def expires() -> bool:
        with Session(node.engine) as session, session.begin():
            return dispatch.expire_next(session, "w", sent_to=[("north", "pacs")], since=long_ago)

    assert not expires()
    overdue(
        node,
        expires_at=func.now() - dt.timedelta(hours=25),
        run_after=func.now() - dt.timedelta(days=3),
    )
    assert expires()
