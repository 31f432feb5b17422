"""Fixtures of the end-to-end tests: a whole hospital, and `vigil scp` alone."""

from collections.abc import Iterator

import pytest

from db.faults import arm
from tests.e2e.hospital import Hospital, running
from tests.e2e.reception import Stage


@pytest.fixture(scope="session")
def hospital(tmp_path_factory) -> Iterator[Hospital]:
    """Three tenants and three PACS, started once; studies are each test's own."""
    with running(tmp_path_factory.mktemp("hospital")) as found:
        yield found


@pytest.fixture
def stage(settings, tmp_path):
    """Starts the stage; whatever still runs at the end is stopped."""
    url = settings.node.database_url.get_secret_value()
    config = tmp_path / "vigil.toml"
    config.write_text(
        f'[node]\ndata_dir = "{settings.node.data_dir}"\ndatabase_url = "{url}"\nmin_free_mb = 0\n'
        "[scp]\nport = 0\nprocesses = 1\n"
    )
    started = []
    faults = tmp_path / "faults"
    (faults / "armed").mkdir(parents=True)

    def start(fault="", changes=None, passes=1):
        if changes:
            config.write_text(config.read_text().replace(*changes))
        if fault:
            arm(faults, fault, passes)
        started.append(Stage(config, tmp_path / f"log{len(started)}", faults))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()
