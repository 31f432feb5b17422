"""A hospital's node is lost in mid-flight and comes back from its backup, elsewhere (H46)."""

import contextlib
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from db import embedded
from db.tables import DeliveryRow
from tests.builders import real_size_study
from tests.e2e.hospital import Hospital, eventually, running, written


def vigil(*arguments: object) -> dict:
    """What a command says as JSON; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "node.cli", *map(str, arguments), "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def power_cut(hospital: Hospital) -> None:
    """-9 for all of it at once, its database too."""
    supervisor = psutil.Process(hospital.node.process.pid)
    pid_file = hospital.folder / "var" / "database" / "cluster" / "postmaster.pid"
    server = psutil.Process(int(pid_file.read_text().splitlines()[0]))
    family = [supervisor, *supervisor.children(recursive=True), server]
    for process in [*family, *server.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    hospital.node.process.wait()


def study(seed: int, kind: str = "plain") -> list:
    return real_size_study(kind, seed=seed, matrix=256)


def sent(hospital: Hospital, tenant: str, uid: str) -> Counter:
    return Counter(one.SOPInstanceUID for one in hospital.received(tenant, uid))


@pytest.mark.timeout(900)
def test_h46_a_node_lost_in_mid_flight_goes_on_elsewhere_and_sends_nothing_twice(tmp_path: Path):
    done, waiting, begun = study(61, "lesion"), study(62, "lesion"), study(63)
    uids = [one[0].StudyInstanceUID for one in (done, waiting, begun)]
    with running(tmp_path) as hospital, contextlib.ExitStack() as outage:
        assert hospital.send(written(done, tmp_path / "done")).returncode == 0
        assert hospital.outcome(uids[0]).state == "DELIVERED"
        before = sent(hospital, "north", uids[0])
        outage.enter_context(hospital.archives["east"].down())
        assert hospital.send(written(waiting, tmp_path / "waiting"), "east").returncode == 0
        eventually(lambda: hospital.study_rows(DeliveryRow, uids[1], "east"))
        paths = written(begun, tmp_path / "begun")
        # A hole is left, which waits for the rest.
        assert hospital.send([*paths[:10], *paths[20:]]).returncode == 0

        made = vigil("db", "backup", tmp_path / "backup", "--config", hospital.config)
        power_cut(hospital)
        (tmp_path / "var").rename(tmp_path / "lost")

        elsewhere = tmp_path / "elsewhere.toml"
        elsewhere.write_text(hospital.config.read_text().replace("/var", "/elsewhere"))
        restored = vigil("db", "restore", tmp_path / "backup", "--config", elsewhere)
        assert restored["n_instances"] == made["n_instances"] >= len(done) + len(waiting)
        try:
            hospital.move_to(elsewhere)
            outage.close()
            assert hospital.send(paths[10:20]).returncode == 0
            states = [
                hospital.outcome(uid, tenant, result_no=1).state
                for uid, tenant in zip(uids, ("north", "east", "north"), strict=True)
            ]
            results = [
                len(hospital.results(uid, tenant))
                for uid, tenant in zip(uids, ("north", "east", "north"), strict=True)
            ]
            stored = hospital.stored(uids[2])
            hospital.close()
        finally:
            embedded.stop(tmp_path / "elsewhere")

        assert states == ["DELIVERED"] * 3
        assert results == [1, 1, 1]
        assert stored == sorted(one.SOPInstanceUID for one in begun)
        assert sent(hospital, "north", uids[0]) == before
        for uid, tenant in zip(uids, ("north", "east", "north"), strict=True):
            assert set(sent(hospital, tenant, uid).values()) == {1}
            assert Counter(one.Modality for one in hospital.received(tenant, uid))["SR"] == 1
