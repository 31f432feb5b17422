"""`vigil demo`: a whole hospital on loopback, from the scanner to the PACS and back."""

import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from config.settings import Settings, load
from db.engine import engine_for
from db.result import Finding, percent
from db.tables import AnalysisRow, ResultRow, StudyRow
from db.wording import verdict
from node.demo_view import View
from node.hospital import Scanners, Visit, configuration, visits
from node.orthanc import OrthancPacs
from node.pacs import Pacs
from node.running import NodeFailed, RunningNode, free_port
from node.terminal import FAILED, SUCCESS, WRONG_USAGE, complain, print_json

READY_S = 180.0  # the first start creates a database and loads torch from a cold disk
OUTCOME_S = 300.0  # after the last image, for all studies together
TICK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    studies: tuple[Path, ...] = ()
    once: bool = False
    orthanc: bool = False
    keep: Path | None = None
    model: str = "ich"
    as_json: bool = False


class Archive(Protocol):
    """What the demo asks of a PACS."""

    port: int
    name: str

    def count(self, *, called_ae: str, study_instance_uid: str) -> dict[str, int]:
        """Objects of a study, by kind."""

    def strays(self, *, called_ae: str, study_instance_uid: str) -> int:
        """Objects of this study that went to another hospital's archive."""

    def last_at(self, *, study_instance_uid: str) -> float | None:
        """When the newest object of a study came, on the monotonic clock, if that is known."""

    def close(self) -> None: ...


def run(options: Options) -> int:
    """Set up, send, watch, report; the exit status says whether all went as expected."""
    if missing := [folder for folder in options.studies if not folder.exists()]:
        complain(f"{missing[0]} does not exist")
        return WRONG_USAGE
    view = View(is_silent=options.as_json)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    with _workplace(options) as folder:
        try:
            return _run(options, view, folder, started)
        except (NodeFailed, RuntimeError) as error:
            complain(str(error))
            complain(_tail(folder / "node.log"))
            return FAILED
        except KeyboardInterrupt:
            view.step("Interrupted; everything is stopped and removed.")
            return FAILED


def _run(options: Options, view: View, folder: Path, started: float) -> int:
    with ExitStack() as stack:
        view.welcome(folder)
        archive = _archive(options, folder)
        stack.callback(archive.close)
        config = folder / "vigil.toml"
        scp_port = free_port()
        text = configuration(
            folder / "node", scp_port=scp_port, web_port=free_port(),
            pacs_port=archive.port, model=options.model,
        )  # fmt: skip
        config.write_text(text, encoding="utf-8")
        view.step(f"{archive.name} listens on port {archive.port}, as NORTH_PACS and SOUTH_PACS.")
        with view.busy("Starting the node: database, receiver, inference, delivery, dashboard"):
            node = stack.enter_context(RunningNode(config, folder / "node.log"))
            node.wait_ready(READY_S)
        view.step(f"The node is ready on port {scp_port}, as NORTH_AI and SOUTH_AI.")
        settings = load(config)
        engine = engine_for(settings, "node", pool_size=2)
        stack.callback(engine.dispose)
        if not options.once:
            view.dashboard(sign_in_link(engine, settings))
        waiting = visits(options.studies)
        _watch(waiting, engine, archive, view, Scanners(waiting, scp_port, folder / "scans"))
        document = _document(waiting, archive, folder, time.monotonic() - started)
        if options.as_json:
            print_json(document)
        view.summary(waiting, document)
        if not options.once:
            view.stays_up(sign_in_link(engine, settings))
            with suppress(KeyboardInterrupt):
                node.process.wait()
            view.step("Stopping; everything is removed.")
        return SUCCESS if document["ok"] else FAILED


def _watch(
    visits: Sequence[Visit], engine: Engine, archive: Archive, view: View, scanners: Scanners
) -> None:
    """Follow every study until each has its outcome, or the time is over."""
    scanners.start()
    deadline = None
    with view.table(visits) as refresh:
        while not all(visit.outcome or _is_lost(visit) for visit in visits):
            if deadline is None and not scanners.is_alive():
                deadline = time.monotonic() + OUTCOME_S
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(TICK_S)
            with Session(engine) as session:
                for visit in visits:
                    _look(session, visit, archive)
            refresh()


def _is_lost(visit: Visit) -> bool:
    """Nothing of it was taken, so nothing will come of it."""
    return "not taken" in visit.stage or "could not be sent" in visit.stage


def _look(session: Session, visit: Visit, archive: Archive) -> None:
    """Read what the node knows of a visit by now."""
    if visit.outcome or visit.acknowledged_at is None:
        return
    study = session.scalar(
        select(StudyRow).where(
            StudyRow.tenant == visit.tenant,
            StudyRow.study_instance_uid == visit.study_instance_uid,
        )
    )
    if study is None:
        return
    row = session.scalar(
        select(AnalysisRow)
        .where(AnalysisRow.study_id == study.id, AnalysisRow.is_shadow.is_(False))
        .order_by(AnalysisRow.id)
    )
    if row is None:
        return
    result = session.scalar(
        select(ResultRow).where(
            ResultRow.analysis_id == row.id, ResultRow.result_no == row.result_no
        )
    )
    visit.facts = {
        "state": row.state,
        "reason_code": row.reason_code,
        "reason": row.reason,
        "instances": study.n_instances,
        **(_numbers(Finding.from_json(result.finding)) if result else {}),
    }
    visit.facts["pacs"] = archive.count(
        called_ae=visit.pacs, study_instance_uid=visit.study_instance_uid
    )
    if visit.outcome:
        came = archive.last_at(study_instance_uid=visit.study_instance_uid)
        visit.settled_after_s = (came or time.monotonic()) - visit.acknowledged_at


def _numbers(finding: Finding) -> dict[str, Any]:
    primary = finding.primary
    shown = percent(primary.probability) if primary.probability else ""
    words = verdict(is_positive=finding.is_positive, is_partial=finding.is_partial)
    return {
        "ai": f"{primary.words}: {words} {shown}".strip(),
        "is_positive": finding.is_positive,
        "urgency": str(finding.urgency),
        "is_partial": finding.is_partial,
        "probability": primary.probability.value if primary.probability else None,
        "labels": [
            {
                "label": label.label,
                "words": label.words,
                "status": str(label.status),
                "logit": label.raw.logit,
                "probability": label.probability.value if label.probability else None,
                "is_present": label.is_present,
            }
            for label in finding.labels
        ],
    }


def _document(
    visits: Sequence[Visit], archive: Archive, folder: Path, seconds: float
) -> dict[str, Any]:
    strays = sum(
        archive.strays(called_ae=visit.pacs, study_instance_uid=visit.study_instance_uid)
        for visit in visits
        if visit.study_instance_uid
    )
    return {
        "ok": all(visit.is_as_expected for visit in visits) and not strays,
        "studies": [_entry(visit) for visit in visits],
        "objects_in_a_wrong_pacs": strays,
        "pacs": archive.name,
        "seconds": round(seconds, 1),
        "folder": str(folder),
    }


def _entry(visit: Visit) -> dict[str, Any]:
    return {
        "patient": visit.patient,
        "tenant": visit.tenant,
        "truth": visit.truth,
        "study_instance_uid": visit.study_instance_uid,
        "images_sent": len(visit.sent),
        "expected": visit.expected,
        "outcome": visit.outcome or "none",
        "ok": visit.is_as_expected,
        "seconds": visit.settled_after_s and round(visit.settled_after_s, 1),
        "stage": visit.stage,
        **visit.facts,
    }


def sign_in_link(engine: Engine, settings: Settings) -> str:
    """A one-time link to the dashboard for the demo's administrator."""
    from dashboard.users import BadAccount, create_user, find_user, login_link

    with Session(engine) as session, session.begin():
        try:
            user = find_user(session, "demo")
        except BadAccount:
            user = create_user(session, "demo", "admin", None)
        pages = settings.dashboard
        return login_link(session, user.id, f"http://{pages.host}:{pages.port}")


def _archive(options: Options, folder: Path) -> Archive:
    if options.orthanc:
        return OrthancPacs(folder / "orthanc", free_port(), free_port())
    return Pacs(folder / "pacs")


@contextmanager
def _workplace(options: Options) -> Iterator[Path]:
    """A folder that is removed in the end, unless the caller names one to keep."""
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        yield options.keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="vigil-demo-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _tail(log: Path, lines: int = 15) -> str:
    if not log.exists():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
