"""/metrics for Prometheus: numbers of the node and of this dashboard; no patient data in labels."""

import hmac
import time
from collections.abc import Iterable

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.settings import Settings
from dashboard import figures, health, overview
from dashboard.context import Context, Ctx
from dashboard.guard import is_loopback, is_proxied
from dashboard.tenancy import COUNTER, acting_as
from db import notices
from db.job import JobState
from db.outbox import OPEN
from db.tables import AnalysisRow, DeliveryRow, JobRow, ProcessRow, ResultRow, StudyRow

router = APIRouter(tags=["probes"])


class NodeNumbers(Collector):
    """Read from the database when Prometheus asks."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterable[Metric]:
        yield from _disk(self._context.settings)
        try:
            with acting_as(self._context.engine, COUNTER) as session:
                yield from _numbers(session)
            is_up = 1.0
        except SQLAlchemyError:
            is_up = 0.0
        yield _gauge("vigil_database_up", "Whether the database answers", [((), is_up)], [])


def registry(context: Context) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(NodeNumbers(context))
    return made


class Timed:
    """Measures every request by its route's pattern, which holds no id."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._seconds = Histogram(
            "vigil_http_request_seconds",
            "Time to answer, by route",
            ["route", "method", "status"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/live":  # a stream has no end to wait for
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
            seconds = time.perf_counter() - start
            self._seconds.labels(route, method, str(status)).observe(seconds)


@router.get("/metrics", response_class=Response)
def metrics(request: Request, context: Ctx) -> Response:
    """Prometheus text; by bearer token, or from this machine."""
    if not _is_allowed(request, context.settings):
        return Response("Metrics need a token, or a client on this machine.\n", 403)
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


def _is_allowed(request: Request, settings: Settings) -> bool:
    token = settings.dashboard.metrics_token.get_secret_value()
    given = request.headers.get("authorization", "")
    if token and hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        return True
    address = request.client.host if request.client else ""
    return is_loopback(address) and not is_proxied(request.headers.keys())


def _disk(settings: Settings) -> Iterable[Metric]:
    found = health.disk(settings)
    yield _gauge(
        "vigil_disk_free_bytes", "Free under data_dir", [((), found.free_mb * 2.0**20)], []
    )


def _numbers(session: Session) -> Iterable[Metric]:
    count = func.count()
    states = select(StudyRow.tenant, StudyRow.state, count).group_by(
        StudyRow.tenant, StudyRow.state
    )
    yield _counted(session, "vigil_studies", "Studies by state", states, ["tenant", "state"])
    results = (
        select(ResultRow.tenant, ResultRow.bundle, ResultRow.is_positive, count)
        .join(AnalysisRow, (AnalysisRow.id == ResultRow.analysis_id))
        .where(AnalysisRow.is_shadow.is_(False), AnalysisRow.result_no == ResultRow.result_no)
        .group_by(ResultRow.tenant, ResultRow.bundle, ResultRow.is_positive)
    )
    names = ["tenant", "bundle", "is_positive"]
    yield _counted(session, "vigil_results", "Newest results", results, names)
    jobs = (
        select(JobRow.tenant, JobRow.kind, JobRow.lane, count)
        .where(JobRow.state.in_([JobState.TODO, JobState.DOING]), ~notices.is_put_off())
        .group_by(JobRow.tenant, JobRow.kind, JobRow.lane)
    )
    yield _counted(session, "vigil_jobs", "Jobs that wait or run", jobs, ["tenant", "kind", "lane"])
    sends = (
        select(DeliveryRow.tenant, DeliveryRow.destination, count)
        .where(DeliveryRow.state.in_(OPEN))
        .group_by(DeliveryRow.tenant, DeliveryRow.destination)
    )
    names = ["tenant", "destination"]
    yield _counted(session, "vigil_deliveries_waiting", "Results on their way", sends, names)
    yield from _ages(session)


def _ages(session: Session) -> Iterable[Metric]:
    queue = overview.queue(session)
    ages = [(("job",), queue.oldest_job_s or 0.0), (("delivery",), queue.oldest_delivery_s or 0.0)]
    yield _gauge("vigil_oldest_waiting_seconds", "Age of the oldest in a queue", ages, ["queue"])
    turnaround = figures.turnarounds(session)[figures.ALL]
    shares = (("0.5", turnaround.p50_s), ("0.95", turnaround.p95_s))
    points = [((share,), value) for share, value in shares if value is not None]
    words = "Last slice to last object delivered, 30 days"
    yield _gauge("vigil_turnaround_seconds", words, points, ["quantile"])
    seen = func.extract("epoch", func.now() - func.max(ProcessRow.seen_at))
    stages = session.execute(select(ProcessRow.stage, seen).group_by(ProcessRow.stage)).all()
    points = [((stage,), float(age)) for stage, age in stages]
    yield _gauge("vigil_stage_seen_seconds", "Since a stage last reported", points, ["stage"])


def _counted(
    session: Session, name: str, words: str, query: object, labels: list[str]
) -> GaugeMetricFamily:
    rows = session.execute(query).all()  # type: ignore[call-overload]  # any select with a count last
    points = [(tuple(str(part).lower() for part in row[:-1]), float(row[-1])) for row in rows]
    return _gauge(name, words, points, labels)


def _gauge(
    name: str, words: str, points: Iterable[tuple[tuple[str, ...], float]], labels: list[str]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, words, labels=labels)
    for values, value in points:
        family.add_metric(list(values), value)
    return family
