"""Probes, metrics, API description, and the process itself."""

import datetime as dt
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from config.settings import Settings
from db.engine import engine_at
from db.tables import ProcessRow
from tests.browser.seed import hospital
from tests.browser.web import Web, running


@pytest.fixture
def web(settings: Settings, engine: Engine, web_engine: Engine) -> Iterator[Web]:
    with running(settings, engine, web_engine, metrics_token="hunter2") as made:
        yield made


def test_the_process_is_healthy_under_any_host(web: Web) -> None:
    assert web.visitor().get("/healthz", headers={"host": "10.0.0.5"}).json() == {"status": "ok"}


def test_ready_needs_database_spool_and_a_loaded_model(web: Web) -> None:
    hospital(web.engine, web.data_dir)

    answer = web.visitor().get("/readyz")

    assert answer.status_code == 200
    assert answer.json()["ready"] is True
    assert set(answer.json()["checks"]) == {"database", "spool", "model"}


@pytest.mark.parametrize("missing", ["model", "spool"])
def test_not_ready_names_what_is_missing(web: Web, missing: str) -> None:
    hospital(web.engine, web.data_dir)
    if missing == "spool":
        (web.data_dir / "spool").rmdir()
    else:
        with Session(web.engine) as session, session.begin():
            session.execute(
                update(ProcessRow).values(seen_at=ProcessRow.seen_at - dt.timedelta(minutes=1))
            )

    answer = web.visitor().get("/readyz")

    assert answer.status_code == 503
    assert [name for name, check in answer.json()["checks"].items() if not check["ok"]] == [missing]


def test_an_inference_process_without_a_model_is_not_ready(web: Web) -> None:
    hospital(web.engine, web.data_dir)
    with Session(web.engine) as session, session.begin():
        session.execute(update(ProcessRow).values(detail={"models": {}}))

    assert web.visitor().get("/readyz").status_code == 503


def test_a_version_that_cannot_be_loaded_makes_the_model_not_ready(web: Web) -> None:
    hospital(web.engine, web.data_dir)
    refused = {"ich 1.1.0+c0": {"code": "weights_hash", "reason": "of a tenant"}}
    with Session(web.engine) as session, session.begin():
        detail = {"models": {"ich": "1.0.0+c0"}, "refused": refused}
        session.execute(update(ProcessRow).values(detail=detail))

    answer = web.visitor().get("/readyz")

    assert answer.status_code == 503
    words = answer.json()["checks"]["model"]["words"]
    assert words == "cannot be loaded: ich 1.1.0+c0"


def test_the_pages_survive_a_database_that_is_away(
    settings: Settings, engine: Engine, web_engine: Engine
) -> None:
    dead = engine_at(web_engine.url.set(query={"host": "/nowhere"}), "web")
    with running(settings, engine, dead) as web:
        visitor = web.visitor(cookies={"vigil_session": "x"})

        page, ready, metrics = (visitor.get(path) for path in ("/", "/readyz", "/metrics"))

        assert visitor.get("/healthz").status_code == 200
    assert page.status_code == 503
    assert "database does not answer" in page.text
    assert "nowhere" not in page.text
    assert ready.status_code == 503
    assert ready.json()["checks"]["database"]["ok"] is False
    assert metrics.status_code == 403  # TestClient is no client on this machine


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        (("127.0.0.1", 1), {}, 200),
        (("127.0.0.1", 1), {"x-forwarded-for": "203.0.113.5"}, 403),
        (("203.0.113.5", 1), {}, 403),
        (("203.0.113.5", 1), {"authorization": "Bearer wrong"}, 403),
        (("203.0.113.5", 1), {"authorization": "Bearer hunter2"}, 200),
    ],
)
def test_metrics_by_token_or_from_this_machine(
    web: Web, client: tuple[str, int], headers: dict[str, str], status: int
) -> None:
    assert web.visitor(client=client).get("/metrics", headers=headers).status_code == status


def test_metrics_hold_numbers_and_no_patient(web: Web) -> None:
    made = hospital(web.engine, web.data_dir)
    web.person("admin").get(f"/study/{made['ACC-88121']}")

    text = web.visitor(client=("127.0.0.1", 1)).get("/metrics").text

    assert 'vigil_studies{state="held",tenant="north"} 1.0' in text
    assert 'vigil_turnaround_seconds{quantile="0.5"} 27' in text
    assert 'route="/study/{study_id}"' in text
    assert "vigil_database_up 1.0" in text
    for secret in ("ADEYEMI", "N-10023", "ACC-88121", str(made["ACC-88121"])):
        assert secret not in text


def test_the_api_describes_itself_without_a_foreign_script(web: Web) -> None:
    text = web.visitor().get("/docs").text

    assert "GET /api/v1/studies/{study_id}" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "/api/v1/overview" in web.visitor().get("/openapi.json").json()["paths"]


def test_the_process_says_where_it_listens_and_stops_on_sigterm(
    settings: Settings, tmp_path: Path
) -> None:
    config = tmp_path / "vigil.toml"
    config.write_text("[dashboard]\nport = 0\n")
    environment = os.environ | {
        "VIGIL_CONFIG": str(config),
        "VIGIL_NODE__DATABASE_URL": settings.node.database_url.get_secret_value(),
        "VIGIL_NODE__DATA_DIR": str(settings.node.data_dir),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "dashboard"], env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())

        with urlopen(f"http://{line['address']}:{line['port']}/healthz") as answer:
            status = answer.status
        process.send_signal(signal.SIGTERM)
        rc = process.wait(timeout=20)

    assert line["event"] == "listening"
    assert status == 200
    assert rc == 0
