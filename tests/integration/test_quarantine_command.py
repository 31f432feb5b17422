"""`vigil quarantine` and `vigil withdraw` as an operator types them, over a node that received."""

import json
import sys
import uuid

import pytest
import structlog
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from config.tenants import Tenant
from db.sandbox import Sandbox
from db.tables import AnalysisRow, InstanceRow, QuarantineRow, StudyRow
from node import cli
from tests.builders import changed, ct_image, ct_series, other_patient, other_pixels
from tests.delivery import Node
from tests.reception import Reception

NORTH = Tenant(id="north", ae_titles=("NORTH_AI",))


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2, memory_mb=768, cpu_s=10) as box:
        yield box


@pytest.fixture
def node(settings, engine, sandbox):
    found = Reception(settings.model_copy(update={"tenants": (NORTH,)}), engine, sandbox)
    yield found
    found.box.close()
    found.intake.close()


@pytest.fixture
def vigil(monkeypatch, capsys, settings, tmp_path):
    """Run the command in this process; returns exit status, stdout and stderr."""
    path = tmp_path / "vigil.toml"
    path.write_text(
        f'[node]\ndata_dir = "{settings.node.data_dir}"\n'
        f'database_url = "{settings.node.database_url.get_secret_value()}"\n'
        '[[tenants]]\nid = "north"\nae_titles = ["NORTH_AI"]\n'
    )
    monkeypatch.setenv("COLUMNS", "60")

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()  # what the stages have logged so far
        monkeypatch.setattr(sys, "argv", ["vigil", *map(str, arguments), "--config", str(path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    yield run
    structlog.reset_defaults()


def test_the_list_shows_all_that_a_decision_needs_on_a_narrow_terminal(vigil, node):
    image = ct_image()
    node.file(image)
    (key,) = node.file(*other_patient([image]))

    status, out, _ = vigil("quarantine", "list")

    assert status == 0
    for whole in (str(key), image.SOPInstanceUID, image.StudyInstanceUID, image.AccessionNumber):
        assert whole in out
    assert "differs in patient ID, patient name" in out
    assert image.PatientID in out
    assert "OTHER-1" in out
    assert "vigil quarantine release" in out


def test_a_corrected_study_is_listed_as_one_matter_with_every_id(vigil, node):
    images = ct_series(slices=3)
    node.file(*images)
    keys = node.file(*other_patient(images))

    _, out, _ = vigil("quarantine", "list")

    assert all(str(key) in out for key in keys)
    assert out.count("differs in") == 1
    assert "3 alike; its study has 3 instances" in out


def test_the_list_for_a_program_says_which_values_differ(vigil, node):
    one, two = ct_series(slices=2)
    node.file(one, two)
    node.file(other_pixels(*changed([one], RescaleIntercept=-1000)))
    node.file(two, sop_instance_uid="1.2.3")

    status, out, _ = vigil("quarantine", "list", "--json")

    conflict, mismatch = json.loads(out)
    assert status == 0
    assert [one["what"] for one in conflict["differs"]] == ["rescale", "pixel data (SHA-256)"]
    assert conflict["differs"][0]["newcomer"] == "-1000.0"
    assert conflict["holds_study"] == conflict["study_instance_uid"] == one.StudyInstanceUID
    assert conflict["accession_number"] == one.AccessionNumber
    assert conflict["results_out"] == []
    assert (mismatch["code"], mismatch["holds_study"]) == ("uid_mismatch", None)
    assert mismatch["accession_number"] == one.AccessionNumber
    assert mismatch["release"].startswith("is filed under the UID that stands in the image")


def test_what_a_sender_wrote_moves_no_cursor(vigil, node):
    image = ct_image()
    node.file(image)
    node.file(*changed([image], PatientName="[red]X^\x1b[2J\u202eY", PatientID="E\x1b[31m"))

    status, out, _ = vigil("quarantine", "list")

    assert status == 0
    assert "\x1b[2J" not in out
    assert "\u202e" not in out
    assert "[red]X" in out


def test_all_that_is_set_aside_beside_a_study_is_discarded_at_once(vigil, node):
    series = ct_series(slices=3)
    node.file(*series)
    wrong = node.file(*changed(series[:2], PatientID="SOMEBODY-ELSE"))
    study = str(node.one(StudyRow).public_id)

    status, out, _ = vigil("quarantine", "discard", "--study", study, "--json")
    again = vigil("quarantine", "discard", "--study", study)
    neither = vigil("quarantine", "discard")

    told = json.loads(out)
    assert (status, told["study"], told["is_held"]) == (0, study, False)
    assert sorted(told["ids"]) == sorted(map(str, wrong))
    assert {row.state for row in node.all(QuarantineRow)} == {"DISCARDED"}
    assert (again[0], neither[0]) == (1, 2)
    assert "nothing is set aside" in again[2]


def test_a_release_and_a_discard_say_what_they_did(vigil, node):
    one, two = ct_series(slices=2)
    first, _ = node.file(one, two)
    (a,) = node.file(other_pixels(one))
    (b,) = node.file(other_pixels(two))

    released = vigil("quarantine", "release", a, "--json")
    discarded = vigil("quarantine", "discard", b, "--json")

    study = str(node.one(StudyRow).public_id)
    assert (released[0], discarded[0]) == (0, 0)
    assert json.loads(released[1]) == {
        "action": "released", "study": study, "released": [str(a)], "replaced": [str(first)],
        "is_other_patient": False, "is_held": True,
    }  # fmt: skip
    assert json.loads(discarded[1]) == {
        "action": "discarded", "id": str(b), "study": study, "is_held": False,
    }  # fmt: skip
    assert vigil("quarantine", "list")[1] == "Nothing is in the quarantine.\n"


def test_a_corrected_study_is_released_as_a_whole(vigil, node):
    images = ct_series(slices=2)
    node.file(*images)
    right = node.file(*other_patient(images))

    status, out, _ = vigil("quarantine", "release", "--study", images[0].AccessionNumber)

    assert status == 0
    assert "corrected patient" in out
    assert "not held" in out
    assert {row.id for row in node.all(InstanceRow)} == set(right)


def test_what_cannot_be_is_one_line_and_status_1(vigil, node):
    one, two = ct_series(slices=2)
    node.file(one)
    (key,) = node.file(*other_patient([two]))

    refused = vigil("quarantine", "release", key, "--json")
    unknown = vigil("quarantine", "release", uuid.uuid4())
    gone = vigil("quarantine", "discard", uuid.uuid4(), "--json")

    assert [done[0] for done in (refused, unknown, gone)] == [1, 1, 1]
    assert refused[1] == ""
    assert refused[2].startswith("cannot_be_released: it is of another patient")
    assert "OTHER-1" not in refused[2]
    assert "not_open" in unknown[2]
    assert {row.state for row in node.all(QuarantineRow)} == {"OPEN"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["quarantine", "release"],
        ["quarantine", "release", "no-id"],
        ["quarantine", "discard", "no-id"],
        ["quarantine", "release", str(uuid.UUID(int=1)), "--study", "A1"],
        ["withdraw", "A1", "--yes", "--reason", "whim"],
        ["withdraw", "A1", "--yes", "--note", "Gr\u00fc\u00dfe"],
        ["withdraw", "A1", "--json"],
        ["withdraw", "A1"],
    ],
)
def test_wrong_usage_is_status_2(vigil, node, arguments):
    assert vigil(*arguments)[0] == 2


def built(settings, engine, sandbox) -> Node:
    """A node with a result that waits to be sent."""
    made = Node(engine, settings, sandbox).sends_to()
    made.found(made.study(accession_number="A1"))
    made.deliverer.run_once()
    return made


def test_a_withdrawal_says_what_it_did_and_where_tells_of_it(vigil, settings, engine, sandbox):
    built(settings, engine, sandbox)

    status, out, _ = vigil("withdraw", "A1", "--yes", "--json", "--note", "wrong patient")
    again = vigil("withdraw", "A1", "--yes")
    resend = vigil("resend", "A1")

    done = json.loads(out)
    assert status == 0
    assert [len(one["results"]) for one in done["analyses"]] == [1]
    assert done["analyses"][0]["destinations"] == []
    assert (again[0], resend[0]) == (1, 1)
    assert "withdrawn already" in again[2]
    assert "never sent again" in resend[2]
    (story,) = json.loads(vigil("where", "A1", "--json")[1])
    (analysis,) = story["analyses"]
    assert (analysis["state"], analysis["result"]) == ("WITHDRAWN", None)
    assert analysis["withdrawals"][0]["words"] == "wrong patient"
    assert "patient-safety: wrong patient" in vigil("where", "A1")[1]
    assert "1 withdrawn" in vigil("status")[1].replace("\n", " ")


def test_nothing_is_withdrawn_where_there_is_nothing(vigil, settings, engine, sandbox):
    made = Node(engine, settings, sandbox).sends_to()
    made.study(accession_number="A1")

    status, out, err = vigil("withdraw", "A1", "--yes", "--json")

    assert (status, out) == (1, "")
    assert "nothing was issued yet" in err


def test_a_shadows_result_is_not_withdrawn(vigil, settings, engine, sandbox):
    built(settings, engine, sandbox)
    with Session(engine) as session, session.begin():
        session.execute(update(AnalysisRow).values(is_shadow=True))

    assert vigil("withdraw", "A1", "--yes")[0] == 1

    with Session(engine) as session:
        assert session.scalars(select(AnalysisRow.state)).one() == "DELIVERED"
