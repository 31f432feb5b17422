"""One node for all end-to-end tests that leave it whole."""

from collections.abc import Iterator

import pytest

from tests.e2e.hospital import Hospital, running


@pytest.fixture(scope="session")
def hospital(tmp_path_factory) -> Iterator[Hospital]:
    """Three tenants and three PACS, started once; studies are each test's own."""
    with running(tmp_path_factory.mktemp("hospital")) as found:
        yield found
