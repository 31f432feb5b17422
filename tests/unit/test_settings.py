"""Settings: an empty file works; a wrong one stops with file, line, key and reason."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from config.settings import Settings, SettingsError, load
from config.tenants import AETitle, Sender, Tenant

ROOT = Path(__file__).parents[2]


def load_text(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "vigil.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def error_of(tmp_path: Path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_text(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_an_empty_file_is_a_whole_configuration(tmp_path):
    settings = load_text(tmp_path, "")

    assert settings.by_ae_title["VIGIL"].id == "default"
    assert settings.scp.host == "127.0.0.1"
    assert settings.tenants[0].destinations == ()


def test_the_example_is_valid():
    settings = load(ROOT / "config" / "example.toml")

    assert [tenant.id for tenant in settings.tenants] == ["north", "south"]
    assert settings.by_ae_title["NORTH_AI"].lane_of("CT1") == "stat"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[node]\nfoo = 1", "vigil.toml:2: node.foo: unknown key"),
        ("[scp]\n\nport = 70000", "vigil.toml:3: scp.port: Input should be less than or equal"),
        ("x y", "vigil.toml: Expected"),
        (
            '[[tenants]]\nid = "a"\nae_titles = ["A"]\n[[tenants]]\nid = "b"\nae_titles = ["A"]',
            "AE title 'A' belongs to both 'a' and 'b'",
        ),
        (
            '[[tenants]]\nid = "a"\nae_titles = ["A"]\n[[tenants.senders]]\n'
            'ae_title = "CT"\nhosts = ["10.0.0.0/33"]',
            "vigil.toml:6: tenants.0.senders.0.hosts: '10.0.0.0/33' does not appear",
        ),
        ('[scp]\nhost = "0.0.0.0"', "lists no senders and would accept anyone on 0.0.0.0"),
        (
            '[[tenants]]\nid = "a"\nae_titles = ["A"]\nmodels = ["other"]',
            "uses ['other'], not among inference.models",
        ),
        (
            '[[tenants]]\nid = "a"\nae_titles = ["A"]\nthresholds = { "any" = 0.5 }',
            "'any' is not <one of ['ich']>.<label>",
        ),
        ("[scp]\ntls_port = 2762", "vigil.toml:1: scp: tls_port needs tls_cert and tls_key"),
    ],
)
def test_a_wrong_configuration_names_line_key_and_reason(tmp_path, text, message):
    assert message in error_of(tmp_path, text)


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        load(tmp_path / "absent.toml")


def test_the_environment_overrides_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("VIGIL_SCP__PORT", "4242")

    settings = load_text(tmp_path, "[scp]\nport = 104\nprocesses = 2")

    assert (settings.scp.port, settings.scp.processes) == (4242, 2)


def test_no_secret_is_printed(tmp_path):
    text = '[node]\ndatabase_url = "postgresql://u:hunter2@db/vigil"'

    settings = load_text(tmp_path, text)

    assert "hunter2" not in repr(settings)
    assert "hunter2" not in error_of(tmp_path, text + "\nfoo = 1")


@given(st.text(min_size=0, max_size=20))
def test_an_ae_title_is_what_the_standard_says(text):
    legal = (
        1 <= len(text) <= 16
        and all(" " <= c <= "~" and c != "\\" for c in text)
        and text == text.strip(" ")
    )

    try:
        TypeAdapter(AETitle).validate_python(text)
        accepted = True
    except ValidationError:
        accepted = False
    assert accepted == legal


def test_a_wrong_ae_title_is_explained_once(tmp_path):
    told = error_of(tmp_path, '[[tenants]]\nid = "a"\nae_titles = ["MUCH_TOO_LONG_TITLE"]\n')

    assert "tenants.0.ae_titles.0: an AE title has 1 to 16 printable ASCII characters" in told
    assert len(told.splitlines()) == 1


def test_a_quiet_period_longer_than_any_wait_is_refused(tmp_path):
    text = '[[tenants]]\nid = "a"\nae_titles = ["A"]\nquiet_period_s = 5\nmax_wait_s = 1\n'

    assert "tenant a: quiet_period_s 5 is longer than max_wait_s 1" in error_of(tmp_path, text)


@pytest.mark.parametrize(
    ("calling_ae", "commitment"), [("OTHER", True), ("A", True), ("OTHER", False)]
)
def test_a_destination_that_is_to_commit_must_be_able_to_report(tmp_path, calling_ae, commitment):
    """It reports to the title that asked it: as any other peer, to one of the tenant's own."""
    text = (
        '[[tenants]]\nid = "a"\nae_titles = ["A"]\n'
        '[[tenants.destinations]]\nname = "pacs"\nae_title = "P"\nhost = "h"\nport = 104\n'
        f'calling_ae = "{calling_ae}"\ncommitment = {str(commitment).lower()}\n'
    )
    if commitment and calling_ae != "A":
        assert "pacs would report on commitment to its calling_ae OTHER" in error_of(tmp_path, text)
    else:
        path = tmp_path / "vigil.toml"
        path.write_text(text)
        assert load(path).tenants[0].destinations[0].calling_ae == calling_ae


def test_a_sender_is_known_by_title_and_address():
    ct = Sender(ae_title="CT1", hosts=("10.1.0.0/16", "192.168.1.5"), lane="stat")
    tenant = Tenant(id="a", ae_titles=("A",), senders=(ct,))

    assert tenant.sender("CT1", "10.1.2.3") is ct
    assert tenant.sender("CT1 ", "::ffff:192.168.1.5") is ct
    assert tenant.sender("CT1", "10.2.0.1") is None
    assert tenant.sender("ct1", "10.1.2.3") is None


def test_the_documentation_lists_every_setting():
    text = (ROOT / "config" / "example.toml").read_text(encoding="utf-8")
    parts = [Settings.model_fields[name].annotation for name in Settings.model_fields]
    names = {
        field for part in parts if hasattr(part, "model_fields") for field in part.model_fields
    } | set(Tenant.model_fields)

    missing = [name for name in names if not re.search(rf"\b{name}\b", text)]

    assert missing == []
