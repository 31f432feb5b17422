"""Refused associations on their way from a receiver, without database, to the audit trail."""

import fcntl
import json
import os
from contextlib import suppress
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
            # After a torn line, the next one begins anew.
            file.write(line if _ends_whole(folder) else b"\n" + line)


def _ends_whole(folder: Path) -> bool:
    return (folder / _NAME).read_bytes()[-1:] in (b"", b"\n")


def noted(folder: Path) -> tuple[list[Refused], int]:
    """What is noted, and how many lines that was: `forget` those once it is recorded elsewhere.

    A line that a full disk or a power cut tore is passed over: it must not stop the intake.
    """
    with storage_errors():
        try:
            lines = (folder / _NAME).read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return [], 0
    found = []
    for line in lines:
        with suppress(ValueError, TypeError):
            found.append(Refused(**json.loads(line)))
    return found, len(lines)


def forget(folder: Path, n: int) -> None:
    """Drop the first `n` notes."""
    with storage_errors(), open(folder / _NAME, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rest = b"".join(file.read().splitlines(keepends=True)[n:])
        file.seek(0)
        file.write(rest)
        file.truncate()
        os.fsync(file.fileno())
