"""Withdrawing what is out: a note to a real PACS, and nothing withdrawn is ever sent again."""

import threading
from collections.abc import Iterator

import pytest
from pydicom import Dataset
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from config.settings import Settings
from db import dispatch, operator, withdrawals
from db.errors import IllegalMove
from db.sandbox import Sandbox
from db.study import AnalysisEvent, WithdrawalReason
from db.tables import AuditRow, DeliveryRow, EventRow, JobRow, StudyRow, WithdrawalRow
from db.withdrawals import BadWords, Done
from tests.delivery import Node, destination, running, wait_until
from tests.peers import Pacs

KOS = "1.2.840.10008.5.1.4.1.1.88.59"
SR_3D = "1.2.840.10008.5.1.4.1.1.88.34"
SC = "1.2.840.10008.5.1.4.1.1.7"


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


def withdraw(
    node: Node, analysis_id: int, reason=WithdrawalReason.PATIENT_SAFETY, words=""
) -> Done:
    with Session(node.engine) as session, session.begin():
        return withdrawals.withdraw(session, analysis_id, actor="admin", reason=reason, words=words)


def title(built: Dataset) -> str:
    return str(built.ConceptNameCodeSequence[0].CodeValue) if built.Modality == "KO" else ""


def notes(pacs: Pacs) -> list[Dataset]:
    return [one for one in pacs.received if title(one) in ("113037", "113001")]


def named(note: Dataset) -> list[str]:
    """SOP Instance UIDs that a note refers to, in its tree."""
    return [
        str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for item in note.ContentSequence
        if item.ValueType in ("IMAGE", "COMPOSITE")
    ]


def items(document: Dataset) -> Iterator[Dataset]:
    for item in document.get("ContentSequence", ()):
        yield item
        yield from items(item)


def said(document: Dataset) -> str:
    """Its description, or every text of a report."""
    return "\n".join(
        item.TextValue
        for item in items(document)
        if item.get("ValueType") == "TEXT"
        and (document.Modality == "SR" or item.ConceptNameCodeSequence[0].CodeValue == "113012")
    )


def in_evidence(note: Dataset) -> set[str]:
    (study,) = note.CurrentRequestedProcedureEvidenceSequence
    assert study.StudyInstanceUID == note.StudyInstanceUID
    return {
        str(one.ReferencedSOPInstanceUID)
        for series in study.ReferencedSeriesSequence
        for one in series.ReferencedSOPSequence
    }


def set_study(node: Node, **values: object) -> None:
    with Session(node.engine) as session, session.begin():
        session.execute(update(StudyRow).values(**values))


def delivered(node: Node) -> int:
    analysis_id = node.study()
    node.found(analysis_id)
    node.deliverer.run_once()
    assert node.state(analysis_id) == "DELIVERED"
    return analysis_id


def test_h3_what_is_out_is_rejected_by_name_under_the_identity_it_was_sent_under(node, pacs):
    analysis_id = delivered(node)
    sent = list(pacs.received)
    set_study(node, is_held=True, patient_id="OTHER-9", patient_name="Corrected^Name")

    done = withdraw(node, analysis_id, words="wrong patient")
    node.deliverer.run_once()

    assert done.destinations == ("pacs",)
    (note,) = notes(pacs)
    assert pacs.received[-1] is note
    assert (note.SOPClassUID, note.SeriesNumber, note.InstanceNumber) == (KOS, 9914, 1)
    assert (note.PatientID, note.PatientName) == (sent[0].PatientID, sent[0].PatientName)
    assert note.StudyInstanceUID == sent[0].StudyInstanceUID
    assert note.SeriesInstanceUID not in {one.SeriesInstanceUID for one in sent}
    assert title(note) == "113037"
    assert named(note) == [one.SOPInstanceUID for one in sent]
    assert in_evidence(note) == set(named(note))
    assert said(note) == "ICH AI result withdrawn. wrong patient"
    assert node.state(analysis_id) == "WITHDRAWN"
    assert node.events()[-2:] == ["withdrawn", "rejection_delivered"]
    with Session(node.engine) as session:
        (audit,) = session.scalars(select(AuditRow))
        assert (audit.actor, audit.action) == ("admin", "withdraw")
        assert audit.detail["destinations"] == ["pacs"]


def test_a_title_of_quality_says_so_and_why(node, pacs):
    withdraw(node, delivered(node), WithdrawalReason.QUALITY)
    node.deliverer.run_once()

    (note,) = notes(pacs)
    assert title(note) == "113001"
    modifier = note.ContentSequence[0]
    assert modifier.RelationshipType == "HAS CONCEPT MOD"
    assert modifier.ConceptNameCodeSequence[0].CodeValue == "113011"
    assert modifier.ConceptCodeSequence[0].CodeValue == "111220"


def test_each_destination_is_told_of_what_it_has_and_no_other_is_told(node, pacs):
    with Pacs(refuses=(SC,)) as reports_only, Pacs() as away:
        node.sends_to(
            destination(pacs.port),
            destination(reports_only.port, "reports"),
            destination(away.port, "away"),
        )
        away.go_down()
        analysis_id = node.study()
        node.found(analysis_id)
        node.deliverer.run_once()

        done = withdraw(node, analysis_id)
        away.come_back()
        node.forget_waiting()
        node.deliverer.run_once()

        assert done.destinations == ("pacs", "reports")
        assert away.received == []
        for peer, modalities in ((pacs, ["OT"] * 4 + ["SR", "KO"]), (reports_only, ["SR", "KO"])):
            (note,) = notes(peer)
            sent = [one for one in peer.received if one is not note]
            assert [one.Modality for one in sent] == modalities
            assert named(note) == [one.SOPInstanceUID for one in sent]
        assert notes(pacs)[0].SOPInstanceUID != notes(reports_only)[0].SOPInstanceUID


def test_the_same_bytes_go_until_they_arrive(node, pacs):
    analysis_id = delivered(node)
    withdraw(node, analysis_id)
    pacs.answers = {KOS: 0xA700}
    node.deliverer.run_once()
    set_study(node, patient_id="CORRECTED", study_instance_uid="2.25.9")
    pacs.answers = {}
    node.forget_waiting()

    node.deliverer.run_once()
    node.forget_waiting()
    node.deliverer.run_once()

    first, second = [
        raw for raw, one in zip(pacs.raw, pacs.received, strict=True) if one in notes(pacs)
    ]
    assert first == second
    assert node.state(analysis_id) == "WITHDRAWN"


@pytest.mark.parametrize("built", [False, True])
def test_h8_what_was_not_sent_yet_never_is(node, pacs, built):
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    if built:
        node.builds()

    assert withdraw(node, analysis_id).destinations == ()
    node.deliverer.run_once()

    assert pacs.received == []
    assert node.state(analysis_id) == "WITHDRAWN"
    if built:
        assert node.delivery(result_id).state == "WITHDRAWN"
    with Session(node.engine) as session:
        assert session.scalar(select(func.count()).where(DeliveryRow.state == "WAITING")) == 0
        assert session.scalar(select(func.count()).where(JobRow.state == "TODO")) == 0


def test_h8_a_part_sent_result_is_stopped_and_what_arrived_is_rejected(node, pacs):
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    pacs.answers = {SR_3D: 0xA700}
    node.deliverer.run_once()
    sent = [one.SOPInstanceUID for one in pacs.received if one.Modality == "OT"]

    withdraw(node, analysis_id)
    pacs.answers = {}
    node.forget_waiting()
    node.deliverer.run_once()

    (note,) = notes(pacs)
    assert named(note) == sent
    assert [one.Modality for one in pacs.received] == ["OT"] * 4 + ["SR", "KO"]
    assert node.delivery(result_id).state == "WITHDRAWN"


def test_h8_what_is_on_the_line_is_the_last_of_it_and_is_rejected_too(node, pacs):
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    pacs.stalls, pacs.stalls_after = True, 2
    with running(node.deliverer):
        assert pacs.is_stalled.wait(120)
        withdraw(node, analysis_id)
        assert node.claim(worker="other") is None  # the note waits for what is on the line
        pacs.let_go()
        wait_until(lambda: len(notes(pacs)) == 1, 120)

    (note,) = notes(pacs)
    assert len(named(note)) == 3
    assert set(named(note)[:2]) <= pacs.instances
    assert node.delivery(result_id).state == "WITHDRAWN"
    assert len(pacs.received) == 3  # two of them, and the note; the third was answered unseen


def test_h8_a_study_that_is_held_in_mid_send_goes_no_further_until_that_is_decided(node, pacs):
    analysis_id = node.study()
    node.found(analysis_id)
    pacs.stalls, pacs.stalls_after = True, 2
    with running(node.deliverer):
        assert pacs.is_stalled.wait(120)
        set_study(node, is_held=True)
        pacs.let_go()
        wait_until(lambda: delivery_states(node) == ["WAITING"], 120)
    assert len(pacs.received) == 2

    set_study(node, is_held=False)
    node.deliverer.run_once()

    assert node.state(analysis_id) == "DELIVERED"
    assert len(pacs.received) == 5


def delivery_states(node: Node) -> list[str]:
    with Session(node.engine) as session:
        return list(session.scalars(select(DeliveryRow.state).order_by(DeliveryRow.id)))


def test_what_may_have_arrived_stands_in_a_note_of_its_own_that_goes_last(node, pacs):
    analysis_id = node.study()
    node.found(analysis_id)
    pacs.aborts_after = 3  # the fourth is on its way when the line breaks
    node.deliverer.run_once()
    sure = [one.SOPInstanceUID for one in pacs.received]
    pacs.aborts_after = None

    withdraw(node, analysis_id)
    node.forget_waiting()
    node.deliverer.run_once()

    certain, doubtful = notes(pacs)
    assert named(certain) == sure
    assert len(named(doubtful)) == 1
    assert not set(named(doubtful)) & set(sure)
    assert said(certain) == "ICH AI result withdrawn."
    assert "not known whether this arrived" in said(doubtful)
    assert [certain.InstanceNumber, doubtful.InstanceNumber] == [1, 2]


def test_a_sender_that_died_leaves_no_withdrawn_result_waiting(node, pacs):
    analysis_id = node.study()
    result_id = node.found(analysis_id)
    node.builds()
    delivery = node.claim()
    with Session(node.engine) as session, session.begin():
        uid = "1.2.3"
        assert dispatch.begin(session, delivery, uid)

    done = withdraw(node, analysis_id)
    with Session(node.engine) as session, session.begin():
        session.execute(update(DeliveryRow).values(lease_until=func.now() - func.make_interval(1)))
    node.deliverer.run_once()

    assert done.destinations == ("pacs",)
    assert node.delivery(result_id).state == "WITHDRAWN"
    assert pacs.received == []  # nothing of ours goes by that UID, so there is nothing to name
    assert delivery_states(node) == ["WITHDRAWN", "DROPPED"]


def test_a_withdrawn_result_cannot_be_sent_again(node, pacs):
    analysis_id = delivered(node)
    withdraw(node, analysis_id)
    node.deliverer.run_once()
    n = len(pacs.received)

    with pytest.raises(IllegalMove, match="withdrawn"), Session(node.engine) as session:
        operator.resend(session, analysis_id, actor="admin")
    with pytest.raises(IllegalMove, match=r"withdrawn already, .* by admin"):
        withdraw(node, analysis_id)
    node.forget_waiting()
    node.deliverer.run_once()

    assert len(pacs.received) == n


def test_a_rerun_makes_a_result_that_replaces_nothing_and_says_what_was_withdrawn(node, pacs):
    analysis_id = delivered(node)
    withdraw(node, analysis_id)

    node.revised(analysis_id)
    node.deliverer.run_once()

    *_, report, _ = pacs.received
    assert title(pacs.received[6]) == "113037"  # the note goes before what is newer
    assert report.Modality == "SR"
    assert "PredecessorDocumentsSequence" not in report
    assert report.SeriesNumber == 9923
    assert "REVISION 3 - AI result of 2026-03-01 13:05 UTC withdrawn" in said(report)
    assert "replaces" not in said(report)
    assert node.state(analysis_id) == "DELIVERED"


def test_a_second_withdrawal_rejects_only_what_the_first_did_not(node, pacs):
    analysis_id = delivered(node)
    withdraw(node, analysis_id)
    node.revised(analysis_id)
    node.deliverer.run_once()
    newer = [one.SOPInstanceUID for one in pacs.received[7:]]

    withdraw(node, analysis_id)
    node.deliverer.run_once()

    assert named(notes(pacs)[1]) == newer


def test_every_result_that_still_stands_is_rejected_in_a_note_of_its_own(node, pacs):
    analysis_id = delivered(node)
    node.revised(analysis_id)
    node.deliverer.run_once()

    withdraw(node, analysis_id)
    node.deliverer.run_once()

    first, second = notes(pacs)
    assert [*named(first), *named(second)] == [one.SOPInstanceUID for one in pacs.received[:12]]
    assert first.SeriesInstanceUID == second.SeriesInstanceUID


def test_a_pacs_that_takes_no_notes_holds_up_no_newer_result_and_is_told_again_on_request(node):
    with Pacs(refuses=(KOS,)) as pacs:
        node.sends_to(destination(pacs.port))
        analysis_id = node.study()
        node.found(analysis_id)
        for _ in range(5):
            node.deliverer.run_once()
            node.forget_waiting()
        withdraw(node, analysis_id)
        node.revised(analysis_id)

        node.deliverer.run_once()
        assert len([one for one in pacs.received if one.Modality == "SR"]) == 2
        for _ in range(5):
            node.forget_waiting()
            node.deliverer.run_once()
        with Session(node.engine) as session:
            refused = session.scalars(
                select(EventRow).where(EventRow.kind == "delivery_refused").order_by(EventRow.id)
            ).all()
        assert "rejection note" in [row.detail.get("what") for row in refused if row.is_alarm]

        done = withdraw(node, analysis_id)

    assert done.again == ("pacs",)


def test_whatever_is_under_way_is_void(node, pacs):
    """Late slices have opened it again, a run is queued: the old result is out all the same."""
    analysis_id = delivered(node)
    node.move(analysis_id, AnalysisEvent.RERUN)

    withdraw(node, analysis_id)
    node.deliverer.run_once()

    assert len(notes(pacs)) == 1
    assert node.state(analysis_id) == "WITHDRAWN"
    with Session(node.engine) as session:
        assert session.scalar(select(func.count()).where(JobRow.state == "TODO")) == 0


def test_a_notice_is_taken_back_as_a_result_is(node, pacs):
    analysis_id = delivered(node)
    node.given_up(analysis_id, destination(pacs.port))

    done = withdraw(node, analysis_id)
    node.deliverer.run_once()

    assert len(done.results) == 2
    assert len(notes(pacs)) == 1  # nothing of the notice had gone


def test_nothing_can_be_withdrawn_before_there_is_something(node, pacs):
    analysis_id = node.study()

    with pytest.raises(IllegalMove, match="nothing was issued yet"):
        withdraw(node, analysis_id)

    assert node.state(analysis_id) == "QUEUED"


@pytest.mark.parametrize("words", ["Grüße", "a\nb", "x" * 1025])
def test_words_that_a_note_cannot_hold_are_refused_and_nothing_happens(node, pacs, words):
    analysis_id = delivered(node)

    with pytest.raises(BadWords):
        withdraw(node, analysis_id, words=words)

    assert node.state(analysis_id) == "DELIVERED"
    with Session(node.engine) as session:
        assert session.scalars(select(WithdrawalRow)).all() == []


def test_two_operators_at_once_withdraw_once(node, pacs):
    analysis_id = delivered(node)
    outcomes: list[str] = []

    def act() -> None:
        try:
            withdraw(node, analysis_id)
            outcomes.append("done")
        except IllegalMove:
            outcomes.append("refused")

    threads = [threading.Thread(target=act) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    node.deliverer.run_once()

    assert sorted(outcomes) == ["done", "refused"]
    assert len(notes(pacs)) == 1
