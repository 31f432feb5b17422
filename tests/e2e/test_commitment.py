"""Storage commitment in a whole node whose processes are killed at each of its steps (H35, H38)."""

from collections.abc import Iterator

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db.faults import POINTS, VARIABLE, arm
from db.tables import AnalysisRow, CommitmentRow, PledgeRow
from node.running import free_port
from tests.bundles.make import make_bundle
from tests.e2e import hospital
from tests.e2e.disturbed import images_of
from tests.e2e.hospital import Hospital, eventually, written
from tests.vouching import Modality, VouchingPacs, failures, kept

pytestmark = pytest.mark.timeout(600)

NORTH = 'models = ["head"]\nretention_days = 0\nthresholds = { "head.any" = 0.1 }'
MODALITY, KEEPER = "NORTH_CT", "KEEPER"


@pytest.fixture
def peers() -> Iterator[tuple[Modality, VouchingPacs]]:
    with Modality(MODALITY) as modality, VouchingPacs(ae_title=KEEPER) as pacs:
        yield modality, pacs


@pytest.fixture
def node(tmp_path, peers) -> Iterator[Hospital]:
    modality, pacs = peers
    for name in ("armed", "passed"):
        (tmp_path / "faults" / name).mkdir(parents=True)
    more = f"""
[[tenants.destinations]]
name = "keeper"
ae_title = "{KEEPER}"
host = "127.0.0.1"
port = {pacs.port}
commitment = true
"""
    bundle = make_bundle(tmp_path / "head", "head", seed=4)
    with hospital.running(
        tmp_path,
        tenants={"north": NORTH},
        senders={"north": f"port = {modality.port}"},
        destinations={"north": more},
        scp_port=free_port(),
        inference=f'models = ["{bundle}"]\ndevice = "cpu"\nloaders = 1',
        environment={VARIABLE: str(tmp_path / "faults"), "OMP_NUM_THREADS": "1"},
    ) as found:
        pacs.reports_to = found.port
        yield found


def test_h35_h38_killed_at_each_step_all_is_committed_both_ways(node, peers, tmp_path):
    modality, pacs = peers
    pacs.tries = 60  # an archive tells it again until it is heard
    pacs.reason, pacs.fails = 0x0112, frozenset({"1.2.840.10008.5.1.4.1.1.7"})
    images = images_of("found", 1)
    uid = str(images[0].StudyInstanceUID)
    for name in POINTS["commitment"]:
        arm(tmp_path / "faults", name)

    assert node.send(written(images, tmp_path / "sent")).returncode == 0
    eventually(lambda: modality.asks(node.port, images) == 0x0000)
    eventually(lambda: hurry(node, PledgeRow) or modality.reports)
    eventually(lambda: hurry(node, CommitmentRow) or "FAILED" in states(node))
    pacs.reason = 0
    eventually(lambda: hurry(node, CommitmentRow) or states(node)[-1] == "COMMITTED", 300)

    assert list((tmp_path / "faults" / "armed").iterdir()) == []
    for report in modality.reports:
        assert kept(report) == {str(image.SOPInstanceUID) for image in images}
        assert failures(report) == {}
    (analysis,) = node.study_rows(AnalysisRow, uid)
    assert analysis.state == "DELIVERED"
    bodies: dict[str, set[bytes]] = {}
    for dataset, body in zip(pacs.received, pacs.raw, strict=True):
        bodies.setdefault(str(dataset.SOPInstanceUID), set()).add(body)
    assert len(bodies) == 6
    assert all(len(one) == 1 for one in bodies.values())
    assert len(pacs.received) > 6
    assert "committed" in node.vigil("where", uid)


def states(node: Hospital) -> list[str]:
    return node.query(select(CommitmentRow.state).order_by(CommitmentRow.id)) or [""]


def hurry(node: Hospital, table: type) -> None:
    """As if every wait were over."""
    with Session(node._engine) as session, session.begin():
        session.execute(update(table).values(run_after=func.now()))
