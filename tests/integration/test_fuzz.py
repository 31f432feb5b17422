"""Mutations of real DICOM through intake, decoder and upper layer: a stated outcome for each.

`make fuzz` sends more of the same to a whole node.
"""

import datetime as dt
import io
import random
import socket
import zlib
from contextlib import suppress
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from config.settings import InferenceSettings
from db.describe import describe
from db.errors import NotDicom, PermanentError
from db.header import InstanceHeader
from db.identity import is_uid
from db.intake import Intake
from db.meta import Provenance, decode_head, encode_head
from db.sandbox import Sandbox
from db.spool import Spool, scan
from db.tables import EventRow, InstanceRow, QuarantineRow, ReturnedRow
from inference.loader import decode
from tests import fuzz
from tests.bundles.sources import ct_slice, head
from tests.e2e.reception import Stage, wait_for
from tests.raw_peer import CT, EXPLICIT, VERIFICATION, Gone, RawPeer, associate_rq, store_pdus
from tests.stage import encoded

N_OBJECTS, N_DECODED, N_CONVERSATIONS = 120, 80, 90


@pytest.fixture(scope="module")
def samples():
    return fuzz.samples()


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2, memory_mb=2048, cpu_s=60) as box:
        yield box


class Intakes:
    """A spool and its intake; what becomes of the files that are kept there."""

    def __init__(self, node_settings, engine, sandbox):
        self.engine, self.folder = engine, node_settings.node.data_dir
        self.box = Spool(self.folder, "scp-0")
        self.intake = Intake(engine, node_settings, sandbox)

    def keep(self, case):
        source = Provenance(
            tenant="default",
            received_at=dt.datetime.now(dt.UTC).isoformat(),
            sop_class_uid=case.sop_class_uid,
            sop_instance_uid=case.sop_instance_uid,
            transfer_syntax_uid=case.syntax,
        )
        return self.box.keep(source, case.body)

    def drain(self):
        for _ in range(200):
            self.intake.take(self.box.folder)
            if not scan(self.box.folder):
                return
            self.intake._later.clear()  # nobody else waits
        raise AssertionError(f"{len(scan(self.box.folder))} files stay in the spool")

    def ids(self, table):
        with Session(self.engine) as session:
            return set(session.scalars(select(table.id)))

    def n_dropped(self):
        """Duplicates and variants are counted where they are told: by events, or not at all."""
        with Session(self.engine) as session:
            variants = select(func.count()).where(EventRow.kind == "variant_dropped")
            return session.scalar(variants)

    def close(self):
        self.box.close()
        self.intake.close()


@pytest.fixture
def intakes(settings, engine, sandbox):
    found = Intakes(settings, engine, sandbox)
    yield found
    found.close()


def test_h20_every_mutated_object_ends_in_exactly_one_outcome(intakes, samples, capfd):
    kept = {intakes.keep(case): case for case in islice(fuzz.cases(20, samples), N_OBJECTS)}

    intakes.drain()

    accepted, aside = intakes.ids(InstanceRow), intakes.ids(QuarantineRow)
    returned = intakes.ids(ReturnedRow)
    assert len(accepted | aside | returned) == len(accepted) + len(aside) + len(returned)
    assert accepted | aside | returned <= set(kept)
    duplicates = capfd.readouterr().out.count("duplicate_dropped")
    assert (
        len(accepted) + len(aside) + len(returned) + duplicates + intakes.n_dropped() == N_OBJECTS
    )
    assert len(accepted) > N_OBJECTS / 10
    files = {path.stem: path for path in intakes.folder.rglob("*.dcm")}
    assert set(files) == {str(key) for key in accepted | aside | returned}
    for key in accepted | aside:
        assert files[str(key)].read_bytes().endswith(kept[key].body)


texts = st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace"))
values = st.one_of(
    st.binary(max_size=40), texts, st.sampled_from([b"", b"1.2.3", b"CT", b"\xff\xff"])
)
tags = st.sampled_from(
    [0x00080005, 0x00080016, 0x00080018, 0x00080060, 0x00100010, 0x00100020, 0x00100030, 0x0020000D,
     0x0020000E, 0x00200032, 0x00200037, 0x00280008, 0x00280010, 0x00280100, 0x52009230, 0x7FE00010]
)  # fmt: skip
vrs = st.sampled_from(fuzz._VRS)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parts=st.lists(st.tuples(tags, vrs, values), max_size=12),
    syntax=st.sampled_from(fuzz.SYNTAXES),
    uid=st.one_of(st.just("1.2.3"), st.text(max_size=70)),
    is_headed=st.booleans(),
)
def test_h20_whatever_elements_a_data_set_has_intake_says_what_became_of_it(
    intakes, parts, syntax, uid, is_headed
):
    base = fuzz.Case("built", CT, uid, syntax, b"")
    body = b"".join(fuzz._element(base, *part) for part in parts)
    if is_headed:
        body = encoded(ct_slice(head(1)[0], SOPInstanceUID="1.2.3")) + body
    before = len(intakes.ids(InstanceRow) | intakes.ids(QuarantineRow)) + intakes.n_dropped()

    key = intakes.keep(fuzz.Case("built", CT, uid, syntax, body or b"\0"))
    intakes.drain()

    found = [key in intakes.ids(table) for table in (InstanceRow, QuarantineRow, ReturnedRow)]
    after = len(intakes.ids(InstanceRow) | intakes.ids(QuarantineRow)) + intakes.n_dropped()
    # Nothing but the very same bytes again leaves no trace of its own.
    assert sum(found) == after - before == 1 or (sum(found), after - before) in ((0, 1), (0, 0))


def test_h20_decoding_mutated_instances_ends_with_pixels_or_a_reason(samples, sandbox, tmp_path):
    limits = InferenceSettings(max_pixels=20_000_000, loader_timeout_s=60)
    ends = []
    for n, case in enumerate(islice(fuzz.cases(21, samples), N_DECODED)):
        path = tmp_path / f"{n}.dcm"
        source = Provenance(tenant="default", transfer_syntax_uid=case.syntax)
        path.write_bytes(encode_head(source) + case.body)
        try:
            size = decode(sandbox, path, "x", _header(case), limits).pixels.size
            ends.append("decoded" if size <= limits.max_pixels else "too large")
        except PermanentError as error:
            ends.append(error.code)
    assert set(ends) <= STATED
    assert ends.count("decoded") > 3


STATED = {
    "decoded", "no_pixels", "too_many_pixels", "colour_image", "rescale_missing", "rescale_zero",
    "pixels_differ", "undecodable", "not_dicom", "unreadable", "decoder_killed",
}  # fmt: skip


def _header(case):
    return InstanceHeader(
        sop_class_uid=case.sop_class_uid,
        sop_instance_uid=case.sop_instance_uid,
        study_instance_uid="1.2",
        series_instance_uid="1.3",
        transfer_syntax_uid=case.syntax,
    )


@pytest.fixture(scope="module")
def receiver(database_server, tmp_path_factory):
    """Reception without a database: it needs none."""
    folder = tmp_path_factory.mktemp("receiver")
    nowhere = database_server.set(database="nowhere").render_as_string(hide_password=False)
    config = folder / "vigil.toml"
    config.write_text(
        f'[node]\ndata_dir = "{folder}/var"\ndatabase_url = "{nowhere}"\nmin_free_mb = 0\n'
        "[scp]\nport = 0\nmax_per_minute = 100000\n"
        # Nothing here is to end by a time-out.
        "acse_timeout_s = 600\ndimse_timeout_s = 600\nidle_timeout_s = 600\n"
        '[[tenants]]\nid = "north"\nae_titles = ["NORTH_AI"]\n'
    )
    stage = Stage(config, folder / "log")
    wait_for(lambda: stage.lines("receiver_started"), 120)
    yield stage
    stage.kill()


def converse(port, data, *, is_associated):
    """Send these bytes and no more; True once the other side has said its last."""
    with RawPeer(port, timeout_s=120) as peer:
        if is_associated:
            peer.associate()
        with suppress(OSError):
            peer.socket.sendall(data)
            peer.socket.shutdown(socket.SHUT_WR)
        while True:
            try:
                peer.receive()
            except Gone:
                return True
            except TimeoutError:
                return False


def assert_healthy(stage, processes, other, image):
    assert other.store(CT, str(image.SOPInstanceUID), encoded(image)) == 0x0000
    assert {child.pid for child in stage.children()} == processes
    assert stage.lines("thread_crashed") == stage.lines("child_ended") == []


def test_h20_mutated_conversations_end_and_harm_no_other_association(receiver):
    rng = random.Random(22)
    image = ct_slice(head(1)[0])
    later = b"".join(store_pdus(1, CT, str(image.SOPInstanceUID), encoded(image)))
    first = associate_rq([(CT, (EXPLICIT,))], "NORTH_AI", "CT1") + later
    processes = {child.pid for child in receiver.children()}

    with RawPeer(receiver.port).associate() as other:
        for n in range(N_CONVERSATIONS):
            is_associated = bool(n % 3)
            data = fuzz.hostile_pdus(rng, later if is_associated else first)
            assert converse(receiver.port, data, is_associated=is_associated), n
            if n % 10 == 0:
                assert_healthy(receiver, processes, other, image)
        assert_healthy(receiver, processes, other, image)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.builds(
                lambda kind, length, data: bytes([kind, 0]) + length.to_bytes(4, "big") + data,
                st.integers(0, 9), st.integers(0, 70), st.binary(max_size=64),
            ),
        ),
        min_size=1, max_size=6,
    ),
    is_associated=st.booleans(),
)  # fmt: skip
def test_h20_whatever_pdus_come_the_association_ends_and_others_live(
    receiver, pieces, is_associated
):
    data = b"".join(pieces) or b"\0"

    assert converse(receiver.port, data, is_associated=is_associated)

    with RawPeer(receiver.port).associate([(VERIFICATION, (EXPLICIT,))]) as other:
        assert other.echo() == 0x0000
    assert receiver.lines("thread_crashed") == receiver.lines("child_ended") == []


@pytest.mark.parametrize("is_associated", [True, False])
@pytest.mark.parametrize(("source", "reason"), [(150, 0), (3, 9), (2, 150), (1, 0), (0, 7)])
def test_h20_an_abort_of_any_source_and_reason_ends_its_association_alone(
    receiver, source, reason, is_associated
):
    abort = bytes([7, 0, 0, 0, 0, 4, 0, 0, source, reason])

    assert converse(receiver.port, abort, is_associated=is_associated)

    with RawPeer(receiver.port).associate([(VERIFICATION, (EXPLICIT,))]) as other:
        assert other.echo() == 0x0000
    assert receiver.lines("thread_crashed") == []


def test_h16_whoever_speaks_no_dicom_holds_no_place_until_a_time_out(receiver):
    """More of them than there are places, within seconds: a scanner of ports and web pages."""
    for _ in range(300):
        assert converse(receiver.port, b"GET / HTTP/1.1\r\n\r\n", is_associated=False)

    with RawPeer(receiver.port).associate([(VERIFICATION, (EXPLICIT,))]) as other:
        assert other.echo() == 0x0000
    (process,) = [one for one in receiver.children() if "scp.receiver" in one.cmdline()]
    wait_for(lambda: process.num_threads() < 10, 60)


def test_h20_data_sent_with_the_request_for_an_association_crashes_no_thread(receiver):
    image = ct_slice(head(1)[0])
    eager = associate_rq([(CT, (EXPLICIT,))], "NORTH_AI", "CT1") + b"".join(
        store_pdus(1, CT, str(image.SOPInstanceUID), encoded(image))
    )

    for _ in range(20):
        assert converse(receiver.port, eager, is_associated=False)

    assert receiver.lines("thread_crashed") == []


uids = st.text(max_size=300)


@given(uids, uids, uids)
def test_h10_h20_any_text_as_uid_comes_back_from_the_file_it_was_kept_with(uid, kind, syntax):
    source = Provenance(
        tenant="north", sop_class_uid=kind, sop_instance_uid=uid, transfer_syntax_uid=syntax
    )

    assert decode_head(io.BytesIO(encode_head(source))) == source


@given(st.one_of(st.text(), st.from_regex(r"[0-9.]{1,70}", fullmatch=True)))
def test_h10_only_dotted_digits_of_64_characters_are_a_uid(text):
    parts = text.split(".")
    is_plain = all(part and part.isascii() and part.isdigit() for part in parts)

    assert is_uid(text) == (is_plain and len(text) <= 64)


DEEP = (b"\x99\x00\x10\x10SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4) * 3000
BOMBS = {
    "zeros": (bytes(2**26), "it has more than 100000 elements"),
    "a value of 4 GiB": (b"\x99\0\x10\x10OB\0\0\xfe\xff\xff\xff", "the data set is cut off"),
    "sequences 3,000 deep": (DEEP, "its sequences are nested too deeply"),
}


@pytest.mark.parametrize("syntax", [EXPLICIT, fuzz.DEFLATED], ids=["plain", "deflated"])
@pytest.mark.parametrize(("more", "reason"), BOMBS.values(), ids=BOMBS)
def test_h20_a_data_set_made_to_exhaust_its_reader_is_stated_and_kills_none(
    sandbox, tmp_path, syntax, more, reason
):
    image = ct_slice(head(1)[0])
    del image.PixelData
    body = encoded(image) + more
    if syntax == fuzz.DEFLATED:
        squeeze = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
        body = squeeze.compress(body) + squeeze.flush()
    path = tmp_path / "bomb.dcm"
    path.write_bytes(encode_head(Provenance(tenant="n", transfer_syntax_uid=syntax)) + body)

    with pytest.raises(NotDicom) as caught:
        sandbox.run(describe, str(path), timeout_s=120)

    assert str(caught.value) == reason
