"""Reception without a network: a spool and the intake that empties it, over a real database."""

import datetime as dt

from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian
from sqlalchemy import select
from sqlalchemy.orm import Session

from db.intake import Intake
from db.meta import Provenance
from db.spool import Spool, scan
from db.tables import EventRow


class Reception:
    """A spool, its intake, and short words for both."""

    def __init__(self, settings, engine, sandbox):
        self.settings, self.engine, self.sandbox = settings, engine, sandbox
        self.data_dir = settings.node.data_dir
        self.box = Spool(self.data_dir, "scp-0")
        self.intake = Intake(engine, settings, sandbox)

    def receive(self, *datasets, tenant="north", **more):
        return [self.keep(dataset, encoded(dataset), tenant, **more) for dataset in datasets]

    def keep(self, dataset, body, tenant="north", **more):
        values = {
            "tenant": tenant,
            "calling_ae": "CT1",
            "received_at": dt.datetime.now(dt.UTC).isoformat(),
            "sop_class_uid": str(dataset.get("SOPClassUID", "")),
            "sop_instance_uid": str(dataset.get("SOPInstanceUID", "")),
            "transfer_syntax_uid": str(dataset.file_meta.TransferSyntaxUID),
        }
        return self.box.keep(Provenance(**values | more), body)

    def drain(self):
        """Until nothing waits any more; a test whose files stay fails here."""
        for _ in range(50):
            self.intake.take(self.box.folder)
            if not scan(self.box.folder):
                return
            self.intake._later.clear()
        raise AssertionError(f"{len(scan(self.box.folder))} files stay in the spool")

    def file(self, *datasets, **more):
        ids = self.receive(*datasets, **more)
        self.drain()
        return ids

    def all(self, table):
        with Session(self.engine) as session:
            return list(session.scalars(select(table)))

    def one(self, table):
        (row,) = self.all(table)
        return row

    def events(self):
        return [event.kind for event in self.all(EventRow)]

    def files(self, kind):
        return sorted((self.data_dir / kind).rglob("*.dcm"))


def encoded(dataset):
    syntax = dataset.file_meta.TransferSyntaxUID
    body = DicomBytesIO()
    body.is_little_endian = syntax != ExplicitVRBigEndian
    body.is_implicit_VR = syntax == ImplicitVRLittleEndian
    write_dataset(body, dataset)
    return body.getvalue()
