"""Databases of an older version: upgraded, they lose nothing and have today's schema."""

import importlib
import uuid
from collections.abc import Iterator

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.orm import Session

from db import claims, queue
from db.engine import alembic_config, engine_at, upgrade_at
from db.job import JobKind
from db.tables import Base

RESULT = uuid.UUID(int=1)
#: Of tables that are no more than they were: study, analysis, result, object, delivery, quarantine.
ROWS = (
    "INSERT INTO studies (id, tenant, origin, study_instance_uid)"
    " OVERRIDING SYSTEM VALUE VALUES (7, 'north', 'dicom', '1.2')",
    "INSERT INTO analyses (id, study_id, tenant, origin, bundle)"
    " OVERRIDING SYSTEM VALUE VALUES (8, 7, 'north', 'dicom', 'ich')",
    "INSERT INTO results (id, analysis_id, study_id, tenant, origin, bundle, result_no, finding,"
    f" is_positive, urgency) VALUES ('{RESULT}', 8, 7, 'north', 'dicom', 'ich', 1, '{{}}', true,"
    " 'STAT')",
    "INSERT INTO objects (id, result_id, study_id, tenant, origin, variant, role, seq,"
    " sop_class_uid, sop_instance_uid, series_instance_uid, transfer_syntax_uid, sha256,"
    f" size_bytes) VALUES ('{uuid.UUID(int=2)}', '{RESULT}', 7, 'north', 'dicom', 'v', 'sr', 1,"
    " '1', '1.9', '1', '1', '', 1)",
    "INSERT INTO deliveries (result_id, analysis_id, study_id, tenant, origin, destination, lane,"
    f" expires_at) VALUES ('{RESULT}', 8, 7, 'north', 'dicom', 'pacs', 1, now())",
    "INSERT INTO quarantine (id, tenant, origin, study_id, code, reason)"
    f" VALUES ('{uuid.UUID(int=3)}', 'north', 'dicom', 7, 'second_patient', '')",
)
#: What is built has its analysis since then.
ROWS_OF_SECOND = tuple(
    row.replace("(id, result_id, study_id,", "(id, result_id, analysis_id, study_id,").replace(
        f"'{RESULT}', 7, 'north', 'dicom', 'v'", f"'{RESULT}', 8, 7, 'north', 'dicom', 'v'"
    )
    for row in ROWS
)


@pytest.fixture
def empty(database_server: URL) -> Iterator[URL]:
    name = f"t{uuid.uuid4().hex[:12]}"
    server = create_engine(database_server.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    yield database_server.set(database=name)
    with server.connect() as connection:
        connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    server.dispose()


def run(url: URL, *statements: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def upgrade_to(url: URL, revision: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), revision)
    engine.dispose()


def first(url: URL) -> None:
    """As the first version made it."""
    upgrade_to(url, "0001")
    assert "notices" not in tables(url)


def second(url: URL) -> None:
    """As a version made it that knew notices, and no activations."""
    upgrade_to(url, "0002")
    assert "activations" not in tables(url)


def third(url: URL) -> None:
    """As a version made it that knew activations, and no withdrawals."""
    upgrade_to(url, "0003")
    assert "withdrawals" not in tables(url)


def between(url: URL) -> None:
    """As a version made it whose 0001 had most of 0002."""
    first(url)
    notices = importlib.import_module("db.migrations.versions.0002_notices")
    made = (*notices._NOTICES, *notices._BUNDLES, *notices._QUARANTINE, *notices._OWNERS[:2])
    run(url, *made)


def tables(url: URL) -> set[str]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.scalars(
            text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        )
        names = set(found)
    engine.dispose()
    return names


@pytest.fixture(params=[first, between, second, third])
def upgraded(request, empty) -> Iterator[Engine]:
    """An older database with a few rows, upgraded; as its owner."""
    request.param(empty)
    run(empty, *(ROWS if request.param in (first, between) else ROWS_OF_SECOND))
    upgrade_at(empty)
    engine = create_engine(empty)
    yield engine
    engine.dispose()


def test_the_rows_are_still_there_and_what_was_built_has_its_analysis(upgraded):
    with Session(upgraded) as session:
        for table in ("studies", "analyses", "results", "objects", "deliveries", "quarantine"):
            assert session.scalar(text(f"SELECT count(*) FROM {table}")) == 1, table
        assert session.scalar(text("SELECT analysis_id FROM objects")) == 8
        assert session.scalar(text("SELECT study_instance_uid FROM quarantine")) == ""


def test_the_schema_is_what_the_tables_say(upgraded):
    with upgraded.connect() as connection:
        difference = compare_metadata(MigrationContext.configure(connection), Base.metadata)

    assert [d for d in difference if "alembic_version" not in str(d)] == []


def test_nothing_that_was_built_outlives_its_analysis(upgraded):
    with Session(upgraded) as session, session.begin():
        session.execute(text("DELETE FROM analyses"))
        assert session.scalar(text("SELECT count(*) FROM objects")) == 0
        assert session.scalar(text("SELECT count(*) FROM deliveries")) == 0


def test_a_notice_is_seen_by_its_own_tenant_and_written_by_the_node_alone(upgraded):
    node, web = engine_at(upgraded.url, "node"), engine_at(upgraded.url, "web")
    with node.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO notices (id, analysis_id, study_id, tenant, origin, bundle, result_no,"
                f" analysis_version, notice) VALUES ('{uuid.uuid4()}', 8, 7, 'north', 'dicom',"
                " 'ich', 2, 1, '{}')"
            )
        )
        connection.execute(text("INSERT INTO bundles VALUES ('ich', '{}', '{}', now())"))

    assert seen(web, "reader", "north") == seen(web, "admin", "") == 1
    assert seen(web, "manager", "south") == seen(web, "uploader", "north") == seen(web, "", "") == 0
    for statement in ("DELETE FROM notices", "SELECT * FROM bundles"):
        with web.connect() as connection, pytest.raises(Exception, match="permission denied"):
            connection.execute(text(statement))
    node.dispose()
    web.dispose()


def test_what_judged_before_was_what_is_configured(upgraded):
    with Session(upgraded) as session:
        assert session.scalar(text("SELECT bundle_folder FROM analyses")) == ""


def test_an_activation_is_seen_by_its_tenants_staff_and_changed_by_nobody(upgraded):
    node, web = engine_at(upgraded.url, "node"), engine_at(upgraded.url, "web")
    with node.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO activations (tenant, bundle, version, calibration_id, weights_sha256,"
                " manifest_sha256, folder, action, actor) VALUES ('north', 'ich', '1.1.0', 'c0',"
                " 'w', 'm', 'ich/1.1.0+c0', 'activate', 'cli:root')"
            )
        )

    counts = {
        (role, tenant): seen(web, role, tenant, "activations")
        for role in ("admin", "manager", "reader", "uploader")
        for tenant in ("north", "south")
    }
    assert [who for who, n in counts.items() if n] == [
        ("admin", "north"), ("admin", "south"), ("manager", "north"), ("reader", "north"),
    ]  # fmt: skip
    for engine, statement in (
        (web, "INSERT INTO activations (tenant) VALUES ('north')"),
        (node, "DELETE FROM activations"),
        (node, "UPDATE activations SET version = '2'"),
    ):
        with engine.connect() as connection, pytest.raises(Exception, match="permission denied"):
            connection.execute(text(statement))
    node.dispose()
    web.dispose()


def seen(web: Engine, role: str, tenant: str, table: str = "notices") -> int:
    """How many rows a page shows to such a user."""
    with web.begin() as connection:
        for name, value in (("role", role), ("tenant", tenant), ("user", "u1")):
            connection.execute(
                text(f"SELECT set_config('vigil.{name}', :value, true)"), {"value": value}
            )
        return connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0


#: Stopped by force in the middle of an inference and of a send.
IN_FLIGHT = (
    "UPDATE analyses SET state = 'QUEUED'",
    "INSERT INTO jobs (analysis_id, tenant, origin, kind, state, lane, analysis_version, worker,"
    " lease_until) VALUES (8, 'north', 'dicom', 'INFER', 'DOING', 1, 0, 'old', now())",
    "INSERT INTO destinations (tenant, name) VALUES ('north', 'pacs')",
    "UPDATE deliveries SET state = 'SENDING', worker = 'old', lease_until = now(),"
    """ statuses = '{"1.9": "0x0000"}', expires_at = now() + interval '1 day'""",
)


@pytest.mark.parametrize("made", [first, between, second])
def test_h46_an_upgrade_in_mid_flight_loses_no_work_and_forgets_no_answer(empty, made):
    made(empty)
    run(empty, *(ROWS if made is not second else ROWS_OF_SECOND), *IN_FLIGHT)

    upgrade_at(empty)

    node = engine_at(empty, "node")
    with Session(node) as session, session.begin():
        assert queue.requeue_dead(session) == 1
        session.execute(text("UPDATE jobs SET run_after = now()"))
        claims.claim_due(session, "north", "pacs", "new")  # sees the dead
        session.execute(text("UPDATE deliveries SET run_after = now()"))
    with Session(node) as session, session.begin():
        job = queue.claim(session, [JobKind.INFER], "new")
        delivery = claims.claim_due(session, "north", "pacs", "new")
    node.dispose()
    assert (job.analysis_id, job.crashes) == (8, 1)
    assert delivery.statuses == {"1.9": "0x0000"}
