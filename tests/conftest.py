"""Fixtures that many tests share: a real PostgreSQL, one fresh database per test."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, create_engine, text

from config.settings import NodeSettings, Settings
from db import embedded
from db.engine import engine_at, upgrade_at

TEMPLATE = "vigil_template"

#: Minutes long: begun first, so that no worker is left alone with it at the end.
LONGEST = "test_recipe_train.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(scope="session")
def database_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[URL]:
    """A PostgreSQL of this test run, with a migrated template database."""
    data_dir = tmp_path_factory.mktemp("server")
    url = embedded.start(data_dir)
    _execute(url, f'CREATE DATABASE "{TEMPLATE}"')
    upgrade_at(url.set(database=TEMPLATE))
    yield url
    embedded.stop(data_dir)


@pytest.fixture
def database_url(database_server: URL) -> Iterator[URL]:
    """A database of this test alone, as its owner."""
    name = f"t{uuid.uuid4().hex[:12]}"
    _execute(database_server, f'CREATE DATABASE "{name}" TEMPLATE "{TEMPLATE}"')
    yield database_server.set(database=name)
    _execute(database_server, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    """The database as the stages see it."""
    engine = engine_at(database_url, "node")
    yield engine
    engine.dispose()


@pytest.fixture
def web_engine(database_url: URL) -> Iterator[Engine]:
    """The database as the dashboard sees it."""
    engine = engine_at(database_url, "web")
    yield engine
    engine.dispose()


@pytest.fixture
def settings(database_url: URL, tmp_path: Path) -> Settings:
    """Settings of a node with its own data folder and the test's database."""
    return Settings(
        node=NodeSettings(
            data_dir=tmp_path / "var",
            database_url=database_url.render_as_string(hide_password=False),
            min_free_mb=0,
        )
    )


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real inputs; tests that need it skip where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("VIGIL_TEST_DATA", default))
    if not root.is_dir():
        pytest.skip("no real data: set VIGIL_TEST_DATA")
    return root


def _execute(server: URL, statement: str) -> None:
    engine = create_engine(server.set(database="postgres"), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(statement))
    finally:
        engine.dispose()
