"""The `vigil` command: what it answers, on which stream, and with which exit status."""

import json
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

import pytest
import structlog
from sqlalchemy.orm import Session

from config.settings import Settings
from db.tables import AnalysisRow, EventRow, ResultRow, StudyRow
from node import cli
from node.pacs import Pacs
from node.phantom import write
from node.send_command import parse_address
from tests.builders import ct_series

# pynetdicom leaves the socket of a refused connection to the garbage collector (transport.py,
# _shutdown_socket: close() is skipped when shutdown() fails, as it does before a connection).
no_connection = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def pacs(tmp_path):
    with Pacs(tmp_path / "pacs") as pacs:
        yield pacs


@pytest.fixture
def scan(tmp_path):
    """A folder with three images and a file that is none."""
    write(ct_series(slices=3, matrix=32), tmp_path / "scan")
    (tmp_path / "scan" / "notes.txt").write_text("no image")
    return tmp_path / "scan"


@pytest.fixture
def vigil(monkeypatch, capsys):
    """Run the command in this process; returns exit status, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vigil", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    yield run
    structlog.reset_defaults()


@pytest.fixture
def config(settings: Settings, tmp_path):
    path = tmp_path / "vigil.toml"
    path.write_text(
        f'[node]\ndata_dir = "{settings.node.data_dir}"\n'
        f'database_url = "{settings.node.database_url.get_secret_value()}"\n'
    )
    return path


def test_help_names_every_command_in_its_group(vigil):
    status, out, _ = vigil("--help")

    assert status == 0
    for word in ("Run the node", "serve", "demo", "send", "predict", "where", "doctor", "users"):
        assert word in out


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["send"], ["serve", "--nonsense"], ["send", "/nowhere/at/all"]]
)
def test_wrong_usage_is_status_2(vigil, arguments):
    status, out, _ = vigil(*arguments)

    assert status == 2
    assert not out


@pytest.mark.parametrize("command", ["serve", "status", "doctor"])
def test_a_wrong_setting_is_status_2_and_names_file_and_line(vigil, tmp_path, command):
    path = tmp_path / "vigil.toml"
    path.write_text("[scp]\nprot = 104\n")

    status, _, err = vigil(command, "--config", path)

    assert status == 2
    assert "vigil.toml:2: scp.prot: unknown key" in err.replace("\n", "")


@pytest.mark.parametrize(
    "module", ["node.cli", "node.send_command", "node.pacs", "node.supervisor"]
)
def test_light_commands_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_send_stores_every_image_and_passes_over_the_rest(vigil, pacs, scan):
    status, out, _ = vigil(
        "send", scan, "--to", f"127.0.0.1:{pacs.port}", "--aec", "PACS", "--json"
    )

    answer = json.loads(out)
    assert status == 0
    assert answer["counts"] == {"skipped": 1, "stored": 3}
    assert len(pacs.received(called_ae="PACS")) == 3


def test_send_keeps_the_bytes_of_the_data_set(vigil, pacs, scan):
    vigil("send", scan, "--to", f"127.0.0.1:{pacs.port}")

    sent = (scan / "00001.dcm").read_bytes()
    kept = pacs.received()[0].path.read_bytes()
    assert sent[-2048:] == kept[-2048:]


def test_send_takes_a_zip(vigil, pacs, scan, tmp_path):
    archive = tmp_path / "scan.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in scan.iterdir():
            packed.write(path, f"../../outside/{path.name}")

    status, _, _ = vigil("send", archive, "--to", f"127.0.0.1:{pacs.port}")

    assert status == 0
    assert len(pacs.received()) == 3
    assert not (tmp_path.parent / "outside").exists()


def test_a_refused_image_is_named_and_fails_the_command(vigil, pacs, scan):
    pacs.answer = 0xA700

    status, out, _ = vigil("send", scan, "--to", f"127.0.0.1:{pacs.port}")

    assert status == 1
    assert "00002.dcm: answered 0xA700" in out


@no_connection
def test_no_connection_fails_the_command_with_every_file_named(vigil, scan):
    status, out, _ = vigil("send", scan, "--to", "127.0.0.1:9", "--json")

    answer = json.loads(out)
    assert status == 1
    assert [f["reason"] for f in answer["files"] if f["outcome"] == "not sent"] == [
        "no connection"
    ] * 3


def test_a_folder_without_dicom_is_wrong_usage(vigil, tmp_path):
    status, _, err = vigil("send", tmp_path)

    assert status == 2
    assert "no DICOM file" in err


@pytest.mark.parametrize(
    ("text", "address"),
    [("pacs:104", ("pacs", 104)), ("10.0.0.1", ("10.0.0.1", 104)), ("[::1]:4242", ("::1", 4242))],
)
def test_addresses(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["pacs:port", ":104", "pacs:0", "pacs:70000"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


def received_study(engine, **values) -> uuid.UUID:
    """A study with one analysis and one event, as the stages would leave it."""
    fields = {"tenant": "default", "origin": "dicom", "study_instance_uid": "1.2.3", **values}
    with Session(engine) as session, session.begin():
        study = StudyRow(accession_number="A1", patient_id="P1", sender="CT1", **fields)
        session.add(study)
        session.flush()
        where = {"study_id": study.id, "tenant": study.tenant, "origin": "dicom"}
        session.add(
            AnalysisRow(bundle="ich", state="NOT_ANALYSED", reason="too few slices", **where)
        )
        session.add(EventRow(kind="study_received", detail={"n": 3}, **where))
        return study.public_id


@pytest.mark.parametrize("text", ["A1", "P1", "1.2.3"])
def test_where_finds_a_study_by_what_people_have_in_hand(vigil, config, engine, text):
    received_study(engine)

    status, out, _ = vigil("where", text, "--json", "--config", config)

    (story,) = json.loads(out)
    assert status == 0
    assert story["analyses"][0]["reason"] == "too few slices"
    assert [event["event"] for event in story["events"]] == ["study_received"]


def test_where_tells_two_tenants_studies_of_one_uid_apart(vigil, config, engine):
    received_study(engine)
    received_study(engine, tenant="south")

    both = json.loads(vigil("where", "1.2.3", "--json", "--config", config)[1])
    one = json.loads(vigil("where", "1.2.3", "--tenant", "south", "--json", "--config", config)[1])

    assert [story["tenant"] for story in both] == ["south", "default"]
    assert [story["tenant"] for story in one] == ["south"]


def test_where_says_so_when_nothing_is_known(vigil, config):
    status, out, err = vigil("where", "nothing", "--config", config)

    assert (status, out) == (1, "")
    assert "unknown_study" in err


def test_rerun_queues_the_study_and_resend_has_nothing_to_send(vigil, config, engine):
    received_study(engine)

    again = vigil("rerun", "A1", "--config", config)
    nothing = vigil("resend", "A1", "--config", config)

    assert again[:2] == (0, "ich: queued again\n")
    assert nothing[0] == 1
    with Session(engine) as session:
        assert session.query(AnalysisRow).one().state == "QUEUED"


def test_rerun_tells_a_script_what_it_did(vigil, config, engine):
    received_study(engine)

    status, out, _ = vigil("rerun", "A1", "--json", "--config", config)

    told = json.loads(out)
    assert status == 0
    assert told["tenant"] == "default"
    assert told["analyses"] == [{"bundle": "ich", "done": "queued again"}]


def test_status_counts_by_tenant_and_state(vigil, config, engine):
    received_study(engine)
    received_study(engine, tenant="south")

    status, out, _ = vigil("status", "--json", "--config", config)

    tenants = json.loads(out)["tenants"]
    assert status == 0
    assert tenants["south"]["analyses"] == {"NOT_ANALYSED": 1}
    assert set(tenants) == {"default", "south"}


def test_status_counts_no_shadow_as_a_result(vigil, config, engine):
    received_study(engine)
    with Session(engine) as session, session.begin():
        row = session.query(AnalysisRow).one()
        row.is_shadow = True
        session.add(
            ResultRow(
                id=uuid.uuid4(), analysis_id=row.id, study_id=row.study_id, tenant=row.tenant,
                origin="dicom", bundle=row.bundle, result_no=1, finding={}, is_positive=True,
                urgency="STAT",
            )
        )  # fmt: skip

    _, out, _ = vigil("status", "--json", "--config", config)

    tenant = json.loads(out)["tenants"]["default"]
    assert (tenant["analyses"], tenant["results"], tenant["positive"]) == ({}, 0, 0)


def test_status_for_a_person_says_the_same(vigil, config, engine):
    received_study(engine)

    _, out, _ = vigil("status", "--config", config)

    assert "1 not_analysed" in out
    assert "MB free" in out


def test_status_of_a_node_that_never_ran_does_not_make_one(vigil, tmp_path):
    path = tmp_path / "vigil.toml"
    path.write_text(f'[node]\ndata_dir = "{tmp_path / "var"}"\n')

    status, _, err = vigil("status", "--config", path)

    assert status == 1
    assert "vigil serve" in err
    assert not (tmp_path / "var").exists()


def test_users_are_added_listed_disabled_and_reset(vigil, config):
    link = vigil(
        "users", "add", "anna", "--role", "reader", "--tenant", "default", "--config", config
    )
    vigil("users", "disable", "anna", "--config", config)
    reset = vigil("users", "reset", "anna", "--config", config)
    listed = json.loads(vigil("users", "list", "--json", "--config", config)[1])

    assert link[0] == reset[0] == 0
    assert "/login/link/" in link[1]
    assert link[1] != reset[1]
    assert [(u["name"], u["is_disabled"], u["has_password"]) for u in listed] == [
        ("anna", True, False)
    ]


@pytest.mark.parametrize(
    "arguments",
    [["anna", "--role", "reader"], ["anna", "--role", "king"], ["anna", "--tenant", "elsewhere"]],
)
def test_a_user_that_makes_no_sense_is_refused(vigil, config, arguments):
    status, _, err = vigil("users", "add", *arguments, "--config", config)

    assert status == 1
    assert "bad_account" in err


@no_connection
def test_doctor_reports_a_model_that_is_missing(vigil, config: Path):
    with config.open("a") as file:
        file.write('[inference]\nmodels = ["nowhere/ich"]\ndevice = "cpu"\n')

    status, out, _ = vigil("doctor", "--json", "--config", config)

    grades = {check["name"]: check["grade"] for check in json.loads(out)["checks"]}
    assert status == 1
    assert grades["model ich"] == "bad"
    assert grades["database"] == "good"
    assert grades["receiver as VIGIL"] == "bad"
