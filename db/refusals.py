"""Refused associations on their way from a receiver, without database, to the audit trail."""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from db.files import storage_errors

_NAME = "refusals.jsonl"
_MAX_BYTES = 2**20  # a peer that is refused all night must not fill the disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """One refusal; titles are the peer's own words, at most 16 characters each."""

    code: str  # called_ae, calling_ae, limit, tls
    address: str
    called_ae: str = ""
    calling_ae: str = ""
    tenant: str = ""  # empty where the called title belongs to none


def note(folder: Path, refused: Refused) -> None:
    """Append to the receiver's notes, unless full. Raises DiskFull or StorageError."""
    line = json.dumps(asdict(refused)).encode() + b"\n"
    with storage_errors(), open(folder / _NAME, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell() + len(line) <= _MAX_BYTES:
            file.write(line)


def noted(folder: Path) -> list[Refused]:
    """What is noted; call `forget` with its length once it is recorded elsewhere."""
    with storage_errors():
        try:
            lines = (folder / _NAME).read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
    return [Refused(**json.loads(line)) for line in lines[:-1]]


def forget(folder: Path, n: int) -> None:
    """Drop the first `n` notes."""
    with storage_errors(), open(folder / _NAME, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rest = b"".join(file.read().splitlines(keepends=True)[n:])
        file.seek(0)
        file.write(rest)
        file.truncate()
        os.fsync(file.fileno())
