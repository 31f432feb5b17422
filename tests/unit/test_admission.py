"""Admission: the right tenant, the right reject, the right number."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import ScpSettings, Settings
from config.tenants import Destination, Sender, Tenant
from scp.admission import (
    VERIFICATION_SLOTS,
    Admission,
    Caller,
    LimitReached,
    Limits,
    Refusal,
    judge,
)

NORTH = Tenant(
    id="north",
    ae_titles=("NORTH_AI",),
    senders=(
        Sender(ae_title="CT1", hosts=("10.1.0.0/16",)),
        Sender(ae_title="CT1", hosts=("10.9.0.1",)),
        Sender(ae_title="GATE", tls_subject="CN=gate,O=North"),
        Sender(ae_title="SHORT", tls_subject="gate"),
    ),
    destinations=(Destination(name="pacs", ae_title="PACS", host="10.1.0.9", port=104),),
)
OPEN = Tenant(id="open", ae_titles=("OPEN_AI",))
SETTINGS = Settings(tenants=(NORTH, OPEN))


def ask(called="NORTH_AI", calling="CT1", address="10.1.2.3", **more):
    caller = Caller(called_ae=called, calling_ae=calling, address=address, **more)
    return judge(SETTINGS, caller)


def test_a_sender_is_admitted_to_its_tenant():
    found = ask()

    assert isinstance(found, Admission)
    assert found.tenant is NORTH
    assert found.may_store


@pytest.mark.parametrize("called", ["NORTH_AI  ", "  NORTH_AI", "NORTH_AI\0\0"])
def test_padding_of_titles_means_nothing(called):
    assert isinstance(ask(called=called, calling="CT1\0"), Admission)


@pytest.mark.parametrize("called", ["north_ai", "NORTH", "NORTH_AI2", "ANY-SCP", ""])
def test_h17_another_called_title_is_refused_as_such(called):
    assert ask(called=called) is Refusal.CALLED_AE


@pytest.mark.parametrize(
    ("calling", "address"),
    [
        ("CT2", "10.1.2.3"),
        ("ct1", "10.1.2.3"),
        ("CT1", "10.2.0.1"),
        ("CT1", "::1"),
        ("", "10.1.2.3"),
    ],
)
def test_h17_another_calling_title_or_address_is_refused_as_such(calling, address):
    assert ask(calling=calling, address=address) is Refusal.CALLING_AE


def test_two_entries_of_one_title_both_count():
    assert isinstance(ask(address="10.9.0.1"), Admission)


def test_an_ipv4_address_in_ipv6_clothes_is_the_same_address():
    assert isinstance(ask(address="::ffff:10.1.2.3"), Admission)


@pytest.mark.parametrize("subject", ["CN=gate,O=North"])
def test_a_required_certificate_admits(subject):
    assert isinstance(ask(calling="GATE", tls_subject=subject), Admission)


@pytest.mark.parametrize("subject", ["", "CN=gate", "CN=gate,O=South", "CN=other,O=North"])
def test_h17_another_certificate_does_not(subject):
    assert ask(calling="GATE", tls_subject=subject) is Refusal.CALLING_AE


def test_a_common_name_may_be_asked_for_alone():
    assert isinstance(ask(calling="SHORT", tls_subject="CN=gate,O=North"), Admission)
    assert ask(calling="SHORT", tls_subject="O=gate") is Refusal.CALLING_AE


def test_a_destination_may_verify_but_not_store():
    found = ask(calling="PACS", address="10.1.0.9")

    assert isinstance(found, Admission)
    assert not found.may_store
    assert ask(calling="PACS", address="10.1.0.10") is Refusal.CALLING_AE


def test_a_tenant_without_senders_admits_anyone_on_loopback_only():
    assert isinstance(ask(called="OPEN_AI", calling="X", local_host="127.0.0.1"), Admission)
    assert ask(called="OPEN_AI", calling="X", local_host="10.0.0.5") is Refusal.CALLING_AE


def test_any_sender_may_be_allowed_off_loopback():
    settings = Settings(tenants=(OPEN,), scp=ScpSettings(host="0.0.0.0", allow_any_sender=True))
    caller = Caller(called_ae="OPEN_AI", calling_ae="X", address="10.0.0.9", local_host="10.0.0.5")

    assert isinstance(judge(settings, caller), Admission)


@given(st.text(max_size=20), st.text(max_size=20), st.ip_addresses().map(str))
def test_no_stranger_is_ever_let_in_to_store(called, calling, address):
    found = ask(called=called, calling=calling, address=address)

    if isinstance(found, Admission) and found.tenant is NORTH:
        assert calling.strip(" \0") in {"CT1", "PACS"}


def test_h15_associations_are_limited_in_all_and_per_sender():
    limits = Limits(ScpSettings(max_associations=3, max_per_sender=2))
    with contextlib.ExitStack() as held:
        held.enter_context(limits.slot(ask()))
        held.enter_context(limits.slot(ask()))
        with pytest.raises(LimitReached, match="one sender"):
            held.enter_context(limits.slot(ask()))
        held.enter_context(limits.slot(ask(address="10.9.0.1")))
        with pytest.raises(LimitReached, match=r"^associations$"):
            held.enter_context(limits.slot(ask(called="OPEN_AI", calling="X")))

    for _ in range(5):  # all were given back
        with limits.slot(ask()):
            pass


def test_h11_verification_has_slots_of_its_own():
    limits = Limits(ScpSettings(max_associations=1))
    echo = ask(is_verification_only=True)
    with contextlib.ExitStack() as held:
        held.enter_context(limits.slot(ask()))
        for _ in range(VERIFICATION_SLOTS):
            held.enter_context(limits.slot(echo))

        with pytest.raises(LimitReached, match="verification"):
            held.enter_context(limits.slot(echo))


def test_associations_of_one_address_are_limited_per_minute(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("scp.admission.time.monotonic", lambda: now)
    limits = Limits(ScpSettings(max_per_minute=2))
    for _ in range(2):
        with limits.slot(ask()):
            pass
    with pytest.raises(LimitReached, match="minute"), limits.slot(ask()):
        pass
    with limits.slot(ask(address="10.1.9.9")):
        pass

    now += 61

    with limits.slot(ask()):
        pass
