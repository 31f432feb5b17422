"""What came cut off before its study: whose it is can be told once there is a study."""

import uuid
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from config.tenants import Tenant
from db.describe import describe
from db.errors import CutOff, NodeError
from db.files import quarantine_path
from db.filing import let_analyse, locked, study_of
from db.identity import Described, uid_trouble
from db.meta import Provenance
from db.sandbox import Sandbox
from db.spool import read_provenance
from db.tables import QuarantineRow, StudyRow

#: Read for one study and batch: each costs milliseconds, and whoever sends many gets no more.
MAX_READ = 50
_LOOKED_AT = 1000  # rows
_READ_S = 20.0


@dataclass(frozen=True, slots=True)
class Begun:
    """What stands in a quarantined file before the place where it is cut off."""

    id: uuid.UUID
    source: Provenance
    described: Described


def study_lacking(session: Session, source: Provenance, begun: Described | None) -> StudyRow | None:
    """The study that lacks an image that came cut off, if the file is surely that study's."""
    if begun is None or uid_trouble(begun, source):
        return None
    return study_of(session, source, begun)


class Unlinked:
    """Files that intake set aside without a study, asked again when instances of it arrive.

    A row keeps no patient, so the file is read, before the transaction that needs the answer.
    """

    def __init__(self, engine: Engine, data_dir: Path, sandbox: Sandbox) -> None:
        self._engine, self._data_dir, self._sandbox = engine, data_dir, sandbox
        self._strangers: set[uuid.UUID] = set()  # no study's of which they say they are

    def of(self, tenant: str, origin: str, study_instance_uid: str) -> list[Begun]:
        """Those that say they are of a study, which need not be true."""
        query = select(QuarantineRow.id).where(
            QuarantineRow.tenant == tenant,
            QuarantineRow.origin == origin,
            QuarantineRow.study_instance_uid == study_instance_uid,
            QuarantineRow.study_id.is_(None),
            QuarantineRow.code == CutOff.code,
            QuarantineRow.state == "OPEN",
        )
        with Session(self._engine) as session:
            rows = session.scalars(query.order_by(QuarantineRow.at.desc()).limit(_LOOKED_AT)).all()
        unknown = [key for key in rows if key not in self._strangers][:MAX_READ]
        return [found for key in unknown if (found := self._read(key, tenant)) is not None]

    def _read(self, key: uuid.UUID, tenant: str) -> Begun | None:
        path = quarantine_path(self._data_dir, tenant, key)
        if not path.exists():  # its row comes first: with the next batch
            return None
        try:
            source = read_provenance(path)
            value, _ = self._sandbox.run(describe, str(path), True, timeout_s=_READ_S)
        except NodeError:
            self._strangers.add(key)
            return None
        return Begun(key, source, Described.from_json(value))

    def link(self, session: Session, found: Begun, tenant: Tenant | None) -> None:
        """Have its study know that it lacks this image, if there is that study by now."""
        if locked(session, found.source, found.described) is None:
            return
        study = study_lacking(session, found.source, found.described)
        if study is None:
            self._strangers.add(found.id)
            return
        linked = session.scalar(
            update(QuarantineRow)
            .where(QuarantineRow.id == found.id, QuarantineRow.state == "OPEN")
            .values(study_id=study.id)
            .returning(QuarantineRow.id)
        )
        if linked is not None and tenant is not None:
            let_analyse(session, study, tenant)
