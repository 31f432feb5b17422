"""`vigil db backup` and `vigil db restore`: what is there afterwards, and what is refused (H46)."""

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, select, text
from sqlalchemy.orm import Session

from config.settings import load
from db import backup, queue, snapshot
from db.engine import RestoreUnfinished, engine_for, upgrade, upgrade_at
from db.errors import NodeError
from db.intake import Intake
from db.job import JobKind
from db.tables import AuditRow, InstanceRow, JobRow, StudyRow
from node.backup import back_up, restore
from tests.bundles.make import make_bundle
from tests.bundles.sources import head_series
from tests.integration.test_inference_stage import patient
from tests.stage import Stages


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "head")


@pytest.fixture
def stages(engine: Engine, settings, bundle: Path) -> Iterator[Stages]:
    stages = Stages(engine, settings, bundle)
    yield stages
    stages.close()


@pytest.fixture
def empty_database(database_server: URL) -> Iterator[URL]:
    """A database without any table, as a new host has it."""
    name = f"r{uuid.uuid4().hex[:12]}"
    server = create_engine(database_server.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    yield database_server.set(database=name)
    with server.connect() as connection:
        connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    server.dispose()


class Host:
    """A data folder, a database and the configuration that names both."""

    def __init__(self, folder: Path, data_dir: Path, url: URL) -> None:
        self.data_dir, self.url = data_dir, url
        self.config = folder / f"{data_dir.name}.toml"
        shown = url.render_as_string(hide_password=False)
        self.config.write_text(
            f'[node]\ndata_dir = "{data_dir}"\ndatabase_url = "{shown}"\nmin_free_mb = 0\n'
        )

    def rows(self) -> dict[str, list[Any]]:
        """Every row of every table that a backup holds, but for the audit of the backup itself."""
        owner = create_engine(self.url)
        with owner.connect() as connection:
            found = {
                table.name: sorted(map(str, connection.execute(select(table))))
                for table in snapshot._tables(connection)
                if table.name != "audit"
            }
        owner.dispose()
        return found

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.data_dir)): path.read_bytes()
            for path in backup.files(self.data_dir)
        }


@pytest.fixture
def old(settings, database_url: URL, tmp_path: Path) -> Host:
    return Host(tmp_path, settings.node.data_dir, database_url)


@pytest.fixture
def new(empty_database: URL, tmp_path: Path) -> Host:
    return Host(tmp_path, tmp_path / "elsewhere", empty_database)


@pytest.fixture
def told(capsys) -> Callable[[], dict[str, Any]]:
    """The last document that was printed; the stages log on the same stream here."""
    return lambda: json.loads("{\n" + f"\n{capsys.readouterr().out}".rpartition("\n{\n")[2])


def analysed(stages: Stages) -> None:
    stages.receive(patient(head_series()))
    stages.judge()
    stages.infer()


def taken_in(host: Host, stages: Stages) -> list[str]:
    """What is stored once intake has emptied the restored spool; SOP Instance UIDs, sorted."""
    node = engine_for(load(host.config), "node")
    intake = Intake(
        node,
        stages.settings.model_copy(update={"node": load(host.config).node}),
        stages.sandbox,
        readers=1,
    )
    folder = host.data_dir / "spool" / backup.RECEIVER
    while folder.exists() and intake.take(folder):
        pass
    intake.close()
    with Session(node) as session:
        rows = session.scalars(select(InstanceRow)).all()
    node.dispose()
    assert all(row.stored_at is not None for row in rows)
    return sorted(row.sop_instance_uid for row in rows)


def test_h46_a_backup_on_another_host_is_the_same_node(stages, old, new, tmp_path, told):
    analysed(stages)

    assert back_up(tmp_path / "b", as_json=True, config=old.config) == 0
    made = told()
    assert restore(tmp_path / "b", as_json=True, config=new.config) == 0
    restored = told()

    assert new.rows() == old.rows()
    assert new.files() == old.files()
    assert (made["n_studies"], made["n_instances"], made["n_results"]) == (1, 16, 1)
    assert made["n_files"] == restored["n_files"] == len(old.files())
    assert (restored["damaged"], restored["n_to_intake"]) == ([], 0)
    assert taken_in(new, stages) == sorted(one.SOPInstanceUID for one in patient(head_series()))


def test_h46_no_number_is_drawn_twice_after_a_restore(stages, old, new, tmp_path):
    analysed(stages)
    with Session(stages.engine) as session, session.begin():
        # A study that was made and is gone: its number still names a folder of the store.
        gone = StudyRow(tenant="north", origin="dicom", study_instance_uid="1.2")
        session.add(gone)
        session.flush()
        last = gone.id
        session.delete(gone)
    back_up(tmp_path / "b", as_json=True, config=old.config)
    restore(tmp_path / "b", as_json=True, config=new.config)

    node = engine_for(load(new.config), "node")
    with Session(node) as session, session.begin():
        row = StudyRow(tenant="north", origin="dicom", study_instance_uid="1.3")
        session.add(row)
        session.flush()
        assert row.id == last + 1
    node.dispose()


@pytest.mark.parametrize("taken", ["before", "after_the_rows", "after_the_files"])
def test_h46_what_is_acknowledged_when_the_backup_is_made_is_there_once(
    stages, old, new, tmp_path, monkeypatch, taken
):
    """An instance moves from the spool to the store before, while, or after a backup passes."""
    first, *rest = patient(head_series())
    stages.receive([first])
    folder = old.data_dir / "spool" / "test"
    intake, stages.intake.take = stages.intake.take, lambda _: 0
    stages.receive(rest)  # spooled alone
    dump = backup._dump

    def dump_and_take(*arguments):
        made = dump(*arguments)
        if taken == "after_the_rows":
            while intake(folder):
                pass
        return made

    monkeypatch.setattr(backup, "_dump", dump_and_take)
    if taken == "before":
        while intake(folder):
            pass

    assert back_up(tmp_path / "b", as_json=True, config=old.config) == 0
    assert restore(tmp_path / "b", as_json=True, config=new.config) == 0

    assert taken_in(new, stages) == sorted(one.SOPInstanceUID for one in [first, *rest])
    assert list((new.data_dir / "spool").rglob("*.dcm")) == []
    assert len(list((new.data_dir / "store").rglob("*.dcm"))) == 16


def test_h46_rows_whose_file_was_on_its_way_are_finished(stages, old, new, tmp_path, monkeypatch):
    stages.receive(patient(head_series()))
    with Session(stages.engine) as session, session.begin():
        for row in session.scalars(select(InstanceRow)):
            row.stored_at = None  # as if killed between the link and the note

    back_up(tmp_path / "b", as_json=True, config=old.config)
    restore(tmp_path / "b", as_json=True, config=new.config)

    assert len(taken_in(new, stages)) == 16
    assert list((new.data_dir / "spool").rglob("*.dcm")) == []


def test_h46_what_a_worker_of_the_old_host_had_claimed_is_free_and_no_crash(
    stages, old, new, tmp_path
):
    stages.receive(patient(head_series()))
    stages.judge()
    with Session(stages.engine) as session, session.begin():
        assert queue.claim(session, [JobKind.INFER], "old-host", lease_s=3600)

    back_up(tmp_path / "b", as_json=True, config=old.config)
    restore(tmp_path / "b", as_json=True, config=new.config)

    node = engine_for(load(new.config), "node")
    with Session(node) as session, session.begin():
        assert queue.claim(session, [JobKind.INFER], "new-host") is not None
        (job,) = session.scalars(select(JobRow))
        assert (job.worker, job.attempts, job.crashes) == ("new-host", 0, 0)
    node.dispose()


def test_h46_a_backup_of_an_older_version_is_brought_up_to_date(old, new, tmp_path):
    owner = create_engine(old.url)
    with owner.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    upgrade_at(old.url, "0001")
    with owner.begin() as connection:
        connection.execute(
            text("INSERT INTO studies (tenant, origin, study_instance_uid) VALUES ('n', 'd', '1')")
        )
    about = backup.make(owner, old.data_dir, tmp_path / "b", "0.0.1", lambda _: None)
    owner.dispose()

    assert about.schema == "0001"
    assert restore(tmp_path / "b", as_json=True, config=new.config) == 0
    assert len(new.rows()["studies"]) == 1
    with create_engine(new.url).connect() as connection:
        assert snapshot.revision(connection) != "0001"


def test_nobody_stays_signed_in_and_both_acts_are_audited(engine, old, new, tmp_path):
    with Session(engine) as session, session.begin():
        user = "INSERT INTO users (name, role) VALUES ('ann', 'admin') RETURNING id"
        key = session.scalar(text(user))
        session.execute(
            text("INSERT INTO sessions (token_sha256, user_id, csrf, expires_at)"
                 " VALUES ('t', :user, 'c', now() + interval '1 hour')"), {"user": key},
        )  # fmt: skip
    back_up(tmp_path / "b", as_json=True, config=old.config)
    restore(tmp_path / "b", as_json=True, config=new.config)

    owner = create_engine(new.url)
    with Session(owner) as session:
        assert session.scalar(text("SELECT count(*) FROM users")) == 1
        assert session.scalar(text("SELECT count(*) FROM sessions")) == 0
        assert session.scalars(select(AuditRow.action)).all() == ["restore"]
    owner.dispose()
    with Session(engine) as session:
        assert session.scalars(select(AuditRow.action)).all() == ["backup"]


def test_a_backup_goes_into_no_folder_that_has_something(old, stages, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter").touch()

    for folder in (tmp_path / "b", old.data_dir / "b"):
        with pytest.raises(NodeError) as refused:
            back_up(folder, as_json=True, config=old.config)
        assert refused.value.code == "not_empty"


def test_nothing_is_restored_over_what_is_there(stages, old, new, tmp_path):
    analysed(stages)
    back_up(tmp_path / "b", as_json=True, config=old.config)
    before = old.rows(), old.files()
    other = Host(tmp_path, tmp_path / "other", old.url)  # an empty folder, a database in use

    for target in (old, other):
        with pytest.raises(NodeError) as refused:
            restore(tmp_path / "b", as_json=True, config=target.config)
        assert refused.value.code == "not_empty"
    assert (old.rows(), old.files()) == before


def test_what_is_no_whole_backup_is_refused_and_nothing_is_written(stages, old, new, tmp_path):
    analysed(stages)
    back_up(tmp_path / "b", as_json=True, config=old.config)
    about = json.loads((tmp_path / "b" / "backup.json").read_text())
    damages: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
        "cut off": ("backup.json", lambda old: b""),
        "newer": ("backup.json", lambda old: json.dumps({**about, "schema": "9999"}).encode()),
        "the list": ("files.tsv", lambda old: old[:-20]),
        "a table": ("database/studies.copy.gz", lambda old: old[:-1]),
    }

    for name, change in damages.values():
        path = tmp_path / "b" / name
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        with pytest.raises(NodeError) as refused:
            restore(tmp_path / "b", as_json=True, config=new.config)
        assert refused.value.code == "bad_backup"
        assert not new.data_dir.exists()
        path.write_bytes(whole)
    assert restore(tmp_path / "b", as_json=True, config=new.config) == 0


def test_a_damaged_file_is_left_out_and_named_and_the_others_are_there(
    stages, old, new, tmp_path, told
):
    analysed(stages)
    back_up(tmp_path / "b", as_json=True, config=old.config)
    told()
    damaged, gone, *_ = sorted((tmp_path / "b" / "files" / "store").rglob("*.dcm"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    gone.unlink()

    assert restore(tmp_path / "b", as_json=True, config=new.config) == 1

    names = [str(one.relative_to(tmp_path / "b" / "files")) for one in (damaged, gone)]
    assert told()["damaged"] == names
    assert set(old.files()) - set(new.files()) == set(names)


def test_a_backup_says_what_should_have_been_there(stages, old, tmp_path, told):
    analysed(stages)
    next((old.data_dir / "store").rglob("*.dcm")).unlink()

    assert back_up(tmp_path / "b", as_json=True, config=old.config) == 1
    assert told()["n_missing"] == 1


def test_a_node_does_not_start_on_half_a_restore(stages, old, new, tmp_path, monkeypatch):
    analysed(stages)
    back_up(tmp_path / "b", as_json=True, config=old.config)

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "load", cut)
    with pytest.raises(KeyboardInterrupt):
        restore(tmp_path / "b", as_json=True, config=new.config)

    settings = load(new.config)
    for start in (lambda: upgrade(settings), lambda: engine_for(settings, "node")):
        with pytest.raises(RestoreUnfinished):
            start()
