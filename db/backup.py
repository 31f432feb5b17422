"""What a backup is: the database of one moment, and every file that its rows speak of.

    backup.json   written last: without it the folder is no backup
    database/     a file for each table (`db.snapshot`)
    files/        spool, store, results, quarantine, returned, models, as in the data folder
    files.tsv     SHA-256, bytes, path of each of them

The database comes first, then the spool, then where its files go. A file moves only in that
direction and nothing else is ever deleted, so whatever a row promises is met on the way, and so is
all that had been acknowledged by then: what has no row yet goes back to the spool when restored.
"""

import datetime as dt
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from db import snapshot
from db.errors import PermanentError
from db.files import make_folder, storage_errors, write_durably
from db.snapshot import TableFile
from db.spool import KINDS
from db.study import SETTLED
from db.tables import AnalysisRow, InstanceRow, ResultRow, StudyRow

FORMAT = 1
ABOUT, LIST = "backup.json", "files.tsv"
#: In the order in which they are read.
TREES = ("spool", "store", "quarantine", "returned", "results", "models")
RECEIVED = ("store", "quarantine", "returned")
#: Where a restored spool lies: a receiver that is no more, whose folder any intake takes over.
RECEIVER = "restored"
_PIECE = 2**20  # bytes
_IDS = 1000

#: Called with the bytes copied since the last call.
Progress = Callable[[int], object]


class BadBackup(PermanentError):
    """The folder is no whole backup that this version can read."""

    code: ClassVar[str] = "bad_backup"


@dataclass(frozen=True, slots=True)
class Copied:
    """A file of a backup; `path` begins with the tree's name."""

    sha256: str
    size_bytes: int
    path: str


@dataclass(frozen=True, slots=True)
class About:
    """What `backup.json` says."""

    made_at: str  # ISO 8601 UTC: of this moment the database is
    version: str  # of Vigil
    schema: str  # the migration that the tables are at
    tables: tuple[TableFile, ...]
    n_studies: int
    n_instances: int
    n_results: int
    n_under_way: int  # analyses that had work to do
    n_files: int
    n_bytes: int
    list_sha256: str  # of files.tsv
    n_missing: int  # files that a row promises and that were not there
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tables": [table.to_json() for table in self.tables]}

    @classmethod
    def read(cls, folder: Path) -> "About":
        """Raises BadBackup where the folder holds no whole backup."""
        try:
            value = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise BadBackup(f"{folder} was made by another version of Vigil; use that one")
            tables = tuple(map(TableFile.from_json, value["tables"]))
            return cls(**{**value, "tables": tables})
        except FileNotFoundError:
            raise BadBackup(f"{folder} holds no {ABOUT}: it is no backup, or was cut off") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadBackup(f"{folder / ABOUT} cannot be read ({type(error).__name__})") from None


def make(engine: Engine, data_dir: Path, folder: Path, version: str, progress: Progress) -> About:
    """Back up into `folder`, which is empty or not there, while the node works.

    engine : as the tables' owner

    Raises
    ------
    DiskFull, StorageError, OperationalError
        What lies in `folder` then is no backup.
    """
    with storage_errors():
        make_folder(folder / "database")
        facts, tables = _dump(engine, data_dir, folder)
        n_files, n_bytes, digest = _copy_trees(data_dir, folder, progress)
        os.sync()  # once, for all of them
    about = About(
        **facts, tables=tuple(tables), version=version, n_files=n_files, n_bytes=n_bytes,
        list_sha256=digest, n_missing=_count_missing(folder),
    )  # fmt: skip
    write_durably(folder / ABOUT, json.dumps(about.to_json(), indent=2).encode())
    return about


def _dump(engine: Engine, data_dir: Path, folder: Path) -> tuple[dict[str, Any], list[TableFile]]:
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        schema = snapshot.revision(connection)
        tables = snapshot.dump(connection, folder / "database")
        session = Session(connection)
        open_ones = AnalysisRow.state.not_in(SETTLED)
        facts = {
            "made_at": session.execute(select(func.now()))
            .scalar_one()
            .astimezone(dt.UTC)
            .isoformat(),
            "schema": schema,
            "n_studies": _count(session, StudyRow),
            "n_instances": _count(session, InstanceRow),
            "n_results": _count(session, ResultRow),
            "n_under_way": _count(session, AnalysisRow, open_ones),
        }
        with (folder / "promised").open("w", encoding="utf-8") as lines:
            for path in snapshot.promised(session, data_dir):
                lines.write(f"{path.relative_to(data_dir)}\n")
    return facts, tables


def _count(session: Session, table: Any, *conditions: Any) -> int:
    return session.scalar(select(func.count()).select_from(table).where(*conditions)) or 0


def _copy_trees(data_dir: Path, folder: Path, progress: Progress) -> tuple[int, int, str]:
    n_files = n_bytes = 0
    digest = hashlib.sha256()
    with (folder / LIST).open("wb") as lines:
        for path in files(data_dir):
            name = path.relative_to(data_dir)
            try:
                copied = copy(path, folder / "files" / name, str(name), progress)
            except FileNotFoundError:
                continue  # taken in meanwhile: it is met again where it went
            line = f"{copied.sha256}\t{copied.size_bytes}\t{copied.path}\n".encode()
            lines.write(line)
            digest.update(line)
            n_files, n_bytes = n_files + 1, n_bytes + copied.size_bytes
    return n_files, n_bytes, digest.hexdigest()


def _count_missing(folder: Path) -> int:
    listed = folder / "promised"
    with listed.open(encoding="utf-8") as lines:
        n = sum(not (folder / "files" / line.rstrip("\n")).is_file() for line in lines)
    listed.unlink()
    return n


def files(data_dir: Path) -> Iterator[Path]:
    """What is whole: no half-written file, no lock, and of the spool what is acknowledged."""
    for tree in TREES:
        for path in _below(data_dir / tree):
            if path.name.startswith(".") or (tree == "spool" and path.suffix[1:] not in KINDS):
                continue
            yield path


def _below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def copy(source: Path, target: Path, name: str, progress: Progress) -> Copied:
    """Copy a file with its time, which is the order of arrival; not synced yet."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as old:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with target.open("xb") as new:
            os.fchmod(new.fileno(), 0o600)
            while piece := old.read(_PIECE):
                new.write(piece)
                digest.update(piece)
                size += len(piece)
                progress(len(piece))
        when = os.fstat(old.fileno())
    os.utime(target, ns=(when.st_atime_ns, when.st_mtime_ns))
    return Copied(digest.hexdigest(), size, name)


def listed(folder: Path, about: About) -> list[Copied]:
    """The files of a backup.

    Raises
    ------
    BadBackup
        If the list is not the one that was written, or leads out of the data folder.
    """
    try:
        data = (folder / LIST).read_bytes()
    except OSError as error:
        raise BadBackup(f"{folder / LIST} cannot be read ({type(error).__name__})") from None
    if hashlib.sha256(data).hexdigest() != about.list_sha256:
        raise BadBackup(f"{folder / LIST} was altered or cut off since the backup")
    found = []
    for line in data.decode().splitlines():
        sha256, size, path = line.split("\t")
        parts = Path(path).parts
        if parts[0] not in TREES or ".." in parts:
            raise BadBackup(f"{folder / LIST} names a file that no backup holds")
        found.append(Copied(sha256, int(size), path))
    return found


def restore_files(
    folder: Path, files: list[Copied], data_dir: Path, progress: Progress
) -> list[str]:
    """Copy them into an empty data folder; returns those that are gone or damaged.

    A damaged file is left out: its study says that an image is missing, others are whole.
    """
    damaged = []
    with storage_errors():
        for file in files:
            target = data_dir / _restored(file.path)
            try:
                copied = copy(folder / "files" / file.path, target, file.path, progress)
            except FileNotFoundError:
                damaged.append(file.path)
                continue
            if copied != file:
                target.unlink()
                damaged.append(file.path)
        os.sync()
    return damaged


def _restored(path: str) -> Path:
    """Where a file of a backup goes: what was in any receiver's spool, into one folder."""
    parts = Path(path).parts
    return Path("spool", RECEIVER, *parts[2:]) if parts[0] == "spool" else Path(path)


def hand_to_intake(engine: Engine, data_dir: Path) -> int:
    """Put received files into the spool whose rows are not there, or not finished; how many.

    They were acknowledged: taken in after the moment of the database and before they were copied.
    """
    n = 0
    with Session(engine) as session, storage_errors():
        for tree in RECEIVED:
            files = (path for path in _below(data_dir / tree) if path.suffix == ".dcm")
            while some := {uuid.UUID(path.stem): path for path in islice(files, _IDS)}:
                known = snapshot.ids_with_rows(session, list(some))
                for key, path in some.items():
                    if not known.get(key, False):
                        _to_spool(data_dir, tree, path, is_row_there=key in known)
                        n += 1
        os.sync()
    return n


def _to_spool(data_dir: Path, tree: str, path: Path, *, is_row_there: bool) -> None:
    tenant = path.relative_to(data_dir / tree).parts[0]
    spooled = data_dir / "spool" / RECEIVER / tenant / path.name
    spooled.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not spooled.exists():
        os.link(path, spooled)
    if not is_row_there:
        path.unlink()
