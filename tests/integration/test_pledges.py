"""Storage commitment for senders: they delete their copies on our word (PS3.4 Annex J)."""

import base64
import copy
import json
import time
import urllib.request
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from pydicom import Dataset
from pydicom.uid import RLELossless
from pynetdicom import evt
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from config.tenants import Destination, Sender, Tenant
from db import committing, operator, transaction
from db.committing import Committing
from db.errors import ChildDied, NotDicom
from db.intake import Intake
from db.pledges import PledgeState
from db.sandbox import Sandbox
from db.spool import Spool, scan
from db.tables import EventRow, InstanceRow, PledgeRow, QuarantineRow, ReturnedRow
from dicom_sr.vouching import Voucher
from node.orthanc import OrthancPacs
from tests.builders import changed, ct_image, ct_series
from tests.delivery import free_port
from tests.listening import receivers
from tests.reception import Reception
from tests.validators import need
from tests.vouching import COMMITMENT, Modality, failures, kept

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(size=2, memory_mb=2048, cpu_s=30) as pool:
        yield pool


@pytest.fixture
def modality() -> Iterator[Modality]:
    with Modality() as peer:
        yield peer


def hospital(port: int, **changes: object) -> Tenant:
    fields = {
        "id": "north", "ae_titles": ("NORTH_AI",), "retention_days": 0,
        "senders": (Sender(ae_title="CT1", port=port), Sender(ae_title="ORTHANC")),
        **changes,
    }  # fmt: skip
    return Tenant(**fields)


class Keeper(Reception):
    """A node that takes images and requests, and answers them."""

    def __init__(self, settings, engine, sandbox, start, tenant: Tenant) -> None:
        self.settings = settings.model_copy(update={"tenants": (tenant,)})
        self.engine, self.sandbox = engine, sandbox
        self.data_dir = settings.node.data_dir
        self.receiver = start(tenants=(tenant,))
        self.box = self.receiver.box
        self.intake = Intake(engine, self.settings, sandbox)
        self.committing = Committing(engine, self.settings, sandbox)

    def commits(self) -> int:
        return self.committing.take(self.box.folder)

    def answers(self) -> int:
        """As often as it gives one; every wait is over."""
        with Session(self.engine) as session, session.begin():
            session.execute(update(PledgeRow).values(run_after=func.now()))
        voucher, n = Voucher(self.engine, self.settings), 0
        while voucher.tell_once():
            n += 1
        return n


@pytest.fixture
def keeper(settings, engine, sandbox, modality) -> Iterator[Keeper]:
    with receivers(settings.node.data_dir) as start:
        yield Keeper(settings, engine, sandbox, start, hospital(modality.port))


def unknown() -> Dataset:
    (image,) = changed([ct_image()], SOPInstanceUID="1.2.3.4.5.6")
    return image


def test_what_is_stored_is_vouched_for(keeper, modality):
    series = ct_series()
    keeper.file(*series)

    assert modality.asks(keeper.receiver.port, series, uid="1.2.99") == 0x0000
    assert keeper.commits() == 1
    assert keeper.answers() == 1

    (report,) = modality.reports
    assert report.TransactionUID == "1.2.99"
    assert kept(report) == {str(image.SOPInstanceUID) for image in series}
    assert failures(report) == {}
    assert modality.kinds == [1]
    assert keeper.one(PledgeRow).state == PledgeState.REPORTED
    assert keeper.answers() == 0
    assert keeper.events()[-2:] == ["commitment_judged", "commitment_reported"]


def test_it_is_judged_when_what_came_before_is_filed_at_whichever_receiver(keeper, modality):
    series = ct_series()
    other = Spool(keeper.data_dir, "scp-9")
    first, keeper.box = keeper.box, other
    keeper.receive(series[0])
    keeper.box = first
    keeper.receive(*series[1:])
    modality.asks(keeper.receiver.port, series)

    assert keeper.commits() == 0
    keeper.drain()
    assert keeper.commits() == 0
    keeper.intake.take(other.folder)
    keeper.receive(unknown())  # what came after it holds nothing up
    assert keeper.commits() == 1
    keeper.answers()

    (report,) = modality.reports
    assert failures(report) == {}
    other.close()


def test_what_is_unknown_in_doubt_kept_out_or_another_class_is_not_vouched_for(keeper, modality):
    fine, doubtful, ours, lost, other_class = series = ct_series()[:5]
    keeper.file(*series)
    keeper.file(*changed([doubtful], PatientID="SOMEBODY-ELSE"))
    with Session(keeper.engine) as session, session.begin():
        row = session.scalars(
            select(InstanceRow).where(InstanceRow.sop_instance_uid == lost.SOPInstanceUID)
        ).one()
        lost_id = row.id
    (path,) = [path for path in keeper.files("store") if path.stem == str(lost_id)]
    path.unlink()
    returned(keeper, ours)
    (wrong,) = changed([other_class], SOPClassUID=MR)

    modality.asks(keeper.receiver.port, [fine, doubtful, ours, lost, wrong, unknown()])
    keeper.commits()
    keeper.answers()

    (report,) = modality.reports
    assert kept(report) == {fine.SOPInstanceUID}
    assert failures(report) == {
        doubtful.SOPInstanceUID: 0x0110,
        ours.SOPInstanceUID: 0x0110,
        lost.SOPInstanceUID: 0x0110,
        wrong.SOPInstanceUID: 0x0119,
        "1.2.3.4.5.6": 0x0112,
    }
    assert modality.kinds == [2]


def returned(keeper, image) -> None:
    """As if this had been one of our own objects, sent back to us."""
    with Session(keeper.engine) as session, session.begin():
        session.add(
            ReturnedRow(
                id=uuid.uuid4(), tenant="north",
                sop_instance_uid=str(image.SOPInstanceUID), sender="CT1",
            )
        )  # fmt: skip


def test_what_an_operator_has_discarded_is_not_vouched_for_and_what_he_released_is(
    keeper, modality
):
    image = ct_image()
    keeper.file(image)
    keeper.file(*changed([image], PatientID="SOMEBODY-ELSE"))
    with Session(keeper.engine) as session, session.begin():
        operator.discard(session, keeper.one(QuarantineRow).id, actor="admin")

    modality.asks(keeper.receiver.port, [image], uid="1.2.1")
    keeper.commits()
    keeper.answers()
    with Session(keeper.engine) as session, session.begin():
        session.execute(update(QuarantineRow).values(state="RELEASED"))
    modality.asks(keeper.receiver.port, [image], uid="1.2.2")
    keeper.commits()
    keeper.answers()

    discarded, released = modality.reports
    assert failures(discarded) == {image.SOPInstanceUID: 0x0110}
    assert kept(released) == {image.SOPInstanceUID}


@pytest.mark.parametrize(("filed_by", "is_kept"), [("CT1", True), ("ROUTER", False)])
def test_what_another_sender_set_aside_may_have_come_from_the_asker_too(
    keeper, modality, filed_by, is_kept
):
    """The same data set under two titles is kept aside once, under the first."""
    image = ct_image()
    keeper.file(image)
    keeper.file(*changed([image], PatientID="SOMEBODY-ELSE"))
    with Session(keeper.engine) as session, session.begin():
        session.execute(update(InstanceRow).values(sender=filed_by))
        session.execute(update(QuarantineRow).values(sender="ROUTER"))

    modality.asks(keeper.receiver.port, [image])
    keeper.commits()
    keeper.answers()

    (report,) = modality.reports
    assert (kept(report) == {image.SOPInstanceUID}) == is_kept
    assert failures(report) == ({} if is_kept else {image.SOPInstanceUID: 0x0110})


@pytest.mark.parametrize(
    ("filed_by", "variant_of", "is_kept"),
    [("ROUTER", "CT1", False), ("CT1", "ROUTER", True), ("CT1", "CT1", False)],
)
def test_a_variant_in_another_encoding_that_was_dropped_is_not_vouched_for(
    keeper, modality, filed_by, variant_of, is_kept
):
    """Nobody compared its pixels with those that are kept: these may be a lossy copy."""
    image = ct_image()
    packed = copy.deepcopy(image)
    packed.compress(RLELossless, generate_instance_uid=False)
    keeper.file(packed)
    keeper.file(image)
    with Session(keeper.engine) as session, session.begin():
        dropped = session.scalars(select(EventRow).where(EventRow.kind == "variant_dropped")).one()
        assert dropped.detail["sender"] == "CT1"
        dropped.detail = {**dropped.detail, "sender": variant_of}
        session.execute(update(InstanceRow).values(sender=filed_by))

    modality.asks(keeper.receiver.port, [image])
    keeper.commits()
    keeper.answers()

    (report,) = modality.reports
    assert failures(report) == ({} if is_kept else {image.SOPInstanceUID: 0x0110})


def test_a_variant_in_private_tags_alone_is_vouched_for(keeper, modality):
    image = ct_image()
    keeper.file(image)
    other = copy.deepcopy(image)
    other.private_block(0x0099, "MAKER", create=True).add_new(0x01, "LO", "COUNT 2")
    keeper.file(other)

    modality.asks(keeper.receiver.port, [image])
    keeper.commits()
    keeper.answers()

    (report,) = modality.reports
    assert kept(report) == {image.SOPInstanceUID}


@pytest.mark.parametrize(
    "changes",
    [{"retention_days": 30}, {"senders": (Sender(ae_title="CT1"),)}, {"senders": ()}],
    ids=["not for good", "no port", "anybody"],
)
def test_nobody_may_ask_where_we_cannot_vouch_or_answer(
    settings, engine, sandbox, modality, changes
):
    with receivers(settings.node.data_dir) as start:
        keeper = Keeper(settings, engine, sandbox, start, hospital(modality.port, **changes))

        assert modality.asks(keeper.receiver.port, [ct_image()]) is None


def test_an_archive_may_not_ask_nor_a_modality_report(settings, engine, sandbox, modality):
    archive = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=104, commitment=True)
    tenant = hospital(modality.port, destinations=(archive,))
    with receivers(settings.node.data_dir) as start, Modality("PACS") as pacs:
        keeper = Keeper(settings, engine, sandbox, start, tenant)

        assert pacs.asks(keeper.receiver.port, [ct_image()]) == 0x0124  # not authorised

        said = Dataset()
        said.TransactionUID = "1.2"
        assert tells(modality, keeper.receiver.port, said) == 0x0124


def tells(modality: Modality, port: int, said: Dataset, kind: int = 1) -> int:
    association = modality._entity.associate("127.0.0.1", port, ae_title="NORTH_AI")
    for context in association.accepted_contexts:
        context._as_scp = True
    status, _ = association.send_n_event_report(said, kind, COMMITMENT, "1.2.840.10008.1.20.1.1")
    association.release()
    return int(status.Status)


def test_a_request_that_is_none_is_answered_so(keeper, modality):
    port, images = keeper.receiver.port, [ct_image()]

    assert modality.asks(port, images, action=2) == 0x0123  # no such action
    assert modality.asks(port, images, instance="1.2.3") == 0x0112  # no such instance
    assert scan(keeper.box.folder, kind="request") == []


def test_a_request_that_names_nothing_is_told_and_holds_nothing_up(keeper, modality):
    image = ct_image()
    keeper.file(image)
    modality.asks(keeper.receiver.port, [])
    modality.asks(keeper.receiver.port, [image])

    assert keeper.commits() == 2
    assert keeper.answers() == 1

    assert [event.kind for event in keeper.all(EventRow) if event.is_alarm] == [
        "commitment_unreadable"
    ]


def test_on_a_full_disk_a_request_is_refused_not_forgotten(settings, engine, sandbox, modality):
    with receivers(settings.node.data_dir) as start:
        keeper = Keeper(settings, engine, sandbox, start, hospital(modality.port))
        keeper.box.min_free_mb = 10**9

        assert modality.asks(keeper.receiver.port, [ct_image()]) == 0x0213


def test_a_sender_that_is_away_is_told_later_and_the_same(keeper, modality):
    image = ct_image()
    modality.asks(keeper.receiver.port, [image])
    keeper.commits()
    port = modality.port
    modality.close()
    voucher = Voucher(keeper.engine, keeper.settings)
    assert voucher.tell_once()
    row = keeper.one(PledgeRow)
    assert (row.state, row.error_code, row.attempts) == (PledgeState.WAITING, "no_connection", 1)
    assert not voucher.tell_once()  # it waits

    keeper.file(image)  # too late for this answer: it is the one that was judged
    back = modality._entity.start_server(
        ("127.0.0.1", port), block=False, evt_handlers=handlers(modality)
    )
    assert keeper.answers() == 1
    back.shutdown()

    (report,) = modality.reports
    assert failures(report) == {image.SOPInstanceUID: 0x0112}


def handlers(modality: Modality) -> list:
    return [(evt.EVT_N_EVENT_REPORT, modality._hear)]


def test_a_sender_that_never_comes_back_ends_with_an_alarm(keeper, modality):
    modality.asks(keeper.receiver.port, [ct_image()])
    keeper.commits()
    modality.status = 0x0110
    with Session(keeper.engine) as session, session.begin():
        session.execute(update(PledgeRow).values(expires_at=func.now()))

    assert keeper.answers() == 1

    row = keeper.one(PledgeRow)
    assert (row.state, row.error_code) == (PledgeState.EXPIRED, "0x0110")
    assert keeper.all(EventRow)[-1].is_alarm


def test_an_answer_that_its_sender_refuses_holds_up_no_other(keeper, modality):
    for n in range(4):
        modality.asks(keeper.receiver.port, [ct_image()], uid=f"1.2.{n}")
    keeper.commits()
    modality.refuses = frozenset({"1.2.0", "1.2.1"})

    assert keeper.answers() >= 4

    assert {report.TransactionUID for report in modality.reports} == {"1.2.2", "1.2.3"}
    states = sorted((row.state, row.error_code) for row in keeper.all(PledgeRow))
    assert states == [(PledgeState.REPORTED, "")] * 2 + [(PledgeState.WAITING, "0x0112")] * 2


def test_what_a_sender_is_owed_ends_together_when_it_never_comes_back(keeper, modality):
    """One try tells: the others must not each cost a time-out that everybody waits for."""
    for n in range(3):
        modality.asks(keeper.receiver.port, [ct_image()], uid=f"1.2.{n}")
    keeper.commits()
    modality.close()
    with Session(keeper.engine) as session, session.begin():
        old = select(PledgeRow.id).limit(2).scalar_subquery()
        session.execute(
            update(PledgeRow).where(PledgeRow.id.in_(old)).values(expires_at=func.now())
        )

    assert keeper.answers() == 1

    states = [(row.state, row.error_code) for row in keeper.all(PledgeRow)]
    assert sorted(states) == [
        *[(PledgeState.EXPIRED, "no_connection")] * 2,
        (PledgeState.WAITING, "no_connection"),
    ]
    assert sum(event.is_alarm for event in keeper.all(EventRow)) == 2


def test_a_reader_that_dies_once_costs_no_request(keeper, modality, monkeypatch):
    image = ct_image()
    keeper.file(image)
    modality.asks(keeper.receiver.port, [image])
    run, limits = keeper.sandbox.run, []

    def dying(*args, timeout_s):
        limits.append(timeout_s)
        if len(limits) == 1:
            raise ChildDied("out of memory")
        return run(*args, timeout_s=timeout_s)

    monkeypatch.setattr(keeper.sandbox, "run", dying)
    keeper.commits()
    keeper.answers()

    (report,) = modality.reports
    assert kept(report) == {image.SOPInstanceUID}
    assert limits[0] < limits[1]


def test_many_requests_cost_one_look_at_the_spool(keeper, modality, monkeypatch):
    for n in range(5):
        modality.asks(keeper.receiver.port, [ct_image()], uid=f"1.2.{n}")
    looks = []
    monkeypatch.setattr(
        committing, "scan", lambda folder, kind="dcm": looks.append(kind) or scan(folder, kind)
    )

    assert keeper.commits() == 5

    assert looks == ["report", "request", "dcm"]


def test_a_sender_that_left_the_configuration_is_not_looked_for(keeper, modality):
    modality.asks(keeper.receiver.port, [ct_image()])
    keeper.commits()
    keeper.settings = keeper.settings.model_copy(
        update={"tenants": (hospital(modality.port, senders=()),)}
    )

    Voucher(keeper.engine, keeper.settings).tell_once()

    assert keeper.one(PledgeRow).error_code == "no_address"
    assert modality.reports == []


def test_a_modality_that_names_no_roles_hears_it_too(settings, engine, sandbox):
    with receivers(settings.node.data_dir) as start, Modality(names_roles=False) as modality:
        keeper = Keeper(settings, engine, sandbox, start, hospital(modality.port))
        modality.asks(keeper.receiver.port, [ct_image()])
        keeper.commits()
        keeper.answers()

        assert keeper.one(PledgeRow).state == PledgeState.REPORTED


def test_the_same_request_taken_twice_is_one(keeper, modality):
    """As after a crash between commit and unlink."""
    modality.asks(keeper.receiver.port, [ct_image()])
    (item,) = scan(keeper.box.folder, kind="request")
    body = item.path.read_bytes()
    keeper.commits()
    item.path.write_bytes(body)
    keeper.commits()

    assert len(keeper.all(PledgeRow)) == 1
    assert keeper.events().count("commitment_judged") == 1


def test_six_thousand_instances_in_one_request(keeper, modality):
    images = [Dataset() for _ in range(6000)]
    for n, image in enumerate(images):
        image.SOPClassUID, image.SOPInstanceUID = CT, f"1.2.3.{n + 1}"
    modality.asks(keeper.receiver.port, images)
    keeper.commits()
    keeper.answers()

    (report,) = modality.reports
    assert len(failures(report)) == 6000


def test_orthanc_asks_and_is_told(settings, engine, sandbox, tmp_path):
    need("Orthanc")
    port, http = free_port(), free_port()
    with receivers(settings.node.data_dir) as start:
        tenant = hospital(1, senders=(Sender(ae_title="NORTH_PACS", port=port),))
        keeper = Keeper(settings, engine, sandbox, start, tenant)
        image = ct_image()
        keeper.file(image)
        pacs = OrthancPacs(tmp_path / "orthanc", port, http)
        try:
            url = f"http://127.0.0.1:{http}"
            rest(f"{url}/modalities/vigil", {
                "AET": "NORTH_AI", "Host": "127.0.0.1", "Port": keeper.receiver.port,
                "AllowStorageCommitment": True, "AllowNEventReport": True,
            }, "PUT")  # fmt: skip
            made = rest(f"{url}/modalities/vigil/storage-commitment", {
                "DicomInstances": [
                    {"SOPClassUID": CT, "SOPInstanceUID": str(image.SOPInstanceUID)},
                    {"SOPClassUID": CT, "SOPInstanceUID": "1.2.3.4.5.6"},
                ]
            })  # fmt: skip
            keeper.commits()
            assert keeper.answers() == 1
            found = wait_for_report(f"{url}{made['Path']}")
        finally:
            pacs.close()

    assert found["Status"] == "Failure"
    assert [one["SOPInstanceUID"] for one in found["Success"]] == [image.SOPInstanceUID]
    assert [one["SOPInstanceUID"] for one in found["Failures"]] == ["1.2.3.4.5.6"]


def rest(url: str, body: object = None, method: str | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read() or b"{}")


def wait_for_report(url: str) -> dict:
    deadline = time.monotonic() + 20
    while (found := rest(url))["Status"] == "Pending":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    body=strategies.binary(max_size=300),
    syntax=strategies.sampled_from(list(transaction.SYNTAXES)),
)
def test_h20_whatever_a_message_of_commitment_holds_it_is_read_or_refused(body, syntax):
    try:
        value, _ = transaction.read_base64(base64.b64encode(body).decode(), str(syntax))
    except NotDicom:
        return
    assert transaction.Transaction.from_json(value).items
