"""A PACS that is down for a minute, a shift, a long weekend, for good: by a clock that is moved."""

from collections import Counter
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from db.job import Lane
from db.sandbox import Sandbox
from db.study import AnalysisState
from db.tables import DeliveryRow, EventRow, StudyRow
from dicom_sr import sending
from dicom_sr.deliver import SEND_POLL_S, Deliverer
from tests.clock import Clock
from tests.delivery import Node, destination
from tests.peers import Pacs

HOUR_S = 3600.0
LONG_WEEKEND_S = 87 * HOUR_S  # Friday, 17:00 to Tuesday, 8:00
#: Between two looks at a PACS that is down nothing is done but what each of them does: a try.
N_LOOKS = 3


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=1, memory_mb=4096, cpu_s=60) as pool:
        yield pool


@pytest.fixture
def clock(database_url, monkeypatch) -> Iterator[Clock]:
    clock = Clock(database_url)
    monkeypatch.setattr(sending, "time", clock)
    yield clock
    clock.close()


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    with Pacs() as peer:
        yield peer


@pytest.fixture
def node(clock: Clock, engine: Engine, settings, sandbox: Sandbox, pacs: Pacs) -> Node:
    return Node(engine, settings, sandbox).sends_to(destination(pacs.port))


def look(deliverer: Deliverer) -> None:
    """What a sender's thread does until it waits for its next poll."""
    for sender, _ in deliverer._senders.values():
        while sender.send_once() or sender.ask_once():
            pass


def deliveries(node: Node) -> list[DeliveryRow]:
    with Session(node.engine) as session:
        return list(session.scalars(select(DeliveryRow).order_by(DeliveryRow.id)))


def alarms(node: Node) -> list[str]:
    with Session(node.engine) as session:
        return list(session.scalars(select(EventRow.kind).where(EventRow.is_alarm)))


@pytest.mark.parametrize("outage_s", [60.0, 8 * HOUR_S, LONG_WEEKEND_S])
def test_h32_what_waited_goes_out_once_and_urgent_first_within_a_minute_of_the_return(
    node, pacs, clock, outage_s
):
    pacs.go_down()
    deliverer = node.deliverer
    lanes = [Lane.ROUTINE, Lane.STAT, Lane.URGENT]
    for number, lane in enumerate(lanes):  # they come in while it is away
        node.found(node.study(salt=str(number), lane=lane))
        node.builds()
        for _ in range(N_LOOKS):
            clock.advance(outage_s / len(lanes) / N_LOOKS)
            look(deliverer)
    assert {row.state for row in deliveries(node)} == {"WAITING"}
    assert pacs.received == []

    pacs.come_back()
    since = 0.0
    while any(row.state == "WAITING" for row in deliveries(node)):
        clock.advance(SEND_POLL_S)
        since += SEND_POLL_S
        assert since <= 60
        look(deliverer)

    assert {row.state for row in deliveries(node)} == {"DELIVERED"}
    assert set(Counter(one.SOPInstanceUID for one in pacs.received).values()) == {1}
    studies = list(dict.fromkeys(one.StudyInstanceUID for one in pacs.received))
    assert len(studies) == len(lanes)
    by_study = dict(zip(_studies(node), lanes, strict=True))
    assert [by_study[uid] for uid in studies] == sorted(lanes)
    assert alarms(node) == []


def test_h32_a_pacs_that_never_comes_back_ends_in_part_with_an_alarm(node, pacs, clock):
    pacs.go_down()
    analysis_id = node.study()
    node.found(analysis_id)
    node.builds()
    deliverer = node.deliverer

    for _ in range(10):
        clock.advance(23.9 * HOUR_S)
        look(deliverer)
    assert node.state(analysis_id) == AnalysisState.BUILT
    assert alarms(node) == []
    for _ in range(2):
        clock.advance(HOUR_S)
        look(deliverer)

    (row,) = deliveries(node)
    assert row.state == "EXPIRED"
    assert node.state(analysis_id) == AnalysisState.DELIVERED_IN_PART
    assert alarms(node) == ["delivery_expired"]


def test_h32_a_pacs_that_is_back_after_240_hours_gets_what_came_later(node, pacs, clock):
    pacs.go_down()
    first, second = node.study(salt="1"), None
    node.found(first)
    node.builds()
    deliverer = node.deliverer
    for hours in (2, 100, 138, 1):  # the second one comes after two of them
        clock.advance(hours * HOUR_S)
        look(deliverer)
        if second is None:
            second = node.study(salt="2")
            node.found(second)
            node.builds()
    pacs.come_back()
    clock.advance(60)
    look(deliverer)

    assert node.state(first) == AnalysisState.DELIVERED_IN_PART
    assert node.state(second) == AnalysisState.DELIVERED
    assert len({one.StudyInstanceUID for one in pacs.received}) == 1


def _studies(node: Node) -> list[str]:
    """Study Instance UIDs in the order of their deliveries."""
    with Session(node.engine) as session:
        query = select(StudyRow.study_instance_uid).join(
            DeliveryRow, DeliveryRow.study_id == StudyRow.id
        )
        return list(session.scalars(query.order_by(DeliveryRow.id)))
