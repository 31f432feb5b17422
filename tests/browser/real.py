"""A hospital whose studies went the real way: reception, intake, inference, build, PACS."""

import datetime as dt
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset
from sqlalchemy import URL, Engine, create_engine, func, select, text, update
from sqlalchemy.orm import Session

from config.settings import NodeSettings, Settings
from config.tenants import Destination
from db.engine import engine_at
from db.result import Finding
from db.sandbox import Sandbox
from db.tables import ResultRow, StudyRow
from dicom_sr.deliver import Deliverer
from tests.browser.desk import Site, serving
from tests.builders import ctich_study, real_size_study
from tests.peers import Pacs
from tests.stage import Stages

BUNDLE = Path(__file__).parents[2] / "weights" / "ich"
#: Beyond `max_wait_s`, after which what is there is analysed, holes and all.
LONG_S = 700
#: A whole head in few slices, so that a test spends its time on the page.
COARSE = {"slices": 14, "thickness_mm": 8.0, "step_mm": 8.0}


@dataclass
class Node:
    """The stages behind a site, and the PACS before it."""

    site: Site
    stages: Stages
    deliverer: Deliverer
    pacs: Pacs
    sent: dict[str, list[Dataset]]  # by the name the tests use

    def run(self) -> None:
        """Everything between reception and the PACS, until nothing is left to do."""
        self.stages.judge()
        self.stages.infer()
        self.deliverer.run_once()

    def receive(self, name: str, datasets: Sequence[Dataset]) -> None:
        self.sent[name] = list(datasets)
        self.stages.receive(datasets)
        with Session(self.site.engine) as session:
            self.site.studies[name] = session.scalars(
                select(StudyRow.public_id).where(
                    StudyRow.study_instance_uid == datasets[0].StudyInstanceUID
                )
            ).one()

    def wait_long(self) -> None:
        """As if every study had been quiet for longer than a site waits for missing slices."""
        long_ago = func.now() - dt.timedelta(seconds=LONG_S)
        with Session(self.site.engine) as session, session.begin():
            session.execute(update(StudyRow).values(last_instance_at=long_ago))

    def result(self, name: str) -> tuple[uuid.UUID, Finding]:
        """The newest result of a study, as it is persisted."""
        with Session(self.site.engine) as session:
            row = session.scalars(
                select(ResultRow)
                .join(StudyRow, StudyRow.id == ResultRow.study_id)
                .where(StudyRow.public_id == self.site.studies[name])
                .order_by(ResultRow.result_no.desc())
                .limit(1)
            ).one()
            return row.id, Finding.from_json(row.finding)


@contextmanager
def hospital(server: URL, template: str, folder: Path) -> Iterator[Node]:
    """Four studies: suspected, not detected, incomplete, and one that cannot be judged."""
    with (
        _database(server, template) as url,
        _engine(url) as engine,
        Pacs() as pacs,
        Sandbox(size=1, memory_mb=4096, cpu_s=60) as sandbox,
    ):
        settings = Settings(
            node=NodeSettings(
                data_dir=folder / "var",
                database_url=url.render_as_string(hide_password=False),
                min_free_mb=0,
            )
        )
        pacs_there = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=pacs.port)
        stages = Stages(engine, settings, BUNDLE, destinations=(pacs_there,))
        deliverer = Deliverer(engine, stages.settings, sandbox, worker="test", version="0.1.0")
        try:
            with serving(settings, folder) as base:
                site = Site(base, engine, settings.node.data_dir)
                node = Node(site, stages, deliverer, pacs, {})
                _fill(node)
                yield node
        finally:
            stages.close()


def _fill(node: Node) -> None:
    node.receive("positive", ctich_study(51))
    node.receive("contrast", real_size_study("contrast", accession="CTA-1"))
    node.receive("negative", real_size_study("plain", accession="PLAIN-1", **COARSE))
    with_hole = real_size_study(
        "plain",
        skip=frozenset({9}),
        salt="hole",
        accession="HOLE-1",
        patient_id="H-1",
        **COARSE,
    )
    node.receive("partial", with_hole)
    node.stages.judge()
    node.wait_long()
    node.run()


@contextmanager
def _database(server: URL, template: str) -> Iterator[URL]:
    name = f"b{uuid.uuid4().hex[:12]}"
    admin = create_engine(server.set(database="postgres"), isolation_level="AUTOCOMMIT")
    try:
        with admin.connect() as connection:
            connection.execute(text(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
            yield server.set(database=name)
            connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    finally:
        admin.dispose()


@contextmanager
def _engine(url: URL) -> Iterator[Engine]:
    engine = engine_at(url, "node")
    try:
        yield engine
    finally:
        engine.dispose()
