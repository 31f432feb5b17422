"""`vigil db backup` and `vigil db restore`: everything a node knows, out and back in."""

import getpass
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from sqlalchemy import URL, Engine, inspect
from sqlalchemy.orm import Session

from config.settings import Settings, load
from db import backup, embedded, engine, snapshot
from db.backup import About, BadBackup
from db.errors import PermanentError
from db.files import make_folder
from db.spool import FolderLock
from db.tables import AuditRow
from node.database import is_served, opened
from node.supervisor import SERVE_LOCK
from node.terminal import FAILED, SUCCESS, report

_SHOWN = 5  # names of damaged files; the JSON has all


class NotEmpty(PermanentError):
    """There is something where a backup or a node is to be written."""

    code: ClassVar[str] = "not_empty"


def back_up(folder: Path, *, as_json: bool, config: Path | None) -> int:
    """Make a backup and say what is in it; FAILED where a file that it needs was not there."""
    settings = load(config)
    data_dir = settings.node.data_dir
    _check_target(folder, data_dir)
    began = time.monotonic()
    with opened(settings) as node, _as_owner(settings) as owner:
        with _bar("backing up", _size(data_dir), is_quiet=as_json) as advance:
            about = backup.make(owner, data_dir, folder, version("vigil"), advance)
        _audit(node, "backup", about, about.n_missing)
    document = _document(folder, about, began) | {"n_missing": about.n_missing}
    report(document, _show_backup, as_json=as_json)
    return FAILED if about.n_missing else SUCCESS


def restore(folder: Path, *, as_json: bool, config: Path | None) -> int:
    """Read a backup back and say what goes on; FAILED where a file of it was damaged."""
    settings = load(config)
    data_dir = settings.node.data_dir
    about = About.read(folder)
    if not engine.knows(about.schema):
        raise BadBackup(f"it was made by Vigil {about.version}, which is newer: install that first")
    files = backup.listed(folder, about)
    for table in about.tables:
        if not snapshot.is_whole(table, folder / "database"):
            raise BadBackup(f"{folder}: the table {table.name} is gone or damaged")
    _check_empty(data_dir)
    began = time.monotonic()
    make_folder(data_dir)
    lock = FolderLock(data_dir, SERVE_LOCK)
    unfinished = data_dir / engine.UNFINISHED
    unfinished.touch()
    try:
        url = _empty_database(settings)
        with _bar("restoring", about.n_bytes, is_quiet=as_json) as advance:
            damaged = backup.restore_files(folder, files, data_dir, advance)
        n_spooled = _restore_rows(url, folder, about, data_dir, len(damaged))
        unfinished.unlink()
    finally:
        if _is_embedded(settings):
            embedded.stop(data_dir)
        lock.close()
    document = _document(folder, about, began) | {"damaged": damaged, "n_to_intake": n_spooled}
    report(document, _show_restore, as_json=as_json)
    return FAILED if damaged else SUCCESS


def _check_target(folder: Path, data_dir: Path) -> None:
    if folder.resolve().is_relative_to(data_dir.resolve()):
        raise NotEmpty(f"{folder} lies in the data folder; choose one outside, on another disk")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NotEmpty(f"{folder} is not empty; each backup needs a folder of its own")


def _check_empty(data_dir: Path) -> None:
    if is_served(data_dir):
        raise NotEmpty(f"a node runs on {data_dir}; restore into an empty data folder")
    found = sorted(path.name for path in data_dir.iterdir()) if data_dir.exists() else []
    if found := [name for name in found if name != SERVE_LOCK]:
        names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise NotEmpty(
            f"{data_dir} is not empty ({names}): nothing is restored over what is there; "
            "move it away, or set node.data_dir to another folder"
        )


def _empty_database(settings: Settings) -> URL:
    """Where the rows go; raises NotEmpty where there are tables."""
    url = engine.database_url(settings)
    if _is_embedded(settings):
        engine.create_database(url)
    owner = engine.engine_at(url, "owner", pool_size=1)
    try:
        if inspect(owner).get_table_names():
            raise NotEmpty("node.database_url leads to a database that has tables; give a new one")
    finally:
        owner.dispose()
    return url


def _restore_rows(url: URL, folder: Path, about: About, data_dir: Path, n_damaged: int) -> int:
    """All rows in one transaction, at the schema they were of; then this version's schema."""
    engine.upgrade_at(url, about.schema)
    owner = engine.engine_at(url, "owner", pool_size=1)
    try:
        with owner.begin() as connection:
            snapshot.load(connection, folder / "database", about.tables)
        engine.upgrade_at(url)
        with Session(owner) as session, session.begin():
            snapshot.free_claims(session)
        n_spooled = backup.hand_to_intake(owner, data_dir)
        _audit(owner, "restore", about, n_damaged)
    finally:
        owner.dispose()
    return n_spooled


def _is_embedded(settings: Settings) -> bool:
    return not settings.node.database_url.get_secret_value()


@contextmanager
def _as_owner(settings: Settings) -> Iterator[Engine]:
    owner = engine.engine_for(settings, "owner", pool_size=1)
    try:
        yield owner
    finally:
        owner.dispose()


def _audit(at: Engine, action: str, about: About, n_lost: int) -> None:
    with Session(at) as session, session.begin():
        session.add(
            AuditRow(
                actor=f"cli:{getpass.getuser()}",
                action=action,
                outcome="in part" if n_lost else "ok",
                detail={"made_at": about.made_at, "n_files": about.n_files, "n_lost": n_lost},
            )
        )


@contextmanager
def _bar(words: str, n_bytes: int, *, is_quiet: bool) -> Iterator[backup.Progress]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=is_quiet,
    )
    with bar:
        task = bar.add_task(words, total=n_bytes)
        yield lambda n: bar.advance(task, n)


def _size(data_dir: Path) -> int:
    """About how much there is to copy; it grows meanwhile."""
    return sum(path.stat().st_size for path in backup.files(data_dir) if path.exists())


def _document(folder: Path, about: About, began: float) -> dict[str, Any]:
    names = (
        "made_at", "version", "schema", "n_studies", "n_instances", "n_results", "n_under_way",
        "n_files", "n_bytes",
    )  # fmt: skip
    facts = {name: getattr(about, name) for name in names}
    return {"backup": str(folder), **facts, "duration_s": round(time.monotonic() - began, 1)}


def _counts(document: dict[str, Any]) -> str:
    size_mb = document["n_bytes"] / 1e6
    return (
        f"{document['n_studies']} studies, {document['n_instances']} instances, "
        f"{document['n_results']} results; {document['n_files']} files, {size_mb:.1f} MB, "
        f"in {document['duration_s']:.1f} s"
    )


def _show_backup(document: dict[str, Any], to: Console) -> None:
    to.print(f"backed up to {document['backup']}: {_counts(document)}", soft_wrap=True)
    if n := document["n_missing"]:
        to.print(
            f"{n} files that the database speaks of were not there: they are in no backup",
            style="red",
            soft_wrap=True,
        )


def _show_restore(document: dict[str, Any], to: Console) -> None:
    to.print(f"restored as of {document['made_at']}: {_counts(document)}", soft_wrap=True)
    if n := document["n_to_intake"]:
        to.print(f"{n} instances acknowledged about that moment wait for intake", soft_wrap=True)
    if n := document["n_under_way"]:
        to.print(
            f"{n} analyses were under way then and go on. Where the old node ended one of them "
            "after the backup, its archive gets a second result: see docs/operations.md",
            soft_wrap=True,
        )
    _show_damaged(document["damaged"], to)


def _show_damaged(damaged: Sequence[str], to: Console) -> None:
    if damaged:
        more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        to.print(
            f"{len(damaged)} files of the backup are gone or damaged and were left out: "
            f"{', '.join(damaged[:_SHOWN])}{more}",
            style="red",
            soft_wrap=True,
        )
