"""Where the embedded server's sockets lie when the data folder's path is too long for them."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from db import embedded
from db.embedded import EmbeddedFailed


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """So deep that a socket beside the cluster would have an address of more than 107 bytes."""
    folder = tmp_path_factory.mktemp("deep") / ("d" * 100)
    yield folder
    embedded.stop(folder)


def sockets(data_dir: Path) -> Path:
    return embedded._sockets(embedded._home(data_dir))


def kill_server(data_dir: Path) -> None:
    """-9 for all of it at once."""
    pid_file = data_dir / "database" / "cluster" / "postmaster.pid"
    server = psutil.Process(int(pid_file.read_text().splitlines()[0]))
    family = [server, *server.children(recursive=True)]
    for one in family:
        one.kill()
    psutil.wait_procs(family, timeout=10)


def test_a_stop_leaves_no_folder_of_sockets_not_even_after_a_kill(data_dir):
    embedded.start(data_dir)
    assert not sockets(data_dir).is_relative_to(data_dir)
    embedded.stop(data_dir)
    assert not sockets(data_dir).exists()

    embedded.start(data_dir)
    kill_server(data_dir)
    assert os.listdir(sockets(data_dir))
    embedded.start(data_dir)  # takes over what is left
    embedded.stop(data_dir)

    assert not sockets(data_dir).exists()


@pytest.mark.parametrize("is_link", [True, False])
def test_sockets_never_go_where_somebody_else_points(data_dir, tmp_path, is_link):
    folder = sockets(data_dir)
    if is_link:
        folder.symlink_to(tmp_path)
    elif os.geteuid() == 0:
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    else:
        pytest.skip("only root can make what is another's")
    owner = tmp_path.stat().st_uid

    try:
        with pytest.raises(EmbeddedFailed, match="somebody else's"):
            embedded.start(data_dir)
    finally:
        folder.unlink() if is_link else folder.rmdir()

    assert tmp_path.stat().st_uid == owner
    assert not embedded.is_running(data_dir)


def test_stopping_what_never_ran_makes_nothing(tmp_path):
    embedded.stop(tmp_path / "var")

    assert not (tmp_path / "var").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as another user")
def test_root_may_keep_the_programs_in_a_private_home(tmp_path, monkeypatch):
    """By access(2), as initdb asks; and no other power of root's is left."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    shutil.copy("/usr/bin/true", private / "postgres")
    (private / "postgres").chmod(0o755)
    monkeypatch.setattr(embedded, "binaries", lambda: private)
    as_server = embedded._as_server_user(tmp_path)

    asked = subprocess.run([*as_server, "/usr/bin/test", "-x", private / "postgres"], check=False)
    status = subprocess.check_output([*as_server, "cat", "/proc/self/status"], text=True)

    assert asked.returncode == 0
    powers = {
        line.split()[0]: int(line.split()[1], 16) for line in status.splitlines() if "Cap" in line
    }
    assert powers["CapEff:"] == powers["CapPrm:"]
    assert powers["CapEff:"].bit_count() == 1
