"""One association with a destination, over loopback against a real SCP (H33, H34)."""

import hashlib
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from db.answers import is_delivered
from dicom_sr.association import Peer
from dicom_sr.build import build_objects
from dicom_sr.plan import SR_CLASSES, Context, Variant
from dicom_sr.push import Answer, ObjectsGone, Outcome, Parcel, answer_for, push
from tests.findings import by_index, make_finding, make_maps, make_pixels, synthetic_headers
from tests.peers import Pacs

SC = "1.2.840.10008.5.1.4.1.1.7"
KO = "1.2.840.10008.5.1.4.1.1.88.59"
ALL_REPORTS = tuple(SR_CLASSES.values())


def built(folder: Path, **variant: object) -> list[Parcel]:
    headers = synthetic_headers()
    finding = make_finding(headers, keys=(2,))
    objects = build_objects(
        finding,
        by_index(headers),
        make_pixels(finding),
        make_maps(finding),
        Context("north", 1, "0.1.0", "vigil-1"),
        Variant(**variant),  # type: ignore[arg-type]
    )
    parcels = []
    for one in objects:
        path = folder / f"{one.sop_instance_uid}.dcm"
        path.write_bytes(one.data)
        uids = (one.sop_class_uid, one.sop_instance_uid, one.transfer_syntax_uid)
        parcels.append(Parcel(one.role, *uids, path, hashlib.sha256(one.data).hexdigest()))
    return parcels


@pytest.fixture(scope="module")
def parcels(tmp_path_factory) -> list[Parcel]:
    return built(tmp_path_factory.mktemp("objects"), sr_classes=ALL_REPORTS)


def peer(port: int, **changes: object) -> Peer:
    return Peer(
        host="127.0.0.1",
        port=port,
        ae_title="PACS",
        calling_ae="NORTH_AI",
        **{"connect_timeout_s": 2.0, "acse_timeout_s": 2.0, "dimse_timeout_s": 2.0, **changes},
    )  # type: ignore[arg-type]


def outcomes(parcels: list[Parcel], answers: dict[str, Answer]) -> dict[str, Outcome]:
    return {
        p.role: answers[p.sop_instance_uid].outcome
        for p in parcels
        if p.sop_instance_uid in answers
    }


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.is_alive()]
    for thread in left:
        thread.join(5)
    assert not [t for t in left if t.is_alive()]


def test_objects_arrive_in_order_and_as_they_were_built(parcels):
    with Pacs() as pacs:
        sent = push(peer(pacs.port), parcels)

    assert sent.error == ""
    assert {a.outcome for a in sent.answers.values()} == {Outcome.ACCEPTED}
    assert [str(d.SOPInstanceUID) for d in pacs.received] == [
        p.sop_instance_uid for p in parcels if p.sop_class_uid not in ALL_REPORTS[1:]
    ]
    assert pacs.calling == ["NORTH_AI"]
    for raw, received in zip(pacs.raw, pacs.received, strict=True):
        whole = next(p for p in parcels if p.sop_instance_uid == received.SOPInstanceUID).path
        assert whole.read_bytes().endswith(raw)


def test_only_what_is_sent_is_proposed(tmp_path):
    parcels = built(tmp_path, roles=("summary", "sr"))

    with Pacs() as pacs:
        push(peer(pacs.port), parcels)

    assert pacs.proposed == [[SC, SR_CLASSES["3d"]]]


@pytest.mark.parametrize(
    ("refused", "sent_class"),
    [
        ((), SR_CLASSES["3d"]),
        ((SR_CLASSES["3d"],), SR_CLASSES["comprehensive"]),
        ((SR_CLASSES["3d"], SR_CLASSES["comprehensive"]), SR_CLASSES["enhanced"]),
    ],
)
def test_h33_the_report_goes_in_the_first_class_that_is_accepted(parcels, refused, sent_class):
    with Pacs(refuses=refused) as pacs:
        sent = push(peer(pacs.port), parcels)

    reports = [d for d in pacs.received if d.Modality == "SR"]
    assert [str(d.SOPClassUID) for d in reports] == [sent_class]
    assert {a.outcome for a in sent.answers.values()} == {Outcome.ACCEPTED}


def test_h33_a_refused_class_does_not_keep_the_rest(parcels):
    with Pacs(refuses=(SC,)) as pacs:
        sent = push(peer(pacs.port), parcels)

    assert outcomes(parcels, sent.answers) == {
        "summary": Outcome.REFUSED,
        "overlay": Outcome.REFUSED,
        "sr": Outcome.ACCEPTED,
        "ko": Outcome.ACCEPTED,
    }
    assert sent.answers[parcels[0].sop_instance_uid].code == "context_refused"


def test_h33_no_class_accepted_is_a_refusal_and_not_a_broken_line(parcels):
    with Pacs(refuses=(SC, KO, *ALL_REPORTS)) as pacs:
        sent = push(peer(pacs.port), parcels)

    assert sent.error == ""
    assert {a.code for a in sent.answers.values()} == {"context_refused"}
    assert len(sent.answers) == len(parcels)


def test_h33_a_peer_that_knows_only_implicit_vr_gets_it(parcels):
    with Pacs(syntaxes=(ImplicitVRLittleEndian,)) as pacs:
        sent = push(peer(pacs.port), parcels)

    assert {a.outcome for a in sent.answers.values()} == {Outcome.ACCEPTED}
    original = pydicom.dcmread(parcels[0].path)
    assert pacs.received[0].PixelData == original.PixelData


@pytest.mark.parametrize("takes_rle", [True, False])
def test_rle_is_sent_where_it_is_taken_and_unpacked_where_not(tmp_path, takes_rle):
    parcels = built(tmp_path, is_rle=True, roles=("overlay",))
    syntaxes = (ExplicitVRLittleEndian, RLELossless) if takes_rle else (ExplicitVRLittleEndian,)

    with Pacs(syntaxes=syntaxes) as pacs:
        sent = push(peer(pacs.port), parcels)

    assert {a.outcome for a in sent.answers.values()} == {Outcome.ACCEPTED}
    (received,) = pacs.received
    assert (received.file_meta.TransferSyntaxUID == RLELossless) is takes_rle
    assert received.SOPInstanceUID == parcels[0].sop_instance_uid
    assert (received.pixel_array == pydicom.dcmread(parcels[0].path).pixel_array).all()


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0x0000, Outcome.ACCEPTED),
        (0x0111, Outcome.WARNING),
        (0xB000, Outcome.WARNING),
        (0xB006, Outcome.WARNING),
        (0xB007, Outcome.WARNING),
        (0xA700, Outcome.TRANSIENT),
        (0xA7FF, Outcome.TRANSIENT),
        (0xA900, Outcome.REFUSED),
        (0xC000, Outcome.REFUSED),
        (0x0110, Outcome.REFUSED),
        (0x0122, Outcome.REFUSED),
    ],
)
def test_h34_what_a_status_means(status, outcome):
    answer = answer_for(status)

    assert answer.outcome is outcome
    assert is_delivered(answer.code) is (outcome in (Outcome.ACCEPTED, Outcome.WARNING))


def test_a_word_is_never_a_delivery():
    assert not is_delivered("context_refused")
    assert not is_delivered("")


def test_h34_no_room_ends_the_association_at_once(parcels):
    with Pacs() as pacs:
        pacs.answer = 0xA700
        sent = push(peer(pacs.port), parcels)

    assert sent.error == "0xA700"
    assert len(pacs.received) == 1


def test_h34_a_refused_object_does_not_keep_the_rest(parcels):
    with Pacs() as pacs:
        pacs.answers = {SC: 0xC000}
        sent = push(peer(pacs.port), parcels)

    assert sent.error == ""
    assert outcomes(parcels, sent.answers) == {
        "summary": Outcome.REFUSED,
        "overlay": Outcome.REFUSED,
        "sr": Outcome.ACCEPTED,
        "ko": Outcome.ACCEPTED,
    }


def test_h34_an_abort_keeps_what_was_answered_before(parcels):
    with Pacs() as pacs:
        pacs.aborts_after = 1
        sent = push(peer(pacs.port), parcels)

    assert sent.error == "no_answer"
    assert list(sent.answers) == [parcels[0].sop_instance_uid]


def test_h34_a_peer_that_never_answers_is_left(parcels):
    with Pacs() as pacs:
        pacs.stalls = True
        sent = push(peer(pacs.port, dimse_timeout_s=0.5, min_bytes_per_s=1e9), parcels)

    assert sent.error == "no_answer"
    assert sent.answers == {}


def test_a_rejected_association_is_tried_again(parcels):
    with Pacs() as pacs:
        pacs.rejects = True
        sent = push(peer(pacs.port), parcels)

    assert (sent.error, sent.answers) == ("association_rejected", {})


def test_nobody_at_home_is_tried_again(parcels):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    assert push(peer(port), parcels).error == "no_connection"


def test_a_listener_that_says_nothing_is_left(parcels):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sent = push(peer(silent.getsockname()[1], acse_timeout_s=0.5), parcels)

    assert sent.error
    assert sent.answers == {}


def test_a_peer_that_hangs_up_is_tried_again(parcels):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            connection, _ = server.accept()
            connection.recv(6)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        sent = push(peer(server.getsockname()[1]), parcels)
        thread.join()

    assert sent.error
    assert sent.answers == {}


def test_a_host_that_does_not_resolve_is_tried_again(parcels):
    sent = push(replace(peer(104), host="no-such-host.invalid"), parcels)

    assert (sent.error, sent.answers) == ("no_connection", {})


def test_an_object_that_changed_is_never_sent(tmp_path):
    parcels = built(tmp_path, roles=("summary",))
    parcels[0].path.write_bytes(parcels[0].path.read_bytes() + b"\0")

    with Pacs() as pacs, pytest.raises(ObjectsGone):
        push(peer(pacs.port), parcels)

    assert pacs.received == []
