"""The database: embedded, or any server by its URL."""

import socket
import subprocess
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from config.settings import NodeSettings, Settings
from db import embedded
from db.engine import engine_for, upgrade
from db.tables import Base


def embedded_settings(folder: Path) -> Settings:
    return Settings(node=NodeSettings(data_dir=folder / "var"))


@pytest.fixture
def embedded_node(tmp_path):
    settings = embedded_settings(tmp_path)
    yield settings
    embedded.stop(settings.node.data_dir)


def test_the_embedded_database_starts_upgrades_and_survives_a_restart(embedded_node):
    upgrade(embedded_node)
    engine = engine_for(embedded_node, "node")
    with engine.begin() as connection:
        assert connection.scalar(text("SELECT current_user")) == "vigil_node"
        connection.execute(text("INSERT INTO processes (name, stage) VALUES ('a', 'b')"))
    engine.dispose()
    embedded.stop(embedded_node.node.data_dir)
    assert not embedded.is_running(embedded_node.node.data_dir)

    upgrade(embedded_node)

    engine = engine_for(embedded_node, "node")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT name FROM processes")) == "a"
    engine.dispose()


def test_processes_that_start_together_share_one_server(embedded_node):
    threads = [threading.Thread(target=upgrade, args=(embedded_node,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert embedded.is_running(embedded_node.node.data_dir)


def test_the_cluster_and_its_password_are_private(embedded_node):
    upgrade(embedded_node)
    home = embedded_node.node.data_dir / "database"

    assert (home / "password").stat().st_mode & 0o777 == 0o600
    assert (home / "cluster").stat().st_mode & 0o777 == 0o700
    assert "trust" not in [
        line.split()[-1]
        for line in (home / "cluster" / "pg_hba.conf").read_text().splitlines()
        if line and not line.startswith("#")
    ]


def test_a_wrong_password_is_refused(embedded_node):
    url = embedded.start(embedded_node.node.data_dir).set(password="wrong")
    engine = create_engine(url)

    with pytest.raises(Exception, match="password authentication failed"):
        engine.connect()
    engine.dispose()


@pytest.fixture
def other_server(tmp_path):
    """An older PostgreSQL that listens on TCP, as a hospital's own would; its URL."""
    bin_folder = embedded.binaries().parents[1] / "pginstall" / "bin"
    folder = tmp_path / "other"
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "pw").write_text("secret")
    (folder / "data").mkdir(mode=0o700)
    for path in (folder / "pw", folder / "data"):
        embedded._give_to_server_user(path)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [*embedded._as_server_user(folder), str(bin_folder / program), *arguments],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip

    (folder / "cluster").symlink_to("data")
    run("initdb", "-D", "data", "-U", "site", "--pwfile", "pw", "--auth=scram-sha-256")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories="
    run("pg_ctl", "start", "-D", "data", "-w", "-o", options, "-l", "data/log")
    yield f"postgresql://site:secret@127.0.0.1:{port}/postgres"
    run("pg_ctl", "stop", "-D", "data", "-m", "immediate")


def test_another_server_serves_as_well_by_its_url(other_server, tmp_path):
    node = NodeSettings(data_dir=tmp_path / "var", database_url=other_server)
    settings = Settings(node=node)

    upgrade(settings)
    upgrade(settings)  # again: nothing to do

    engine = engine_for(settings, "web")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT current_user")) == "vigil_web"
        version = connection.scalar(text("SHOW server_version_num"))
        assert int(version) < 180000
    engine.dispose()
    assert not (tmp_path / "var" / "database").exists()


def test_the_migrations_make_what_the_tables_say(database_url):
    engine = create_engine(database_url)

    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        difference = compare_metadata(context, Base.metadata)
    engine.dispose()

    # Alembic keeps its own version table.
    assert [d for d in difference if "alembic_version" not in str(d)] == []
