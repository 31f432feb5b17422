"""The log of everything received: write, sync, rename; what lies here as `.dcm` is acknowledged.

    spool/<receiver>/<tenant>/<id>.part -> synced -> <id>.dcm -> folder synced

Messages of storage commitment are kept in the same way, as `.request` and `.report`.

One receiver writes into a folder, under a lock; one intake process empties it, under another.
"""

import contextlib
import fcntl
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from db.errors import PermanentError, TransientError
from db.faults import point
from db.files import (
    check_room,
    link_all,
    make_folder,
    quarantine_path,
    result_folder,
    returned_path,
    storage_errors,
    store_path,
    sync_folder,
    write_durably,
)
from db.meta import Provenance, SpoolCorrupt, decode_head, encode_head

__all__ = [
    "KINDS",
    "FolderLock",
    "Kind",
    "Part",
    "Provenance",
    "Spool",
    "SpoolBusy",
    "SpoolCorrupt",
    "Spooled",
    "link_all",
    "quarantine_path",
    "read_provenance",
    "receivers",
    "result_folder",
    "returned_path",
    "scan",
    "store_path",
    "write_durably",
]

#: What a spooled file holds: an instance, an N-ACTION's or an N-EVENT-REPORT's data set.
Kind = Literal["dcm", "request", "report"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_RECEIVER = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TENANT = re.compile(r"[a-z][a-z0-9-]{0,31}")
#: For so long a received file may lie here while intake keeps up.
BEHIND_S = 10
_BUFFER_BYTES = 2**20


class SpoolBusy(TransientError):
    """Another process holds this spool folder."""

    code = "spool_busy"


class EmptyDataset(PermanentError):
    """A C-STORE without a single byte of data set."""

    code = "empty_dataset"


class FolderLock:
    """An exclusive lock that the kernel gives back when its holder dies, however it dies."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises SpoolBusy where somebody else holds it."""
        with storage_errors():
            make_folder(folder)
            self._fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise SpoolBusy(f"{folder.name} is held by another process") from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class Spooled:
    """A file that waits for intake."""

    id: uuid.UUID
    tenant: str
    path: Path
    at_ns: int = 0  # when it was received, by the receiver's clock


class Part:
    """An instance on its way to the disk; nobody reads it before `commit`. One thread at a time."""

    def __init__(
        self,
        folder: Path,
        source: Provenance,
        next_moment: Callable[[], int] = time.time_ns,
        kind: Kind = "dcm",
    ) -> None:
        self.id = uuid.uuid4()
        self._next_moment, self._kind = next_moment, kind
        self._path = folder / f"{self.id}.part"
        self._is_open = True
        self.size_bytes = 0  # of the data set alone
        with storage_errors():
            self._file = open(self._path, "xb", buffering=_BUFFER_BYTES)  # noqa: SIM115 - lives on
        try:
            with storage_errors():
                self._file.write(encode_head(source))
            point("spool_begun")
        except TransientError:
            self.discard()
            raise

    def write(self, data: bytes | memoryview) -> None:
        """Append to the data set. Raises DiskFull or StorageError; `discard` then."""
        with storage_errors():
            self._file.write(data)
        self.size_bytes += len(data)

    def commit(self) -> uuid.UUID:
        """Make the instance durable: after this, and only then, Success may be answered.

        Raises
        ------
        EmptyDataset, DiskFull, StorageError
            Nothing is kept then.
        """
        try:
            if not self.size_bytes:
                raise EmptyDataset("the data set is empty")
            with storage_errors():
                self._file.flush()
                point("spool_written")
                moment = self._next_moment()
                os.utime(self._file.fileno(), ns=(moment, moment))
                os.fsync(self._file.fileno())
                self._file.close()
                point("spool_synced")
                final = self._path.with_suffix(f".{self._kind}")
                os.rename(self._path, final)
                self._path = final  # so that a folder that cannot be synced leaves nothing behind
                point("spool_renamed")
                sync_folder(final.parent)
        except (EmptyDataset, TransientError):
            self.discard()
            raise
        self._is_open = False
        return self.id

    def discard(self) -> None:
        """Forget it, half-written or not; harmless after `commit`."""
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(OSError):  # what is left goes when the next receiver starts
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


class Spool:
    """One receiver's folder, held for as long as this object lives."""

    def __init__(self, data_dir: Path, receiver: str, *, min_free_mb: int = 0) -> None:
        """Lock the folder and clear what a dead receiver left half-written.

        Raises
        ------
        SpoolBusy, DiskFull, StorageError
        """
        if not _RECEIVER.fullmatch(receiver):
            raise ValueError(f"not a receiver name: {receiver!r}")
        self.folder = data_dir / "spool" / receiver
        self.min_free_mb = min_free_mb
        self._lock = FolderLock(self.folder, ".receiver.lock")
        clear_parts(self.folder)
        self._stamping = threading.Lock()
        with storage_errors():
            self._last_ns = max((item.at_ns for item in _entries(self.folder)), default=0)

    def _next_moment(self) -> int:
        """Nanoseconds since the epoch; later each time, also where the clock was set back.

        Of two instances that contradict each other the first one counts.
        """
        with self._stamping:
            self._last_ns = max(time.time_ns(), self._last_ns + 1)
            return self._last_ns

    def begin(self, source: Provenance, kind: Kind = "dcm") -> Part:
        """Open a place for an instance whose bytes are still to come.

        Raises
        ------
        DiskFull
            Below the watermark too.
        StorageError
        """
        if not _TENANT.fullmatch(source.tenant):
            raise ValueError("not a tenant id")
        check_room(self.folder, self.min_free_mb)
        folder = self.folder / source.tenant
        with storage_errors():
            make_folder(folder)
        return Part(folder, source, self._next_moment, kind)

    def keep(
        self, source: Provenance, data: bytes | Iterable[bytes], kind: Kind = "dcm"
    ) -> uuid.UUID:
        """Spool a whole data set in `source.transfer_syntax_uid`, without a file meta group.

        Returns
        -------
        Its id, once file and folder are synced.

        Raises
        ------
        EmptyDataset, DiskFull, StorageError
            Nothing is kept then.
        """
        part = self.begin(source, kind)
        try:
            for chunk in (data,) if isinstance(data, bytes) else data:
                part.write(chunk)
            return part.commit()
        finally:
            part.discard()

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clear_parts(folder: Path) -> None:
    """Remove half-written files; only for who holds the receiver's lock."""
    with storage_errors():
        for part in folder.glob("*/*.part"):
            part.unlink(missing_ok=True)


def receivers(data_dir: Path) -> list[Path]:
    """The spool folders there are, in name order."""
    spool = data_dir / "spool"
    with storage_errors():
        return sorted(path for path in spool.iterdir() if path.is_dir()) if spool.is_dir() else []


def scan(folder: Path, kind: Kind = "dcm") -> list[Spooled]:
    """What waits in one receiver's folder, oldest first.

    Oldest by modification time, which is the reception's: the first instance of a study decides
    whose study it is.
    """
    with storage_errors():
        return sorted(_entries(folder, kind), key=lambda item: item.at_ns)


def is_behind(data_dir: Path, tenant: str) -> bool:
    """Whether intake has yet to come to what a tenant's senders sent some time ago."""
    long_ago = time.time_ns() - BEHIND_S * 10**9
    return any(
        item.tenant == tenant and item.at_ns < long_ago
        for folder in receivers(data_dir)
        for item in scan(folder)
    )


def _entries(folder: Path, wanted: Kind | None = None) -> Iterator[Spooled]:
    for tenant in os.scandir(folder):
        if not (tenant.is_dir() and _TENANT.fullmatch(tenant.name)):
            continue
        for entry in os.scandir(tenant.path):
            name, dot, kind = entry.name.partition(".")
            with contextlib.suppress(ValueError, FileNotFoundError):
                if dot and (kind == wanted if wanted else kind in KINDS):
                    at_ns = entry.stat().st_mtime_ns
                    yield Spooled(uuid.UUID(name), tenant.name, Path(entry.path), at_ns)


def read_provenance(path: Path) -> Provenance:
    """Where a spooled file came from.

    Raises
    ------
    SpoolCorrupt
    StorageError
    """
    with storage_errors(), open(path, "rb") as file:
        return decode_head(file)
