"""Lines to destinations over TLS: made, or refused with a reason that an operator understands."""

import hashlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from pydicom.uid import generate_uid

from config.settings import load
from db.reach import is_unreachable
from dicom_sr.association import Peer, echo
from dicom_sr.line import TlsFiles
from dicom_sr.push import Outcome, Parcel, push
from node import doctor
from tests.builders import ct_series
from tests.certificates import Authority, Pair
from tests.delivery import free_port, wait_until
from tests.peers import Pacs
from tests.validators import need

TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def ours(authority: Authority) -> Pair:
    return authority.signs("vigil")


@pytest.fixture(scope="module")
def theirs(authority: Authority) -> Pair:
    return authority.signs("pacs")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def parcels(tmp_path_factory: pytest.TempPathFactory) -> list[Parcel]:
    folder = tmp_path_factory.mktemp("objects")
    return [parcel(folder, dataset) for dataset in ct_series()[:2]]


def parcel(folder: Path, dataset) -> Parcel:
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    uids = (str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), syntax)
    return Parcel("overlay", *uids, path, digest)


def peer(port: int, tls: TlsFiles | None, **changes: object) -> Peer:
    limits = {"connect_timeout_s": 1.0, "acse_timeout_s": 2.0, "dimse_timeout_s": 2.0}
    fields = {"host": "127.0.0.1", "ae_title": "PACS", "calling_ae": "NORTH_AI", **limits}
    return Peer(port=port, tls=tls, **{**fields, **changes})  # type: ignore[arg-type]


def files(authority: Authority, pair: Pair | None) -> TlsFiles:
    own = (str(pair.cert), str(pair.key)) if pair else ("", "")
    return TlsFiles(str(authority.cert), *own)


@pytest.mark.parametrize("newest", [TLS_1_2, TLS_1_3])
def test_objects_go_over_mutual_tls(authority, ours, theirs, parcels, newest):
    with Pacs(tls=authority.server(theirs, newest=newest)) as pacs:
        sent = push(peer(pacs.port, files(authority, ours)), parcels)

    assert sent.error == ""
    assert {answer.outcome for answer in sent.answers.values()} == {Outcome.ACCEPTED}
    assert len(pacs.instances) == len(parcels)


@contextmanager
def storescp(folder: Path, authority: Authority, pair: Pair | None) -> Iterator[int]:
    """dcmtk's: with a pair it speaks TLS and asks for a certificate; its port."""
    port = free_port()
    folder.mkdir()
    secure = ["+tls", str(pair.key), str(pair.cert), "+cf", str(authority.cert)] if pair else []
    process = subprocess.Popen(
        [need("storescp"), *secure, "-od", str(folder), "+xe", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: listens(port))
        yield port
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_dcmtk_takes_objects_over_mutual_tls(authority, ours, theirs, parcels, tmp_path):
    with storescp(tmp_path / "got", authority, theirs) as port:
        sent = push(peer(port, files(authority, ours)), parcels)

    assert sent.error == ""
    assert len(list((tmp_path / "got").iterdir())) == len(parcels)


def test_dcmtk_wants_a_certificate_and_we_have_none(authority, theirs, parcels, tmp_path):
    with storescp(tmp_path / "got", authority, theirs) as port:
        sent = push(peer(port, files(authority, None)), parcels)

    assert (sent.error, sent.answers) == ("tls_refused", {})
    assert list((tmp_path / "got").iterdir()) == []


@pytest.mark.parametrize("newest", [TLS_1_2, TLS_1_3])
@pytest.mark.parametrize("whose", ["none", "stranger"])
def test_a_peer_that_does_not_take_our_certificate(
    authority, stranger, theirs, parcels, newest, whose
):
    pair = stranger.signs("vigil") if whose == "stranger" else None

    with Pacs(tls=authority.server(theirs, newest=newest)) as pacs:
        sent = push(peer(pacs.port, files(authority, pair)), parcels)

    assert (sent.error, sent.answers) == ("tls_refused", {})
    assert pacs.received == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"days": -1}, "certificate_expired"),
        ({"subject_alt_name": "IP:10.1.0.9"}, "certificate_wrong_name"),
        ({"subject_alt_name": "DNS:pacs.north"}, "certificate_wrong_name"),
    ],
)
def test_a_certificate_that_is_not_as_it_should_be(authority, ours, parcels, changes, why):
    server = authority.server(authority.signs("other", **changes))

    with Pacs(tls=server) as pacs:
        sent = push(peer(pacs.port, files(authority, ours)), parcels)

    assert (sent.error, sent.answers, pacs.received) == (why, {}, [])


def test_a_name_in_the_certificate_is_that_of_the_configured_host(authority, ours, parcels):
    server = authority.server(authority.signs("named", subject_alt_name="DNS:localhost"))

    with Pacs(tls=server) as pacs:
        sent = push(peer(pacs.port, files(authority, ours), host="localhost"), parcels)

    assert sent.error == ""


@pytest.mark.parametrize("trusts", ["stranger", "system"])
def test_a_certificate_of_another_authority_is_not_trusted(
    authority, stranger, ours, theirs, parcels, trusts
):
    ca = str(stranger.cert) if trusts == "stranger" else ""

    with Pacs(tls=authority.server(theirs)) as pacs:
        sent = push(peer(pacs.port, TlsFiles(ca, str(ours.cert), str(ours.key))), parcels)

    assert (sent.error, sent.answers, pacs.received) == ("certificate_not_trusted", {}, [])


def test_a_plain_port_behind_tls_is_told_from_a_refusal(authority, ours, parcels, tmp_path):
    with storescp(tmp_path / "got", authority, None) as port:
        sent = push(peer(port, files(authority, ours)), parcels)

    assert (sent.error, sent.answers) == ("tls_not_spoken", {})
    assert list((tmp_path / "got").iterdir()) == []


def test_a_tls_port_that_is_called_in_plain_text(authority, theirs, parcels):
    with Pacs(tls=authority.server(theirs)) as pacs:
        sent = push(peer(pacs.port, None), parcels)

    assert (sent.error, sent.answers) == ("association_aborted", {})


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x03"])
def test_a_handshake_that_stalls_is_left(authority, ours, parcels, said):
    with socket.create_server(("127.0.0.1", 0)) as server, threads(server, said):
        sent = push(peer(server.getsockname()[1], files(authority, ours)), parcels)

    assert (sent.error, sent.answers) == ("tls_timeout", {})


@contextmanager
def threads(server: socket.socket, said: bytes) -> Iterator[None]:
    """Accepts one connection, says a little and no more."""
    done = threading.Event()

    def stall() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(said)
            done.wait(20)

    thread = threading.Thread(target=stall)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("lost", ["ca", "cert", "key", "password"])
def test_files_that_cannot_be_used_stop_this_delivery_and_not_the_stage(
    authority, ours, theirs, parcels, lost, tmp_path
):
    paths = {"ca": str(authority.cert), "cert": str(ours.cert), "key": str(ours.key)}
    gone = str(tmp_path / "gone.pem")
    paths |= {
        "ca": {"ca": gone},
        "cert": {"cert": gone},
        "key": {"key": str(theirs.key)},
        "password": {"key": str(authority.locked(ours))},
    }[lost]

    with Pacs(tls=authority.server(theirs)) as pacs:
        sent = push(peer(pacs.port, TlsFiles(**paths)), parcels)

    assert (sent.error, sent.answers, pacs.received) == ("tls_files_unusable", {}, [])


def test_no_try_leaves_a_socket_behind(authority, ours, theirs, parcels, tmp_path):
    plain = storescp(tmp_path / "got", authority, None)
    with Pacs(tls=authority.server(theirs)) as pacs, plain as plain_port:
        for tls in (None, files(authority, None), files(authority, ours)):
            for port in (pacs.port, plain_port):
                push(peer(port, tls), parcels)

                assert calls_to(port) == []


def calls_to(port: int) -> list[object]:
    """Our own ends of connections to a peer, in any state."""
    lines = psutil.Process().net_connections("tcp")
    return [line for line in lines if line.raddr and line.raddr.port == port]


def test_whatever_keeps_a_line_from_being_made_backs_off_the_destination():
    assert all(
        map(is_unreachable, ["no_connection", "tls_refused", "tls_timeout", "tls_files_unusable"])
    )
    assert not is_unreachable("no_answer")


def test_a_peer_that_stops_reading_in_mid_object_is_left(tmp_path):
    """A blocked write must end, or the association never does."""
    dataset = ct_series()[0]
    dataset.Rows = dataset.Columns = 4096
    dataset.PixelData = np.zeros((4096, 4096), np.uint16).tobytes()
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    huge = parcel(tmp_path, dataset)

    with Pacs() as pacs, deaf_after(pacs.port, n_bytes=200_000) as port:
        limits = {"dimse_timeout_s": 1.0, "network_timeout_s": 1.0}
        sent = push(peer(port, None, **limits), [huge])

    assert (sent.error, sent.answers) == ("no_answer", {})


@contextmanager
def deaf_after(port: int, *, n_bytes: int) -> Iterator[int]:
    """Passes everything on to `port`, until it has had so much from the caller."""
    done = threading.Event()

    def back(caller: socket.socket, callee: socket.socket) -> None:
        while data := callee.recv(65536):
            caller.sendall(data)

    def forth(server: socket.socket) -> None:
        caller, _ = server.accept()
        with caller, socket.create_connection(("127.0.0.1", port)) as callee:
            answers = threading.Thread(target=back, args=(caller, callee))
            answers.start()
            left = n_bytes
            while left > 0 and (data := caller.recv(min(left, 65536))):
                callee.sendall(data)
                left -= len(data)
            done.wait(30)
            callee.shutdown(socket.SHUT_RDWR)
            answers.join()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=forth, args=(server,))
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            done.set()
            thread.join()


def test_a_certificate_may_carry_the_name_that_is_configured_for_it(authority, ours, parcels):
    named = authority.signs("named", subject_alt_name="DNS:pacs.north")

    with Pacs(tls=authority.server(named)) as pacs:
        right = peer(pacs.port, files(authority, ours), tls_name="pacs.north")
        wrong = peer(pacs.port, files(authority, ours), tls_name="pacs.south")

        assert push(right, parcels).error == ""
        assert push(wrong, parcels).error == "certificate_wrong_name"


def test_an_echo_says_why_there_is_none(authority, ours, theirs):
    stranger = Authority(ours.cert.parent, "stranger")

    with Pacs(tls=authority.server(theirs)) as pacs:
        assert echo(peer(pacs.port, files(authority, ours))) == ""
        assert echo(peer(pacs.port, files(stranger, ours))) == "certificate_not_trusted"
        assert echo(peer(pacs.port, files(authority, None))) == "tls_refused"
    assert echo(peer(free_port(), None)) == "no_connection"


def test_the_doctor_asks_a_destination_over_the_line_that_deliveries_take(
    authority, ours, theirs, tmp_path
):
    with Pacs(tls=authority.server(theirs)) as pacs:
        config = tmp_path / "vigil.toml"
        config.write_text(f"""
[scp]
tls_ca = "{authority.cert}"
tls_cert = "{ours.cert}"
tls_key = "{ours.key}"
[[tenants]]
id = "north"
ae_titles = ["NORTH_AI"]
[[tenants.destinations]]
name = "pacs"
ae_title = "PACS"
host = "127.0.0.1"
port = {pacs.port}
tls = true
[[tenants.destinations]]
name = "plain"
ae_title = "PACS"
host = "127.0.0.1"
port = {pacs.port}
""")
        secure, plain = doctor.destinations(load(config))

    assert (secure.grade, plain.grade) == (doctor.Grade.GOOD, doctor.Grade.BAD)
    assert "answers C-ECHO" in secure.found
    assert "association aborted" in plain.found


def test_a_large_object_gets_through_a_slow_line(tmp_path):
    """In one PDU, and longer on its way than an answer or a write may take."""
    dataset = ct_series()[0]
    dataset.Rows = dataset.Columns = 2048
    dataset.PixelData = np.zeros((2048, 2048), np.uint16).tobytes()
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    huge = parcel(tmp_path, dataset)

    with Pacs() as pacs, slow(pacs.port, bytes_per_s=2_000_000) as port:
        started = time.monotonic()
        limits = {"dimse_timeout_s": 1.0, "network_timeout_s": 1.0, "min_bytes_per_s": 1_000_000.0}
        sent = push(peer(port, None, **limits), [huge])
        took = time.monotonic() - started

    assert (sent.error, len(sent.answers), len(pacs.received)) == ("", 1, 1)
    assert took > 2  # the limits would have been too short


@contextmanager
def slow(port: int, *, bytes_per_s: int) -> Iterator[int]:
    """Passes everything on to `port`, no faster than that, and holds little back."""

    def pass_on(source: socket.socket, sink: socket.socket, rate: float) -> None:
        while data := source.recv(16384):
            time.sleep(len(data) / rate)
            sink.sendall(data)

    def serve() -> None:
        caller, _ = server.accept()
        with caller, socket.create_connection(("127.0.0.1", port)) as callee:
            back = threading.Thread(target=pass_on, args=(callee, caller, 1e9))
            back.start()
            pass_on(caller, callee, bytes_per_s)
            callee.shutdown(socket.SHUT_WR)
            back.join()

    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        server.bind(("127.0.0.1", 0))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(20)
