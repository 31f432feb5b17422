"""Files that survive a crash: written, synced, renamed, and their folder synced after them."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from db.errors import DiskFull, TransientError
from db.faults import point
from db.meta import decode_head

_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class StorageError(TransientError):
    """The file system refused for another reason than want of space: I/O, read-only, rights."""

    code = "storage_error"
    counts = False


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn an OSError of the file system into DiskFull or StorageError; neither holds a path."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "unknown")
        if error.errno in _NO_ROOM:
            raise DiskFull(f"no room on the disk ({name})") from error
        raise StorageError(f"the file system refused ({name})") from error


def check_room(folder: Path, min_free_mb: int) -> None:
    """Refuse early, while there is still room for the database and the log.

    Raises
    ------
    DiskFull
        If the file system of `folder` has less than `min_free_mb` MiB or no inode left.
    """
    with storage_errors():
        disk = os.statvfs(folder)
    free_mb = disk.f_bavail * disk.f_frsize // 2**20
    if free_mb < min_free_mb:
        raise DiskFull(f"{free_mb} MB free, below the watermark of {min_free_mb} MB")
    if disk.f_files and not disk.f_favail:
        raise DiskFull("no inodes left")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create `folder` and what is missing above it, for the node alone, each name synced."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file or nothing; parents are made.

    Raises
    ------
    DiskFull, StorageError
        Nothing is left behind then.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with storage_errors():
        make_folder(path.parent)
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def link_all(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Give each synced file a second name, or a copy where a link cannot be; repeatable.

    Each target folder is synced once.

    Raises
    ------
    DiskFull, StorageError
    """
    folders = set()
    with storage_errors():
        for source, target in pairs:
            make_folder(target.parent)
            folders.add(target.parent)
            _link(source, target)
        point("intake_linked")
        for folder in folders:
            sync_folder(folder)


def copy_durably(source: Path, target: Path) -> None:
    """Write a copy that changes no more with its source; parents are made.

    Raises
    ------
    DiskFull, StorageError
        Nothing is left behind then.
    """
    with storage_errors():
        make_folder(target.parent)
        _copy(source, target)
        sync_folder(target.parent)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        pass  # a run before this one was killed after the link: names are never reused
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with open(source, "rb") as old, open(part, "xb") as new:
            shutil.copyfileobj(old, new, 2**20)
            new.flush()
            os.fsync(new.fileno())
        os.replace(part, target)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def store_path(data_dir: Path, tenant: str, study_id: int, instance_id: uuid.UUID) -> Path:
    """Where an accepted instance lies; nothing of the sender's is part of it."""
    return data_dir / "store" / tenant / str(study_id) / f"{instance_id}.dcm"


def quarantine_path(data_dir: Path, tenant: str, instance_id: uuid.UUID) -> Path:
    return data_dir / "quarantine" / tenant / f"{instance_id}.dcm"


def returned_path(data_dir: Path, tenant: str, instance_id: uuid.UUID) -> Path:
    """Where our own objects lie that somebody sent back."""
    return data_dir / "returned" / tenant / f"{instance_id}.dcm"


def models_folder(data_dir: Path) -> Path:
    """Where activated versions of bundles lie: <bundle>/<version>+<calibration>/."""
    return data_dir / "models"


def result_folder(data_dir: Path, tenant: str, result_id: uuid.UUID) -> Path:
    return data_dir / "results" / tenant / str(result_id)


def same_content(one: Path, other: Path) -> bool:
    """Whether two of our files hold the same data set, byte for byte; their meta groups may differ.

    Raises
    ------
    SpoolCorrupt, DiskFull, StorageError
    """
    with storage_errors(), open(one, "rb") as left, open(other, "rb") as right:
        decode_head(left)
        decode_head(right)
        while True:
            chunk = left.read(2**20)
            if chunk != right.read(2**20):
                return False
            if not chunk:
                return True
