"""Every row of the database as text files, and back: by COPY, whatever PostgreSQL is on each side.

One repeatable-read transaction reads all tables, so that they are of one moment while the node
works on. The schema is not among them: migrations make it, with its roles and policies.
"""

import gzip
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, Table, case, func, select, text, update
from sqlalchemy.orm import Session

from db.files import result_folder, store_path
from db.job import JobState
from db.outbox import DeliveryState
from db.tables import (
    AnalysisRow,
    DeliveryRow,
    InstanceRow,
    JobRow,
    ObjectRow,
    QuarantineRow,
    ReturnedRow,
)

#: What is of this moment and this machine: the schema's version, which processes live, and who is
#: signed in. A restored session would bring back one that was ended since.
LEFT_OUT = frozenset({"alembic_version", "processes", "sessions", "login_links"})
_ROWS = 10_000  # read at once


@dataclass(frozen=True, slots=True)
class TableFile:
    """One table's rows, in PostgreSQL's text format, gzipped."""

    name: str
    columns: tuple[str, ...]
    sha256: str
    counted: str = ""  # the column whose numbers the database draws; empty: it has none
    drawn: int = 0  # the last number drawn: what was called by it keeps it for ever

    @property
    def file_name(self) -> str:
        return f"{self.name}.copy.gz"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TableFile":
        return cls(**{**value, "columns": tuple(value["columns"])})


def revision(connection: Connection) -> str:
    """The migration that the schema is at; empty where there is none."""
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return ""
    return str(connection.scalar(text("SELECT version_num FROM alembic_version")) or "")


def dump(connection: Connection, folder: Path) -> list[TableFile]:
    """Write every table into `folder`; `connection` reads one snapshot, as the tables' owner."""
    return [_dump_table(connection, table, folder) for table in _tables(connection)]


def is_whole(file: TableFile, folder: Path) -> bool:
    """Whether the file is there as it was written."""
    path = folder / file.file_name
    return path.is_file() and _sha256(path) == file.sha256


def load(connection: Connection, folder: Path, files: Sequence[TableFile]) -> None:
    """Read the tables back, into a database whose schema is at the same revision and empty."""
    by_name = {file.name: file for file in files}
    for table in _tables(connection):  # in an order that keeps foreign keys
        if file := by_name.get(table.name):
            _load_table(connection, table, file, folder)


def free_claims(session: Session) -> None:
    """Give back what workers of the machine before had claimed: not one of them lives here.

    No try and no crash of anybody's. What is void is over, as in `db.queue`.
    """
    version = (
        select(AnalysisRow.row_version)
        .where(AnalysisRow.id == JobRow.analysis_id)
        .scalar_subquery()
    )
    session.execute(
        update(JobRow)
        .where(JobRow.state == JobState.DOING)
        .values(
            state=case((version != JobRow.analysis_version, JobState.DONE), else_=JobState.TODO),
            worker="",
            lease_until=None,
            run_after=func.now(),
        )
    )
    session.execute(
        update(DeliveryRow)
        .where(DeliveryRow.state == DeliveryState.SENDING)
        .values(state=DeliveryState.WAITING, worker="", lease_until=None, run_after=func.now())
    )


def promised(session: Session, data_dir: Path) -> Iterator[Path]:
    """The files that the rows say are there."""
    stored = select(InstanceRow.tenant, InstanceRow.study_id, InstanceRow.id)
    for tenant, study_id, key in _many(session, stored.where(InstanceRow.stored_at.is_not(None))):
        yield store_path(data_dir, tenant, study_id, key)
    built = select(ObjectRow.tenant, ObjectRow.result_id, ObjectRow.sop_instance_uid)
    for tenant, result_id, uid in _many(session, built):
        yield result_folder(data_dir, tenant, result_id) / f"{uid}.dcm"


def _many(session: Session, query: Any) -> Iterator[Any]:
    yield from session.execute(query.execution_options(yield_per=_ROWS))


def _tables(connection: Connection) -> list[Table]:
    found = MetaData()
    found.reflect(connection)
    return [table for table in found.sorted_tables if table.name not in LEFT_OUT]


def _dump_table(connection: Connection, table: Table, folder: Path) -> TableFile:
    columns = tuple(column.name for column in table.columns)
    counted = next((c.name for c in table.columns if c.identity is not None), "")
    file = TableFile(table.name, columns, "", counted, _drawn(connection, table, counted))
    path = folder / file.file_name
    with gzip.open(path, "wb", compresslevel=1) as out:
        _copy(connection, f"COPY {_named(file)} TO STDOUT", out)
    return replace(file, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_table(connection: Connection, table: Table, file: TableFile, folder: Path) -> None:
    with gzip.open(folder / file.file_name, "rb") as rows:
        _copy(connection, f"COPY {_named(file)} FROM STDIN", rows)
    if file.counted:
        sequence = func.pg_get_serial_sequence(table.name, file.counted)
        connection.execute(select(func.setval(sequence, max(file.drawn, 1), file.drawn > 0)))


def _drawn(connection: Connection, table: Table, counted: str) -> int:
    if not counted:
        return 0
    name = connection.scalar(select(func.pg_get_serial_sequence(table.name, counted)))
    query = text(f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {name}")
    return int(connection.scalar(query) or 0)


def _named(file: TableFile) -> str:
    columns = ", ".join(f'"{column}"' for column in file.columns)
    return f'"{file.name}" ({columns})'


def _copy(connection: Connection, statement: str, file: Any) -> None:
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        cursor.copy_expert(statement, file)


def ids_with_rows(session: Session, ids: Sequence[Any]) -> dict[Any, bool]:
    """Of these ids drawn at reception, those that have a row; whether its file is known stored."""
    found: dict[Any, bool] = {}
    accepted = select(InstanceRow.id, InstanceRow.stored_at.is_not(None))
    for key, is_stored in session.execute(accepted.where(InstanceRow.id.in_(ids))):
        found[key] = bool(is_stored)
    for table in (QuarantineRow, ReturnedRow):
        found |= dict.fromkeys(session.scalars(select(table.id).where(table.id.in_(ids))), True)
    return found
