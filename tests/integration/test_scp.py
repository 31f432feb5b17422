"""The receiver against real peers: what it takes, what it refuses, that it says Success last."""

import contextlib
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydicom import dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt

from config.settings import ScpSettings
from config.tenants import Destination, Sender, Tenant
from db.refusals import noted
from db.spool import read_provenance, scan
from scp import tls
from scp.server import stop
from tests.builders import ct_image, ct_series
from tests.listening import receivers

# pynetdicom's requestor, our peer here, leaves an aborted line to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CT = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"
NORTH = Tenant(
    id="north",
    ae_titles=("NORTH_AI",),
    senders=(Sender(ae_title="CT1"), Sender(ae_title="FAR", hosts=("10.0.0.0/8",))),
    destinations=(Destination(name="pacs", ae_title="PACS", host="localhost", port=104),),
)
EXOTIC = {
    "JPEG baseline": "1.2.840.10008.1.2.4.50",
    "JPEG lossless SV1": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "HTJ2K": "1.2.840.10008.1.2.4.201",
    "JPEG XL": "1.2.840.10008.1.2.4.110",
    "RLE": "1.2.840.10008.1.2.5",
    "Deflated": "1.2.840.10008.1.2.1.99",
    "Big Endian": "1.2.840.10008.1.2.2",
    "GE private": "1.2.840.113619.5.2",
    "nobody's": "1.2.3.4.5",
}


@pytest.fixture
def receive(tmp_path):
    """Starts receivers with settings of one's own; all are stopped at the end."""
    with receivers(tmp_path) as start:

        def of_north(tls_context=None, tenants=(NORTH,), **more):
            return start(tls_context, tenants=tenants, **more)

        yield of_north


def associate(node, *contexts, called="NORTH_AI", calling="CT1", tls_args=None, **entity):
    ae = AE(ae_title=calling)
    for name, value in entity.items():
        setattr(ae, name, value)
    for abstract, *syntaxes in contexts or ((CT, ExplicitVRLittleEndian),):
        ae.add_requested_context(abstract, list(syntaxes) or None)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    no_delay = (evt.EVT_CONN_OPEN, lambda event: event.assoc.dul.socket.socket.setsockopt(6, 1, 1))
    return ae.associate(
        "127.0.0.1", node.port, ae_title=called, evt_handlers=[no_delay], tls_args=tls_args
    )


def waiting(node):
    return scan(node.box.folder)


def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_success_means_that_the_file_lies_in_the_spool(receive):
    node = receive()
    image = ct_image()
    peer = associate(node)

    status = peer.send_c_store(image)
    (item,) = waiting(node)
    peer.release()

    assert status.Status == 0x0000
    assert dcmread(item.path) == image
    source = read_provenance(item.path)
    assert (source.tenant, source.calling_ae, source.called_ae) == ("north", "CT1", "NORTH_AI")
    assert source.address == "127.0.0.1"
    assert source.sop_instance_uid == image.SOPInstanceUID
    assert source.transfer_syntax_uid == ExplicitVRLittleEndian


def test_h11_an_echo_is_answered(receive):
    node = receive(min_free_mb=2**40)
    peer = associate(node, (VERIFICATION,))

    assert peer.send_c_echo().Status == 0x0000

    peer.release()


def test_h11_an_echo_is_answered_while_every_slot_is_taken(receive):
    node = receive(max_associations=1)
    holder = associate(node)

    refused = associate(node)
    echo = associate(node, (VERIFICATION,))

    assert refused.is_rejected
    rejected = refused.acceptor.primitive
    assert (rejected.result, rejected.result_source, rejected.diagnostic) == (2, 3, 2)
    assert echo.send_c_echo().Status == 0x0000
    echo.release()
    holder.release()
    wait_for(lambda: associate(node).is_established)


@pytest.mark.parametrize(
    ("called", "calling", "reason"),
    [
        ("SOUTH_AI", "CT1", (1, 1, 7)),
        ("north_ai", "CT1", (1, 1, 7)),
        ("NORTH_AI", "CT2", (1, 1, 3)),
        ("NORTH_AI", "FAR", (1, 1, 3)),
    ],
)
def test_h17_refusals_say_why_and_are_noted(receive, called, calling, reason):
    node = receive()

    peer = associate(node, called=called, calling=calling)

    assert peer.is_rejected
    rejected = peer.acceptor.primitive
    assert (rejected.result, rejected.result_source, rejected.diagnostic) == reason
    (note,), _ = noted(node.box.folder)
    assert (note.calling_ae, note.called_ae, note.address) == (calling, called, "127.0.0.1")


def test_a_destination_may_echo_but_not_store(receive):
    node = receive()

    peer = associate(node, (VERIFICATION,), (CT,), calling="PACS")

    assert [cx.abstract_syntax for cx in peer.accepted_contexts] == [VERIFICATION]
    assert [cx.abstract_syntax for cx in peer.rejected_contexts] == [CT]
    peer.release()


@pytest.mark.parametrize("syntax", EXOTIC.values(), ids=EXOTIC)
def test_h12_h18_a_context_with_one_exotic_syntax_is_accepted(receive, syntax):
    node = receive()

    peer = associate(node, (CT, syntax))

    assert [cx.transfer_syntax for cx in peer.accepted_contexts] == [[syntax]]
    peer.release()


def test_h18_private_and_new_storage_classes_are_stored_and_queries_are_not(receive):
    node = receive()
    private, young = "1.3.12.2.1107.5.9.1", "1.2.840.10008.5.1.4.1.1.999.7"
    find, mpps, unknown = (
        "1.2.840.10008.5.1.4.1.2.2.1",
        "1.2.840.10008.3.1.2.3.3",
        "1.2.840.10008.9.9",
    )
    peer = associate(node, (private,), (young,), (find,), (mpps,), (unknown,))
    image = ct_image()
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = private

    status = peer.send_c_store(image)
    peer.release()

    assert {str(cx.abstract_syntax) for cx in peer.rejected_contexts} == {find, mpps, unknown}
    assert status.Status == 0x0000
    assert read_provenance(waiting(node)[0].path).sop_class_uid == private


def test_h18_the_requestors_order_of_syntaxes_decides(receive):
    node = receive()

    peer = associate(node, (CT, ImplicitVRLittleEndian, ExplicitVRLittleEndian))

    assert peer.accepted_contexts[0].transfer_syntax == [ImplicitVRLittleEndian]
    peer.release()


@pytest.mark.parametrize("size", [4096, 131072, 0])
def test_h18_pdu_sizes_of_all_kinds(receive, size):
    node = receive(max_pdu=max(size, 4096))
    peer = associate(node, maximum_pdu_size=size)

    status = peer.send_c_store(ct_image(matrix=256))
    peer.release()

    assert status.Status == 0x0000
    assert dcmread(waiting(node)[0].path).Rows == 256


def test_h18_128_contexts(receive):
    node = receive()

    peer = associate(node, *((f"1.3.12.2.1107.5.9.{n}",) for n in range(128)))

    assert len(peer.accepted_contexts) == 128
    peer.release()


def test_h39_below_the_watermark_the_answer_is_a700_and_the_association_stays(receive):
    node = receive(min_free_mb=2**40)
    peer = associate(node)

    first = peer.send_c_store(ct_image())
    node.box.min_free_mb = 0
    second = peer.send_c_store(ct_image())
    peer.release()

    assert first.Status == 0xA700
    assert second.Status == 0x0000
    assert len(waiting(node)) == 1


def test_h14_what_was_acknowledged_before_an_abort_is_kept(receive):
    node = receive()
    peer = associate(node)
    for image in ct_series(slices=3):
        peer.send_c_store(image)

    peer.abort()

    assert len(waiting(node)) == 3


def pdv(context, header, data):
    value = struct.pack(">IBB", len(data) + 2, context, header) + data
    return b"\x04\x00" + struct.pack(">I", len(value)) + value


def command(image, uid=None, **changes):
    """A C-STORE-RQ command set as bytes (PS3.7 9.3.1)."""

    def element(number, value):
        return struct.pack("<HHI", 0, number, len(value)) + value

    values = {
        0x0002: (CT + "\0").encode(),
        0x0100: struct.pack("<H", 1),
        0x0110: struct.pack("<H", 7),
        0x0700: struct.pack("<H", 0),
        0x0800: struct.pack("<H", 1),
        0x1000: (uid if uid is not None else str(image.SOPInstanceUID)).encode(),
    }
    values |= changes.get("elements", {})
    return b"".join(element(n, v + b"\0" * (len(v) % 2)) for n, v in sorted(values.items()) if v)


def encoded(image):
    body = DicomBytesIO()
    body.is_little_endian, body.is_implicit_VR = True, False
    write_dataset(body, image)
    return body.getvalue()


@contextlib.contextmanager
def answered(peer):
    """The status of what was sent by hand; the peer's own reactor must not take the answer away."""
    peer._reactor_checkpoint.clear()
    wait_for(lambda: peer._is_paused)
    answer = SimpleNamespace(status=None)
    yield answer
    answer.status = peer.dimse.get_msg(block=True)[1].Status
    peer._reactor_checkpoint.set()


def raw_socket(peer):
    return peer.dul.socket.socket


def test_h13_a_cut_line_leaves_no_half_file(receive):
    node = receive()
    image = ct_image()
    peer = associate(node)
    line = raw_socket(peer)
    line.sendall(pdv(1, 3, command(image)) + pdv(1, 0, encoded(image)[:3000]))
    wait_for(lambda: list(node.box.folder.rglob("*.part")))

    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()  # a reset

    wait_for(lambda: not list(node.box.folder.rglob("*.part")))
    assert waiting(node) == []
    again = associate(node)
    assert again.send_c_store(image).Status == 0x0000
    again.release()


@pytest.mark.parametrize("uid", ["", "../../etc/passwd", "1." * 50, "1.2.x", "1.2\\1.3"])
def test_h10_h20_malformed_uids_in_the_command_are_kept_for_intake_to_judge(receive, uid):
    node = receive()
    image = ct_image()
    peer = associate(node)

    raw_socket(peer).sendall(pdv(1, 3, command(image, uid=uid)) + pdv(1, 2, encoded(image)))

    wait_for(lambda: waiting(node))
    (item,) = waiting(node)
    assert item.path.parent == node.box.folder / "north"
    assert dcmread(item.path).SOPInstanceUID == image.SOPInstanceUID
    peer.abort()


def test_a_store_without_a_data_set_is_not_understood(receive):
    node = receive()
    peer = associate(node)

    none = {"elements": {0x0800: struct.pack("<H", 0x0101)}}
    with answered(peer) as answer:
        raw_socket(peer).sendall(pdv(1, 3, command(ct_image(), **none)))

    assert answer.status == 0xC000
    assert waiting(node) == []
    peer.release()


def test_h20_a_data_set_of_no_bytes_is_not_understood_and_the_association_stays(receive):
    node = receive()
    image = ct_image()
    peer = associate(node)

    with answered(peer) as answer:
        raw_socket(peer).sendall(pdv(1, 3, command(image)) + pdv(1, 2, b""))

    assert answer.status == 0xC000
    assert list(node.box.folder.rglob("*.part")) == []
    assert waiting(node) == []
    assert peer.send_c_store(image).Status == 0x0000
    peer.release()


FUZZ = {
    "a data set before its command": pdv(1, 2, b"x" * 100),
    "an unknown context": pdv(77, 3, command(ct_image())) + pdv(77, 2, b"x"),
    "no fragment header": b"\x04\x00\x00\x00\x00\x04\x00\x00\x00\x00",
    "an unknown command": pdv(1, 3, command(ct_image(), elements={0x0100: b"\x99\x99"})),
    "no command field": pdv(1, 3, command(ct_image(), elements={0x0100: b""})),
    "garbage as command": pdv(1, 3, b"\xff" * 64),
    "a PDU of 4 GiB": b"\x04\x00\xff\xff\xff\xff",
    "an unknown PDU": b"\x42\x00\x00\x00\x00\x04abcd",
    "a second A-ASSOCIATE-RQ": b"\x01\x00\x00\x00\x00\x04abcd",
}


@pytest.mark.parametrize("data", FUZZ.values(), ids=FUZZ)
def test_h20_fuzzed_pdus_end_their_own_association_only(receive, data):
    node = receive()
    other, peer = associate(node), associate(node)

    raw_socket(peer).sendall(data)

    wait_for(lambda: len(node.listener.active_associations) == 1)
    assert other.send_c_store(ct_image()).Status == 0x0000
    other.release()
    assert list(node.box.folder.rglob("*.part")) == []


def test_h15_idle_associations_are_ended(receive):
    node = receive(idle_timeout_s=0.5)
    peers = [associate(node) for _ in range(5)]

    wait_for(lambda: not node.listener.active_associations)

    wait_for(lambda: all(peer.is_aborted for peer in peers))


def test_h15_idle_associations_cost_next_to_nothing(receive):
    node = receive()
    peers = [associate(node) for _ in range(10)]
    for peer in peers:  # the test's own side polls, and would be measured instead
        raw_socket(peer).setblocking(True)
        peer.dul._kill_thread = True
        peer._kill = True
    wait_for(lambda: not any(peer.dul.is_alive() or peer.is_alive() for peer in peers))
    before = time.process_time()

    time.sleep(1.0)

    assert time.process_time() - before < 0.1
    for peer in peers:
        raw_socket(peer).close()
    wait_for(lambda: not node.listener.active_associations)


def test_h19_a_trickling_pdu_is_timed_out(receive):
    node = receive(dimse_timeout_s=0.5)
    peer = associate(node)
    line = raw_socket(peer)
    line.sendall(b"\x04\x00\x00\x00\x10\x00")

    def trickle():
        with contextlib.suppress(OSError):  # reset or broken pipe
            while True:
                line.sendall(b"x")
                time.sleep(0.1)

    loris = threading.Thread(target=trickle)
    loris.start()

    wait_for(lambda: not node.listener.active_associations, 5)
    loris.join()


def test_h19_a_message_trickling_in_small_pdus_is_timed_out(receive):
    node = receive(dimse_timeout_s=0.5)
    image = ct_image()
    peer = associate(node)
    line = raw_socket(peer)
    line.sendall(pdv(1, 3, command(image)))

    with contextlib.suppress(OSError):  # reset or broken pipe
        for _ in range(100):
            line.sendall(pdv(1, 0, b"x" * 20))
            time.sleep(0.1)

    wait_for(lambda: not node.listener.active_associations, 0.1)
    assert waiting(node) == []


def test_h16_probes_leave_nothing_behind(receive):
    node = receive()
    associate(node).release()
    wait_for(lambda: not node.listener.active_associations)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))

    for _ in range(1000):
        socket.create_connection(("127.0.0.1", node.port)).close()

    wait_for(lambda: threading.active_count() <= threads)
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= files)
    peer = associate(node)
    assert peer.is_established
    peer.release()


def test_a_silent_connection_is_closed_after_artim(receive):
    node = receive(acse_timeout_s=0.3)

    with socket.create_connection(("127.0.0.1", node.port)) as silent:
        silent.settimeout(5)
        assert silent.recv(1) == b""


def test_stopping_lets_a_store_under_way_finish(receive):
    node = receive()
    image = ct_image()
    peer = associate(node)
    line, body = raw_socket(peer), encoded(image)
    line.sendall(pdv(1, 3, command(image)) + pdv(1, 0, body[:100]))
    wait_for(lambda: list(node.box.folder.rglob("*.part")))

    ending = threading.Thread(target=stop, args=([node.listener], node.door))
    ending.start()
    time.sleep(0.5)
    with answered(peer) as answer:
        line.sendall(pdv(1, 2, body[100:]))

    assert answer.status == 0x0000
    ending.join()
    assert len(waiting(node)) == 1


def test_tenants_can_change_while_an_association_lives(receive):
    node = receive()
    peer = associate(node)
    south = Tenant(id="south", ae_titles=("SOUTH_AI",), senders=(Sender(ae_title="CT9"),))

    node.door.reload((south,))

    assert peer.send_c_store(ct_image()).Status == 0x0000
    peer.release()
    assert associate(node).is_rejected
    new = associate(node, called="SOUTH_AI", calling="CT9")
    assert new.is_established
    new.release()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    if not shutil.which("openssl"):
        pytest.skip("no openssl")

    def run(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem",
        "-subj", "/CN=test CA", "-days", "2")  # fmt: skip
    for name in ("node", "ct1"):
        run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr",
            "-subj", f"/O=North/CN={name}")  # fmt: skip
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "2")  # fmt: skip
    run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "stranger.key",
        "-out", "stranger.pem", "-subj", "/CN=ct1", "-days", "2")  # fmt: skip
    return folder


def client_tls(folder, name):
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.check_hostname = False
    if name:
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return (context, "node")


@pytest.fixture
def secure(receive, certificates):
    settings = ScpSettings(
        tls_port=1,
        tls_cert=str(certificates / "node.pem"),
        tls_key=str(certificates / "node.key"),
        tls_ca=str(certificates / "ca.pem"),
    )
    sender = Sender(ae_title="CT1", tls_subject="CN=ct1,O=North")
    north = Tenant(id="north", ae_titles=("NORTH_AI",), senders=(sender,))
    return receive(tls.context(settings), tenants=(north,), acse_timeout_s=2)


def test_h17_a_certified_sender_stores_over_tls(secure, certificates):
    peer = associate(secure, tls_args=client_tls(certificates, "ct1"))

    status = peer.send_c_store(ct_image(matrix=256))
    peer.release()

    assert status.Status == 0x0000
    assert read_provenance(waiting(secure)[0].path).tls_subject == "CN=ct1,O=North"


def test_h17_another_certificate_of_the_same_authority_is_not_that_sender(secure, certificates):
    peer = associate(secure, tls_args=client_tls(certificates, "node"))

    assert peer.is_rejected
    assert peer.acceptor.primitive.diagnostic == 3


@pytest.mark.parametrize("name", ["stranger", None])
def test_h17_a_wrong_certificate_ends_in_the_handshake_and_is_noted(secure, certificates, name):
    context, host = client_tls(certificates, name)
    plain = socket.create_connection(("127.0.0.1", secure.port), timeout=5)
    # With TLS 1.3 the client learns of it after its own handshake.
    with (
        context.wrap_socket(plain, server_hostname=host) as line,
        pytest.raises(ssl.SSLError, match="alert"),
    ):
        line.recv(1)

    wait_for(lambda: [note.code for note in noted(secure.box.folder)[0]] == ["tls"])


def test_a_silent_tls_connection_blocks_nobody(secure, certificates):
    with socket.create_connection(("127.0.0.1", secure.port)) as silent:
        silent.sendall(b"\x16")  # a handshake that stops at its first byte

        peer = associate(secure, tls_args=client_tls(certificates, "ct1"))

        assert peer.is_established
        peer.release()


def test_no_torch_in_the_receiver():
    code = "import sys, scp.receiver, scp.__main__, db.drain; print('torch' in sys.modules)"

    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )

    assert found.stdout.strip() == "False"


def test_another_watermark_holds_from_a_reload_on(receive):
    node = receive()
    image = ct_image()
    node.door.reload((NORTH,), min_free_mb=10**9)
    peer = associate(node)

    refused = peer.send_c_store(image).Status
    node.door.reload((NORTH,), min_free_mb=0)
    taken = peer.send_c_store(image).Status
    peer.release()

    assert (refused, taken) == (0xA700, 0x0000)
