"""What the pages show, to whom, and that nobody learns of another tenant's studies (H47, H51)."""

import io
import json
import uuid
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from config.settings import Settings
from db.study import AnalysisState
from db.tables import (
    AnalysisRow,
    AuditRow,
    CommitmentRow,
    DeliveryRow,
    EventRow,
    NoticeRow,
    RequestRow,
    StudyRow,
    UserRow,
)
from tests.browser.seed import hospital
from tests.browser.web import Person, Web, positive, running

_S = AnalysisState
OTHER = "00000000-0000-4000-8000-000000000000"
STUDY_PATHS = (
    "/study/{}",
    "/study/{}/image/0.png",
    "/study/{}/image/0.png?window=wide",
    "/study/{}/heatmap/0.png",
    "/study/{}/result.json",
    "/study/{}/result.zip",
    "/api/v1/studies/{}",
)


@pytest.fixture
def web(settings: Settings, engine: Engine, web_engine: Engine) -> Iterator[Web]:
    with running(settings, engine, web_engine) as made:
        yield made


def plain(answer_text: str, study_id: object) -> str:
    """A page without the id that was asked for."""
    return answer_text.replace(str(study_id), "ID")


@pytest.mark.parametrize("path", STUDY_PATHS)
@pytest.mark.parametrize("role", ["reader", "manager", "uploader"])
def test_h47_not_yours_and_not_there_are_the_same(web: Web, path: str, role: str) -> None:
    theirs = positive(web, tenant="south")
    person = web.person(role, "north")

    not_yours, not_there = person.get(path.format(theirs)), person.get(path.format(OTHER))

    assert not_yours.status_code == not_there.status_code == 404
    assert plain(not_yours.text, theirs) == plain(not_there.text, OTHER)
    same = {"content-type", "content-length"}
    assert {k: not_yours.headers[k] for k in same} == {k: not_there.headers[k] for k in same}


@pytest.mark.parametrize("action", ["rerun", "resend", "explode"])
def test_h47_actions_on_another_tenants_study_are_refused_alike(web: Web, action: str) -> None:
    theirs = positive(web, tenant="south")
    person = web.person("manager", "north")

    not_yours = person.post(f"/study/{theirs}/{action}")
    not_there = person.post(f"/study/{OTHER}/{action}")

    assert not_yours.status_code == not_there.status_code == 404
    assert plain(not_yours.text, theirs) == plain(not_there.text, OTHER)
    with Session(web.engine) as session:
        assert not session.scalar(select(func.count()).select_from(RequestRow))


@pytest.mark.parametrize("study_id", ["1", "x", "../etc", "%00", OTHER + "0"])
def test_what_cannot_be_an_id_is_not_there(web: Web, study_id: str) -> None:
    assert web.person("reader", "north").get(f"/study/{study_id}").status_code == 404


def test_h47_lists_and_totals_hold_the_own_tenant_only(web: Web) -> None:
    hospital(web.engine, web.data_dir)
    person = web.person("manager", "north")

    texts = [
        person.get(path).text
        for path in (
            "/", "/worklist?period=all", "/worklist?tenant=south&period=all", "/health",
            "/api/v1/overview", "/api/v1/studies?period=all", "/api/v1/health",
        )
    ]  # fmt: skip

    assert not [text for text in texts if "SOUTH" in text or "CT_SOUTH" in text]
    assert person.get("/api/v1/studies?tenant=south").json()["lines"] == []
    assert "context_refused" not in "".join(texts)
    assert "no_connection" not in "".join(texts)


def test_an_uploader_sees_own_uploads_only(web: Web) -> None:
    person = web.person("uploader", "north")
    with Session(web.engine) as session:
        user_id = session.scalar(select(UserRow.id).where(UserRow.role == "uploader"))
    own = positive(web, origin=f"user:{user_id}", name="OWN^UPLOAD")
    positive(web, name="FROM^SCANNER")

    listed = person.get("/worklist").text

    assert "OWN, UPLOAD" in listed
    assert "SCANNER" not in listed
    assert person.get(f"/study/{own}").status_code == 200


def test_an_admin_sees_all_tenants(web: Web) -> None:
    made = hospital(web.engine, web.data_dir)
    person = web.person("admin")

    listed = person.get("/worklist").text

    assert "SOUTH, PATIENT" in listed
    assert "ADEYEMI, TUNDE" in listed
    assert all(person.get(f"/study/{study_id}").status_code == 200 for study_id in made.values())


@pytest.mark.parametrize(
    "path", ["/worklist?state=NOPE", "/worklist?page=0", "/study/{}?bundle=%00"]
)
def test_a_value_that_is_not_understood_is_a_400(web: Web, path: str) -> None:
    assert web.person("reader", "north").get(path.format(OTHER)).status_code == 400


def test_h51_hostile_text_is_inert_on_every_page(web: Web) -> None:
    made = hospital(web.engine, web.data_dir)
    hostile = made['"><b>x</b>']
    person = web.person("manager", "north")

    for path in ("/worklist", f"/study/{hostile}"):
        text = person.get(path).text
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "<b>x</b>" not in text
        assert "\u202e" not in text
        assert "[U+202E]DI-1" in text


def test_the_study_page_shows_numbers_with_what_they_mean(web: Web) -> None:
    study_id = positive(web)

    text = web.person("reader", "north").get(f"/study/{study_id}").text

    for words in (
        "ICH AI: SUSPECTED", "93 %", "threshold 35 %", "at 8 % prevalence", "STAT",
        "raw score, not validated", "temp-2026-07", "Research use only",
    ):  # fmt: skip
        assert words in text


def test_a_refusal_states_rule_value_and_limit(web: Web) -> None:
    made = hospital(web.engine, web.data_dir)

    text = web.person("reader", "north").get(f"/study/{made['ACC-88119']}").text

    for words in ("Not analysed", "made with a contrast agent", "IOMERON 400", "none", "contrast"):
        assert words in text
    assert "%" not in text.partition("Timeline")[0].partition('id="live"')[2]


def test_a_reopened_study_never_shows_its_old_result_as_final(web: Web) -> None:
    study_id = positive(web, state=_S.WAITING)

    person = web.person("reader", "north")

    assert "will be replaced" in person.get(f"/study/{study_id}").text
    assert "SUSPECTED" not in person.get("/worklist").text


def test_half_a_series_never_looks_like_a_negative(web: Web) -> None:
    study_id = positive(web, is_partial=True, probability=0.1)
    person = web.person("reader", "north")

    for path in ("/worklist", f"/study/{study_id}"):
        assert "NOT DETECTED - INCOMPLETE" in person.get(path).text


def test_a_percent_never_stands_without_its_prevalence(web: Web) -> None:
    study_id = positive(web)
    person = web.person("reader", "north")

    report = person.get(f"/study/{study_id}").text.partition("Report as text")[2]
    line = person.get("/api/v1/studies").json()["lines"][0]["outcomes"][0]

    assert (line["probability"], line["prevalence"]) == ("93 %", "at 8 % prevalence")
    assert "at 8 % prevalence" in person.get("/worklist").text
    assert "Probability: 93.00 % at 8 % prevalence (highest on slice 4)" in report


def test_a_negative_changes_no_priority(web: Web) -> None:
    study_id = positive(web, probability=0.1)

    text = web.person("reader", "north").get(f"/study/{study_id}").text

    assert "Worklist priority: unchanged by AI" in text
    assert "ROUTINE" not in text


def test_the_timeline_speaks_in_sentences(web: Web) -> None:
    study_id = positive(web)

    text = web.person("reader", "north").get(f"/study/{study_id}").text
    timeline = text.partition("Timeline")[2].partition("Report as text")[0]

    assert "6 objects to pacs" in timeline
    assert "24 images" in timeline
    assert "state QUEUED" not in timeline


def test_a_partial_result_says_so(web: Web) -> None:
    study_id = positive(web, is_partial=True)

    person = web.person("reader", "north")

    assert "PARTIAL - 6 slices" in person.get(f"/study/{study_id}").text
    assert "PARTIAL" in person.get("/worklist").text


def test_a_shadows_result_is_shown_to_nobody(web: Web) -> None:
    study_id = positive(web, is_shadow=True)

    person = web.person("admin")

    for path in (f"/study/{study_id}", "/worklist", f"/api/v1/studies/{study_id}"):
        text = person.get(path).text
        assert "SUSPECTED" not in text
        assert "93 %" not in text
        assert "0.93" not in text
    assert person.get(f"/study/{study_id}/result.json").status_code == 404


def test_a_slice_is_drawn_through_the_window(web: Web) -> None:
    study_id = positive(web)
    person = web.person("reader", "north")

    pictures = {
        name: np.asarray(
            Image.open(
                io.BytesIO(person.get(f"/study/{study_id}/image/3.png?window={name}").content)
            )
        )
        for name in ("display", "wide", "full")
    }

    assert {picture.shape for picture in pictures.values()} == {(32, 32)}
    assert pictures["display"].min() == 0  # air
    assert pictures["display"].max() == 255  # bone
    assert (pictures["wide"] == 255).sum() < (pictures["display"] == 255).sum()


def test_an_image_out_of_the_stack_or_of_a_lost_file_says_why(web: Web) -> None:
    there, lost = positive(web), positive(web, slices=0)
    person = web.person("reader", "north")

    assert person.get(f"/study/{there}/image/6.png").text == "There is no such image."
    assert person.get(f"/study/{there}/image/-1.png").text == "There is no such image."
    assert "not kept any more" in person.get(f"/study/{lost}/image/0.png").text
    assert person.get(f"/study/{there}/image/0.png?window=x").status_code == 400


def test_a_heat_map_is_transparent_where_it_is_weak(web: Web) -> None:
    study_id = positive(web)

    answer = web.person("reader", "north").get(f"/study/{study_id}/heatmap/1.png")

    picture = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert picture.shape == (32, 32, 4)
    assert picture[0, 0, 3] == 0
    assert picture[..., 3].max() == 255


def test_a_heat_map_without_its_image_is_none(web: Web) -> None:
    study_id = positive(web, slices=0)

    answer = web.person("reader", "north").get(f"/study/{study_id}/heatmap/1.png")

    assert answer.status_code == 404
    assert "not kept any more" in answer.text


def test_downloads_hold_the_result_and_nothing_else(web: Web) -> None:
    study_id = positive(web)
    person = web.person("reader", "north")

    as_json = person.get(f"/study/{study_id}/result.json")
    as_zip = person.get(f"/study/{study_id}/result.zip")

    assert json.loads(as_json.text)["labels"][0]["label"] == "any"
    names = zipfile.ZipFile(io.BytesIO(as_zip.content)).namelist()
    assert len(names) == 1
    assert names[0].endswith(".dcm")
    assert "attachment" in as_zip.headers["content-disposition"]
    assert len(web.audit("result_downloaded")) == 2


def test_a_manager_asks_for_another_run_once(web: Web) -> None:
    study_id = positive(web)
    person = web.person("manager", "north")

    for _ in range(2):
        assert person.post(f"/study/{study_id}/rerun").status_code == 303

    with Session(web.engine) as session:
        request = session.scalars(select(RequestRow)).one()
        assert (request.action, request.user_name, request.tenant) == (
            "rerun",
            "manager-north",
            "north",
        )
    assert len(web.audit("rerun_asked")) == 2


@pytest.mark.parametrize("role", ["reader", "uploader"])
def test_only_operators_ask_for_another_run(web: Web, role: str) -> None:
    study_id = positive(web)

    answer = web.person(role, "north").post(f"/study/{study_id}/rerun")

    assert answer.status_code == 403
    assert web.audit("rerun")[0].outcome == "refused"


def test_what_the_state_forbids_is_not_asked_for(web: Web) -> None:
    study_id = positive(web, state=_S.QUEUED)

    answer = web.person("manager", "north").post(f"/study/{study_id}/resend")

    assert answer.headers["location"].endswith("asked=late")
    with Session(web.engine) as session:
        assert not session.scalar(select(func.count()).select_from(RequestRow))


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
def test_health_is_for_operators(web: Web, path: str) -> None:
    assert web.person("reader", "north").get(path).status_code == 403
    assert web.person("manager", "north").get(path).status_code == 200


def test_every_view_and_refusal_is_audited_once(web: Web) -> None:
    study_id = positive(web)
    person = web.person("reader", "north")
    for _ in range(3):
        person.get("/")
        person.get("/worklist")
        person.get(f"/study/{study_id}")
        person.get(f"/study/{study_id}/image/0.png")
    person.get(f"/study/{OTHER}")

    with Session(web.engine) as session:
        rows = session.execute(
            select(AuditRow.action, AuditRow.outcome, AuditRow.target)
            .where(AuditRow.actor == "reader-north")
            .order_by(AuditRow.id)
        ).all()

    assert [tuple(row) for row in rows if not row[0].startswith("user_")] == [
        ("login", "ok", ""),
        ("overview_viewed", "ok", ""),
        ("worklist_viewed", "ok", ""),
        ("study_viewed", "ok", str(study_id)),
        ("images_viewed", "ok", str(study_id)),
        ("not_found", "refused", OTHER),
    ]


def test_the_overview_counts(web: Web) -> None:
    hospital(web.engine, web.data_dir)

    found = web.person("reader", "north").get("/api/v1/overview").json()

    totals = found["totals"]
    assert (totals["n_studies"], totals["n_positive"], totals["n_results"]) == (10, 3, 6)
    assert (totals["n_not_analysed"], totals["n_failed"], totals["n_held"]) == (1, 1, 1)
    assert (found["queue"]["n_jobs"], found["queue"]["n_deliveries"]) == (1, 2)
    assert found["turnaround"]["p50_s"] == pytest.approx(27, abs=0.5)
    assert totals["confidence_positive"] == {"value": pytest.approx(0.6933, abs=1e-4), "n": 3}
    assert totals["confidence_negative"] == {"value": pytest.approx(0.1117, abs=1e-4), "n": 3}
    assert found["tenants"] == []
    assert sum(day["n_received"] for day in found["days"]) == 10
    assert [alarm["kind"] for alarm in found["alarms"]] == ["gave_up"]


def test_an_empty_node_says_where_to_send(web: Web) -> None:
    text = web.person("reader", "north").get("/").text

    assert "NORTH_AI" in text
    assert "SOUTH_AI" not in text
    assert "vigil send" in text


def test_every_page_says_research_use_only(web: Web) -> None:
    study_id = positive(web)
    person = web.person("admin")

    pages = ["/", "/worklist", f"/study/{study_id}", "/health", "/account", "/docs", "/nowhere"]
    texts = [person.get(path).text for path in pages] + [web.visitor().get("/login").text]

    assert all("research use only" in text.lower() for text in texts)


def test_live_hints_end_with_the_session(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashboard.live.POLL_S", 0.05)
    person = web.person("reader", "north")
    heard = []

    with person.client.stream("GET", "/live") as stream:
        for line in stream.iter_lines():
            heard.append(line)
            if line.startswith("retry"):
                with Session(web.engine) as session, session.begin():
                    session.execute(update(UserRow).values(is_disabled=True))

    assert "event: gone" in heard


def test_a_page_with_no_model_still_works(web: Web) -> None:
    study_id = positive(web)
    with Session(web.engine) as session, session.begin():
        session.execute(EventRow.__table__.delete())
        session.execute(AnalysisRow.__table__.delete())
        session.execute(update(StudyRow).values(study_description=""))

    assert web.person("reader", "north").get(f"/study/{study_id}").status_code == 200


def test_a_person_without_studies_of_a_bundle_gets_no_result(web: Web) -> None:
    study_id = positive(web)
    person: Person = web.person("reader", "north")

    assert person.get(f"/study/{study_id}/result.json?bundle=other").status_code == 404


def test_a_notice_that_was_sent_stands_under_deliveries(web: Web) -> None:
    reason = ("contrast", "IOMERON 400", "none", "The series was made with a contrast agent.")
    study_id = positive(web, probability=None, state=_S.NOT_ANALYSED, reason=reason)
    with Session(web.engine) as session, session.begin():
        row = session.scalars(select(AnalysisRow)).one()
        ours = {
            "analysis_id": row.id, "study_id": row.study_id, "tenant": "north", "origin": "dicom",
        }  # fmt: skip
        notice = NoticeRow(
            id=uuid.uuid4(), bundle="ich", result_no=1, analysis_version=0, notice={}, **ours
        )
        session.add(notice)
        session.add(
            DeliveryRow(
                result_id=notice.id, destination="pacs", state="DELIVERED", lane=1,
                expires_at=func.now(), finished_at=func.now(), **ours,
            )
        )  # fmt: skip

    text = web.person("reader", "north").get(f"/study/{study_id}").text

    deliveries = text.partition("<h2>Deliveries</h2>")[2].partition("</section>")[0]
    assert "notice: not processed" in deliveries
    assert "delivered" in deliveries


def test_a_delivery_says_whether_the_archive_vouches_for_it(web: Web) -> None:
    study_id = positive(web)
    with Session(web.engine) as session, session.begin():
        delivery = session.scalars(select(DeliveryRow)).first()
        assert delivery is not None
        for state in ("FAILED", "COMMITTED"):
            session.add(
                CommitmentRow(
                    delivery_id=delivery.id, study_id=delivery.study_id, tenant="north",
                    origin="dicom", destination=delivery.destination, items={}, state=state,
                )
            )  # fmt: skip
            session.flush()

    text = web.person("reader", "north").get(f"/study/{study_id}").text

    deliveries = text.partition("<h2>Deliveries</h2>")[2].partition("</section>")[0]
    assert "committed" in deliveries  # the newest word counts
    assert "failed" not in deliveries
