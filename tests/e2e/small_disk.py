"""Disks that a test can fill: a small tmpfs over a folder, where mounting is allowed."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _mount(*arguments: str | Path) -> bool:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    return done.returncode == 0


@contextlib.contextmanager
def mounted(folder: Path, *, size_kb: int, inodes: int = 0) -> Iterator[None]:
    """A disk of so many KiB (and inodes) at `folder`; skips where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_kb}k,mode={folder.stat().st_mode & 0o777:o}"
    options += f",nr_inodes={inodes}" if inodes else ""
    if not _mount("-t", "tmpfs", "-o", options, "vigil-test", folder):
        pytest.skip("no file system may be mounted here, so no disk can be filled")
    try:
        yield
    finally:
        _umount(folder)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` as it is after its file system was remounted read-only.

    By a second mount above it: a remount is refused while files are open for writing, which the
    kernel itself does not mind when it gives up a disk.
    """
    if not _mount("--bind", folder, folder):
        pytest.skip("no file system may be mounted here, so none can be read-only")
    try:
        assert _mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        _umount(folder)


def _umount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def full(folder: Path, *, spare_kb: int = 0) -> Iterator[None]:
    """Not a byte is free on the disk of `folder`, or `spare_kb` KiB."""
    spare, filler = folder / ".spare", folder / ".filler"
    if spare_kb:
        spare.write_bytes(bytes(spare_kb * 1024))
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while True:
            file.write(b"0")
    spare.unlink(missing_ok=True)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def no_inodes(folder: Path) -> Iterator[None]:
    """Room for bytes, and for no further file."""
    fillers = []
    with contextlib.suppress(OSError):
        while True:
            filler = folder / f".filler-{len(fillers)}"
            filler.touch()
            fillers.append(filler)
    try:
        yield
    finally:
        for filler in fillers:
            filler.unlink()
