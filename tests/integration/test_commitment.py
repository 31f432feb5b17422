"""Storage commitment with archives: what they accept they are to vouch for (PS3.4 Annex J)."""

import datetime as dt
import hashlib
import json
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from config.tenants import Tenant
from db import commitment, operator, withdrawals
from db.commitment import MAX_FAILURES, MAX_REQUESTS
from db.committing import Committing
from db.outbox import DeliveryState
from db.sandbox import Sandbox
from db.spool import read_provenance, scan
from db.study import AnalysisState, WithdrawalReason
from db.tables import CommitmentRow, EventRow
from db.transaction import Item, Transaction
from dicom_sr import commitment as on_the_line
from node.orthanc import OrthancPacs
from tests.delivery import Node, destination, free_port, wait_until
from tests.listening import receivers
from tests.peers import Pacs
from tests.validators import need
from tests.vouching import VouchingPacs

SC = "1.2.840.10008.5.1.4.1.1.7"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=2, memory_mb=4096, cpu_s=60) as pool:
        yield pool


class Committed(Node):
    """A node that hears reports, too: its receiver, and the intake of what that keeps."""

    def listens(self, start) -> "Committed":
        self.receiver = start(tenants=self.settings.tenants)
        self.committing = Committing(self.engine, self.settings, self.sandbox)
        return self

    def intake(self) -> int:
        return self.committing.take(self.receiver.box.folder)

    def time_passes(self) -> None:
        """As if every wait were over."""
        self.forget_waiting()
        with Session(self.engine) as session, session.begin():
            session.execute(update(CommitmentRow).values(run_after=func.now()))

    def asks(self) -> None:
        self.time_passes()
        self.deliverer.run_once()

    def commitments(self) -> list[CommitmentRow]:
        with Session(self.engine) as session:
            return list(session.scalars(select(CommitmentRow).order_by(CommitmentRow.id)))

    def states(self) -> list[str]:
        return [row.state for row in self.commitments()]

    def alarms(self) -> list[EventRow]:
        with Session(self.engine) as session:
            return list(
                session.scalars(select(EventRow).where(EventRow.is_alarm).order_by(EventRow.id))
            )


@pytest.fixture(autouse=True)
def _impatient(monkeypatch, request):
    """Most of these archives report on associations of their own."""
    if "association_of_the_request" not in request.node.name:
        monkeypatch.setattr(on_the_line, "LINGER_S", 0.01)


@pytest.fixture
def pacs() -> Iterator[VouchingPacs]:
    with VouchingPacs() as peer:
        yield peer


@pytest.fixture
def node(engine, settings, sandbox, pacs) -> Iterator[Committed]:
    found = Committed(engine, settings, sandbox)
    found.sends_to(destination(pacs.port, commitment=True))
    with receivers(found.data_dir) as start:
        found.listens(start)
        pacs.reports_to = found.receiver.port
        yield found


@pytest.fixture
def result_id(node) -> uuid.UUID:
    """Of a positive result that the archive has accepted."""
    analysis_id = node.study()
    found = node.found(analysis_id)
    node.deliverer.run_once()
    assert node.state(analysis_id) == AnalysisState.DELIVERED
    return found


def analysis_of(node, result_id) -> int:
    return node.delivery(result_id).analysis_id


def test_what_the_archive_vouches_for_is_committed(node, pacs, result_id):
    assert pacs.asked == []  # it may still be filing what it has accepted
    node.asks()
    assert node.states() == ["ASKED"]
    assert pacs.heard == [0x0000]
    assert node.intake() == 1

    (row,) = node.commitments()
    (asked,) = pacs.asked
    accepted = {(str(d.SOPClassUID), str(d.SOPInstanceUID)) for d in pacs.received}
    assert row.state == "COMMITTED"
    assert {
        (str(one.ReferencedSOPClassUID), str(one.ReferencedSOPInstanceUID))
        for one in asked.ReferencedSOPSequence
    } == accepted
    assert asked.TransactionUID == row.transaction_uid
    assert node.events()[-1] == "result_committed"
    assert node.alarms() == []
    assert scan(node.receiver.box.folder, kind="report") == []


def test_h35_what_the_archive_does_not_vouch_for_is_sent_again_and_seen(node, pacs, result_id):
    pacs.reason, pacs.fails = 0x0112, frozenset({SC})
    first = list(zip(pacs.instances, map(hashlib.sha256, pacs.raw), strict=True))
    assert len(first) == 6
    node.asks()
    node.intake()

    assert node.state(analysis_of(node, result_id)) == AnalysisState.BUILT
    (row,) = node.commitments()
    assert (row.state, set(row.failed.values()), len(row.failed)) == ("FAILED", {"0x0112"}, 4)
    (alarm,) = node.alarms()
    assert (alarm.kind, alarm.detail["n_objects"]) == ("commitment_failed", 4)

    pacs.reason = 0
    before = {hashlib.sha256(body).digest() for body in pacs.raw}
    node.deliverer.run_once()

    assert node.state(analysis_of(node, result_id)) == AnalysisState.DELIVERED
    again = pacs.received[6:]
    assert [str(d.SOPClassUID) for d in again] == [SC] * 4
    assert {hashlib.sha256(body).digest() for body in pacs.raw[6:]} <= before
    node.asks()
    node.intake()
    assert node.states() == ["FAILED", "COMMITTED"]


def test_a_report_on_the_association_of_the_request_is_heard(node, pacs, result_id):
    pacs.reports_to = None

    node.asks()

    assert pacs.heard == [0x0000]
    assert node.states() == ["COMMITTED"]


def test_an_instance_that_the_report_passes_over_is_not_vouched_for(node, pacs, result_id):
    pacs.is_silent = True
    node.asks()
    (row,) = node.commitments()
    one = next(iter(row.items))

    said = Transaction(
        row.transaction_uid, tuple(Item("1.2", uid) for uid in row.items if uid != one)
    )
    with Session(node.engine) as session, session.begin():
        assert commitment.take_report(session, "north", ("pacs",), said)

    (row,) = node.commitments()
    assert row.failed == {one: "0x0110"}


def test_an_instance_that_a_report_names_twice_is_not_vouched_for(node, pacs, result_id):
    """Some archives repeat the request, and add what failed."""
    said = Transaction(
        "1.2.3", (Item(SC, "1.2.4"), Item(SC, "1.2.5"), Item(SC, "1.2.4", failure=0x0110))
    )

    assert (said.kept, said.failed) == ({"1.2.5"}, {"1.2.4": 0x0110})


def test_a_report_may_be_faster_than_the_answer_to_the_request(node, pacs, result_id):
    node.time_passes()
    with Session(node.engine) as session, session.begin():
        claimed = commitment.claim_due(session, "north", "pacs")
    with Session(node.engine) as session, session.begin():
        commitment.take_report(session, "north", ("pacs",), claimed.transaction)
    with Session(node.engine) as session, session.begin():
        commitment.note_asked(session, claimed)

    assert node.states() == ["COMMITTED"]


@pytest.mark.parametrize("stranger", ["tenant", "title", "transaction"])
def test_what_nobody_was_asked_changes_nothing(node, pacs, result_id, stranger):
    pacs.is_silent = True
    node.asks()
    (row,) = node.commitments()
    uid = "1.2.3" if stranger == "transaction" else row.transaction_uid
    said = Transaction(uid, tuple(Item(c, u, 0x0112) for u, c in row.items.items()))

    with Session(node.engine) as session, session.begin():
        was_asked = commitment.take_report(
            session,
            "south" if stranger == "tenant" else "north",
            ("other",) if stranger == "title" else ("pacs",),
            said,
        )

    assert not was_asked
    assert node.states() == ["ASKED"]


def test_the_same_report_again_changes_nothing(node, pacs, result_id):
    pacs.reason = 0x0112
    node.asks()
    pacs.report(pacs.asked[0])

    assert node.intake() == 2

    assert node.states() == ["FAILED"]
    assert len(node.alarms()) == 1
    assert node.delivery(result_id).state == DeliveryState.WAITING


def test_an_archive_that_will_not_be_asked_leaves_it_sent_and_is_seen(node, pacs, result_id):
    pacs.status = 0x0122  # SOP class not supported

    node.asks()

    (row,) = node.commitments()
    assert (row.state, row.error_code) == ("REFUSED", "0x0122")
    assert node.state(analysis_of(node, result_id)) == AnalysisState.DELIVERED
    assert [alarm.kind for alarm in node.alarms()] == ["commitment_refused"]


def test_an_archive_without_the_service_is_seen_too(node):
    with Pacs() as plain:
        node.sends_to(destination(plain.port, commitment=True))
        node.found(node.study())
        node.deliverer.run_once()
        node.asks()

    (row,) = node.commitments()
    assert (row.state, row.error_code) == ("REFUSED", "context_refused")


def test_an_archive_that_is_short_of_something_is_asked_again(node, pacs, result_id):
    pacs.status = 0x0213  # no resources
    node.asks()
    (row,) = node.commitments()
    assert (row.state, row.error_code, row.attempts) == ("WANTED", "0x0213", 0)

    pacs.status = 0x0000
    node.asks()
    node.intake()

    assert node.states() == ["COMMITTED"]


def test_an_archive_that_is_away_is_asked_when_it_is_back(node, pacs, result_id):
    pacs.go_down()
    node.asks()
    (row,) = node.commitments()
    assert (row.state, row.error_code) == ("WANTED", "no_connection")

    pacs.come_back()
    node.asks()
    node.intake()

    assert node.states() == ["COMMITTED"]
    assert node.alarms() == []


def test_an_archive_that_hangs_up_on_a_request_may_still_report_on_it(node, pacs, result_id):
    pacs.hangs_up = True
    node.asks()
    (row,) = node.commitments()
    assert (row.state, row.error_code, row.attempts) == ("ASKED", "no_answer", 1)
    node.deliverer.run_once()
    assert len(pacs.asked) == 1  # it is not asked anew at once, under another transaction

    pacs.report(pacs.asked[0])
    node.intake()

    assert node.states() == ["COMMITTED"]


def test_the_longer_an_archive_cannot_take_a_request_the_longer_it_is_left_alone(
    node, pacs, result_id
):
    pacs.status = 0x0213
    waits = []
    for age in (dt.timedelta(minutes=1), dt.timedelta(minutes=20), dt.timedelta(days=5)):
        with Session(node.engine) as session, session.begin():
            session.execute(update(CommitmentRow).values(created_at=func.now() - age))
        node.asks()
        (row,) = node.commitments()
        with Session(node.engine) as session:
            waits.append((row.run_after - session.scalar(select(func.now()))).total_seconds())

    assert 10 < waits[0] <= 30
    assert 270 < waits[1] <= 310
    assert 870 < waits[2] <= 900


def test_what_has_waited_longest_is_asked_first(node, pacs, result_id):
    """An archive that answers none of them hears of each."""
    node.found(node.study(salt="another"))
    node.deliverer.run_once()
    older, newer = node.commitments()
    node.forget_waiting()
    with Session(node.engine) as session, session.begin():
        for row, waited_s in ((older, 1), (newer, 60)):
            session.execute(
                update(CommitmentRow)
                .where(CommitmentRow.id == row.id)
                .values(run_after=func.now() - dt.timedelta(seconds=waited_s))
            )

    with Session(node.engine) as session, session.begin():
        claimed = commitment.claim_due(session, "north", "pacs")

    assert claimed.id == newer.id


def test_where_no_report_comes_it_is_asked_again_and_at_last_given_up_aloud(node, pacs, result_id):
    pacs.is_silent = True
    for n in range(1, MAX_REQUESTS + 1):
        node.asks()
        assert (len(pacs.asked), node.states()) == (n, ["ASKED"])
        node.time_passes()
        node.deliverer.sweep()

    (row,) = node.commitments()
    assert (row.state, row.error_code) == ("UNANSWERED", "no_report")
    assert len({asked.TransactionUID for asked in pacs.asked}) == MAX_REQUESTS
    assert [alarm.kind for alarm in node.alarms()] == ["commitment_unanswered"]
    assert node.state(analysis_of(node, result_id)) == AnalysisState.DELIVERED

    pacs.report(pacs.asked[-1])  # late, and still good to know
    node.intake()
    assert node.states() == ["COMMITTED"]


def test_h35_five_failures_end_it_in_part(node, pacs, result_id):
    pacs.reason = 0x0110
    for _ in range(MAX_FAILURES):
        assert node.state(analysis_of(node, result_id)) != AnalysisState.DELIVERED_IN_PART
        node.asks()  # sent again
        node.asks()  # and asked for
        node.intake()

    assert node.states() == ["FAILED"] * MAX_FAILURES
    assert node.state(analysis_of(node, result_id)) == AnalysisState.DELIVERED_IN_PART
    delivery = node.delivery(result_id)
    assert (delivery.state, delivery.error_code) == ("REFUSED", "not_committed")
    assert len(pacs.received) == 6 * MAX_FAILURES
    node.asks()
    assert len(pacs.received) == 6 * MAX_FAILURES


def test_only_the_first_failure_is_mended_at_once(node, pacs, result_id):
    pacs.reason = 0x0110
    node.asks()
    node.intake()
    node.deliverer.run_once()
    assert len(pacs.received) == 12
    node.asks()
    node.intake()

    node.deliverer.run_once()

    assert len(pacs.received) == 12  # the second time it waits, as what is refused


def test_what_was_taken_back_is_neither_asked_for_nor_sent_again(node, pacs, result_id):
    analysis_id = analysis_of(node, result_id)
    node.asks()  # its report fails it, and waits at the receiver
    with Session(node.engine) as session, session.begin():
        withdrawals.withdraw(
            session, analysis_id, actor="admin", reason=WithdrawalReason.PATIENT_SAFETY
        )
    node.deliverer.run_once()
    n_received, n_asked = len(pacs.received), len(pacs.asked)
    assert n_received == 7  # with the note

    pacs.reason = 0x0112
    pacs.report(pacs.asked[0])
    with Session(node.engine) as session, session.begin():
        session.execute(update(CommitmentRow).values(state="ASKED", finished_at=None))
    node.intake()
    node.asks()

    assert len(pacs.received) == n_received
    assert len(pacs.asked) == n_asked  # nobody is asked to keep a rejection note
    assert node.state(analysis_id) == AnalysisState.WITHDRAWN


def test_a_withdrawal_ends_a_request_that_was_not_made_yet(node, pacs, result_id):
    with Session(node.engine) as session, session.begin():
        withdrawals.withdraw(
            session,
            analysis_of(node, result_id),
            actor="admin",
            reason=WithdrawalReason.QUALITY,
        )

    node.asks()

    assert node.states() == ["OVERTAKEN"]
    assert pacs.asked == []


def test_an_older_result_is_not_sent_again_behind_a_newer_one(node, pacs, result_id):
    node.asks()
    pacs.reason = 0x0112
    newer = node.revised(analysis_of(node, result_id))
    node.deliverer.run_once()
    n_received = len(pacs.received)
    with Session(node.engine) as session, session.begin():
        session.execute(
            update(CommitmentRow).where(CommitmentRow.state == "ASKED").values(finished_at=None)
        )
    for item in scan(node.receiver.box.folder, kind="report"):
        item.path.unlink()
    pacs.report(pacs.asked[0])

    node.intake()
    node.forget_waiting()
    node.deliverer.run_once()

    assert node.states()[0] == "FAILED"
    assert node.delivery(result_id).state == node.delivery(newer).state == "DELIVERED"
    assert len(pacs.received) == n_received


def test_a_resend_by_hand_is_asked_for_anew_and_an_old_report_means_nothing(node, pacs, result_id):
    pacs.is_silent = True
    node.asks()
    with Session(node.engine) as session, session.begin():
        operator.resend(session, analysis_of(node, result_id), actor="admin")
    node.deliverer.run_once()
    assert node.states() == ["OVERTAKEN", "WANTED"]
    pacs.reason = 0x0112
    pacs.report(pacs.asked[0])
    node.intake()

    assert node.states() == ["OVERTAKEN", "WANTED"]
    assert node.delivery(result_id).state == "DELIVERED"


def test_what_was_accepted_of_a_refused_result_is_asked_for_as_well(node, pacs):
    pacs.answers[SC] = 0xC000
    result_id = node.found(node.study())
    for _ in range(5):
        node.forget_waiting()
        node.deliverer.run_once()
    assert node.delivery(result_id).state == DeliveryState.REFUSED

    node.asks()

    (asked,) = pacs.asked
    assert len(asked.ReferencedSOPSequence) == 2  # report and key objects


def test_an_analysis_that_has_moved_on_stays_where_it_is(node, pacs, result_id):
    pacs.reason = 0x0112
    node.asks()
    analysis_id = analysis_of(node, result_id)
    node.given_up(analysis_id)

    node.intake()
    node.deliverer.run_once()

    assert node.state(analysis_id) == AnalysisState.FAILED
    assert len(pacs.received) == 12  # and what is lacking goes there all the same


def test_nobody_is_asked_where_it_is_not_configured(node, pacs):
    node.sends_to(destination(pacs.port))
    node.found(node.study())
    node.deliverer.run_once()
    node.asks()

    assert node.commitments() == []


def test_a_report_comes_in_while_the_database_is_away(node, pacs, result_id):
    """It is kept by the receiver, which does not know the database."""
    node.asks()

    (item,) = scan(node.receiver.box.folder, kind="report")
    assert item.path.is_file()
    assert pacs.heard == [0x0000]


def test_a_destination_that_is_not_to_commit_may_not_report(node, pacs, result_id):
    plain = Tenant(id="north", ae_titles=("NORTH_AI",), destinations=(destination(pacs.port),))
    node.asks()
    node.receiver.door.reload((plain,))

    pacs.report(pacs.asked[0])

    assert pacs.heard == [0x0000, -1]


def test_web_roles_see_their_own_commitments(node, pacs, result_id, web_engine):
    def seen(role: str, tenant: str) -> int:
        with web_engine.begin() as connection:
            connection.execute(text("SELECT set_config('vigil.role', :r, true)"), {"r": role})
            connection.execute(text("SELECT set_config('vigil.tenant', :t, true)"), {"t": tenant})
            return connection.scalar(text("SELECT count(*) FROM commitments"))

    assert [seen("admin", ""), seen("reader", "north"), seen("reader", "south")] == [1, 1, 0]


def test_an_unreadable_report_is_told_and_does_not_stop_the_next(node, pacs, result_id):
    node.asks()
    box = node.receiver.box
    (item,) = scan(box.folder, kind="report")
    box.keep(read_provenance(item.path), b"\x08\x00\x99\x11garbage", "report")

    assert node.intake() == 2

    assert node.states() == ["COMMITTED"]
    assert [alarm.kind for alarm in node.alarms()] == ["commitment_unreadable"]


def test_h35_orthanc_vouches_and_gets_again_what_it_lost(engine, settings, sandbox, tmp_path):
    need("Orthanc")
    port, http = free_port(), free_port()
    url = f"http://127.0.0.1:{http}"
    node = Committed(engine, settings, sandbox)
    node.sends_to(destination(port, commitment=True, ae_title="NORTH_PACS"))
    with receivers(node.data_dir) as start:
        node.listens(start)
        pacs = OrthancPacs(tmp_path / "orthanc", port, http)
        try:
            vigil = {"AET": "NORTH_AI", "Host": "127.0.0.1", "Port": node.receiver.port}
            rest(f"{url}/modalities/vigil", vigil, "PUT")
            node.found(node.study())
            node.deliverer.run_once()
            first, *others = rest(f"{url}/instances")
            assert len(others) == 5
            rest(f"{url}/instances/{first}", method="DELETE")
            node.asks()
            wait_until(lambda: node.intake() == 1)
            assert node.states() == ["FAILED"]

            node.asks()
            node.asks()
            wait_until(lambda: node.intake() == 1)
            again = rest(f"{url}/instances")
        finally:
            pacs.close()

    assert node.states() == ["FAILED", "COMMITTED"]
    (row, _) = node.commitments()
    assert set(row.failed.values()) == {"0x0112"}  # no such instance
    assert set(again) == {first, *others}


def rest(url: str, body: object = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read() or b"{}")
