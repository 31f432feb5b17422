"""The worklist: in which order studies stand, and how they are found."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from config.settings import Settings
from db import withdrawals
from db.study import AnalysisState, WithdrawalReason
from db.tables import AnalysisRow, StudyRow
from tests.browser.seed import hospital
from tests.browser.web import Web, positive, running

_S = AnalysisState


@pytest.fixture
def web(settings: Settings, engine: Engine, web_engine: Engine) -> Iterator[Web]:
    with running(settings, engine, web_engine) as made:
        yield made


def listed(web: Web) -> list[str]:
    """Accession numbers in the worklist's order."""
    lines = web.person("reader", "north").get("/api/v1/studies").json()["lines"]
    return [line["accession_number"] for line in lines]


def test_the_worklist_puts_urgent_first_and_who_waits_longest_on_top(web: Web) -> None:
    for accession, probability, minutes in (
        ("U-NEW", 0.5, 1), ("S-NEW", 0.9, 2), ("U-OLD", 0.5, 300), ("S-OLD", 0.9, 50),
        ("N", 0.1, 400),
    ):  # fmt: skip
        positive(web, accession=accession, probability=probability, minutes_ago=minutes)

    assert listed(web) == ["S-OLD", "S-NEW", "U-OLD", "U-NEW", "N"]


def test_what_needs_a_person_stands_above_negatives(web: Web) -> None:
    reason = ("x", "", "", "Why.")
    quiet = {"probability": 0.1}
    for accession, minutes, changes in (
        ("NEGATIVE", 1, quiet),
        ("FAILED", 20, {"probability": None, "state": _S.FAILED, "reason": reason}),
        ("HELD", 30, {**quiet, "is_held": True, "state": _S.BUILT, "delivery": "WAITING"}),
        ("REFUSED", 10, {**quiet, "state": _S.DELIVERED_IN_PART, "delivery": "REFUSED"}),
        ("WAITING", 2, {"probability": None, "state": _S.WAITING}),
        ("STAT", 5, {"probability": 0.9}),
    ):  # fmt: skip
        positive(web, accession=accession, minutes_ago=minutes, **changes)

    assert listed(web) == ["STAT", "HELD", "FAILED", "REFUSED", "NEGATIVE", "WAITING"]
    page = web.person("reader", "north", "other").get("/worklist").text
    assert page.count(">CHECK<") == 3
    assert "Held for a decision" in page
    assert "Analysis failed" in page
    assert "Not delivered everywhere" in page
    assert "with gaps" not in page


def test_a_withdrawn_result_is_called_so_and_nothing_it_said_is_shown(web: Web) -> None:
    key = positive(web, accession="WITHDRAWN", probability=0.93, minutes_ago=1)
    positive(web, accession="SUSPECTED", probability=0.6, minutes_ago=2)
    with Session(web.engine) as session, session.begin():
        row = session.scalars(
            select(AnalysisRow).join(StudyRow).where(StudyRow.public_id == key)
        ).one()
        withdrawals.withdraw(session, row.id, actor="admin", reason=WithdrawalReason.PATIENT_SAFETY)
    reader = web.person("reader", "north", "other")

    assert listed(web) == ["SUSPECTED", "WITHDRAWN"]
    found = reader.get("/api/v1/studies?outcome=withdrawn").json()["lines"]
    assert [line["accession_number"] for line in found] == ["WITHDRAWN"]
    assert "Result withdrawn" in reader.get("/worklist").text
    page = reader.get(f"/study/{key}").text
    assert "Withdrawn by an operator (patient safety)." in page
    assert "must not be used" in page
    assert "93 %" not in page
    assert "Result withdrawn by an operator" in page
    assert "rejection note" in page
    assert "%" not in reader.get("/worklist?outcome=withdrawn").text.partition("<tbody")[2]


def test_among_quiet_studies_the_newest_stands_first(web: Web) -> None:
    for accession, minutes in (("OLD", 300), ("NEW", 3), ("MIDDLE", 30)):
        positive(web, accession=accession, probability=0.1, minutes_ago=minutes)

    assert listed(web) == ["NEW", "MIDDLE", "OLD"]


def test_a_reopened_study_keeps_its_place_while_it_is_judged_again(web: Web) -> None:
    positive(web, accession="NEGATIVE", probability=0.1, minutes_ago=1)
    positive(web, accession="REOPENED", probability=0.9, minutes_ago=9, state=_S.WAITING)

    assert listed(web) == ["REOPENED", "NEGATIVE"]


@pytest.mark.parametrize(
    ("outcome", "accession"),
    [("positive", "ACC-88121"), ("negative", "ACC-88101"), ("pending", "ACC-88132"),
     ("not_analysed", "ACC-88119"), ("failed", "ACC-88117")],
)  # fmt: skip
def test_the_worklist_filters_by_outcome(web: Web, outcome: str, accession: str) -> None:
    hospital(web.engine, web.data_dir)

    found = web.person("reader", "north").get(f"/api/v1/studies?outcome={outcome}").json()["lines"]

    assert accession in [line["accession_number"] for line in found]
    assert {one["kind"] for line in found for one in line["outcomes"]} == {outcome}


@pytest.mark.parametrize("text", ["ACC-88121", "n-100", "Adeyemi, T", "adeyemi tunde"])
def test_a_search_finds_by_accession_id_and_name(web: Web, text: str) -> None:
    hospital(web.engine, web.data_dir)
    positive(web, name="OLD^ONE", minutes_ago=100_000)
    person = web.person("reader", "north")

    found = person.post("/worklist", q=text).text

    assert "ADEYEMI, TUNDE" in found
    assert "SMITH" not in found


@pytest.mark.parametrize("text", ["%", "_", "\\", "'; DROP TABLE studies; --", "\0"])
def test_a_search_takes_every_character_as_it_is(web: Web, text: str) -> None:
    positive(web, name="A^B", patient_id="P", accession="C")
    person = web.person("reader", "north")

    answer = person.post("/worklist", q=text)

    assert answer.status_code == 200
    assert ("A, B" in answer.text) == (text == "\0")  # which is no character, hence no search


def test_a_search_for_another_tenants_patient_finds_nothing(web: Web) -> None:
    positive(web, tenant="south", name="SOUTH^PATIENT")

    assert "SOUTH" not in web.person("reader", "north").post("/worklist", q="south").text
