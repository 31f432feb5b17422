"""The dashboard in a real browser: Chromium, driven by Playwright, against the real process."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from sqlalchemy import Engine, delete
from sqlalchemy.orm import Session

from config.settings import Settings
from db.study import AnalysisState
from db.tables import SessionRow
from tests.browser import seed
from tests.browser.desk import DESK, PHONE, Site, open_study, serving, sit_down


@pytest.fixture
def site(settings: Settings, engine: Engine, tmp_path: Path) -> Iterator[Site]:
    data_dir = settings.node.data_dir
    studies = seed.hospital(engine, data_dir)
    with serving(settings, tmp_path) as base:
        yield Site(base, engine, data_dir, studies)


@pytest.fixture(autouse=True)
def _closing_time(chromium: Browser, site: Site) -> Iterator[None]:
    """Pages close before their server stops, as people's would not; they would ask on and on."""
    yield
    for context in chromium.contexts:
        context.close()


def test_a_one_time_link_leads_to_the_overview(chromium: Browser, site: Site) -> None:
    link = site.account("new", "reader", "north", password_hash="")
    page = chromium.new_context().new_page()

    page.goto(link)
    page.fill("input[name=password]", "a password of mine")
    page.fill("input[name=again]", "a password of mine")
    page.click("text=Set password and sign in")

    expect(page.locator("h1")).to_have_text("Overview")
    expect(page.locator("[data-chart] canvas")).to_be_visible()


def test_nothing_comes_from_elsewhere_and_nothing_breaks_the_policy(
    chromium: Browser, site: Site
) -> None:
    desk = sit_down(chromium, site, "admin", None)

    for path in (
        "/",
        "/worklist",
        f"/study/{site.studies['ACC-88121']}",
        "/health",
        "/docs",
        "/account",
    ):
        desk.page.goto(site.base + path)
        desk.page.wait_for_load_state("load")

    assert desk.troubles == []
    assert desk.hosts == {site.base.removeprefix("http://")}


def test_h51_a_hostile_name_runs_nowhere(chromium: Browser, site: Site) -> None:
    desk = sit_down(chromium, site)
    desk.page.on("dialog", lambda dialog: desk.troubles.append("a dialog opened"))

    desk.page.goto(f"{site.base}/worklist")
    expect(desk.page.locator("text=<script>alert(1)</script>").first).to_be_visible()
    open_study(desk, site, '"><b>x</b>')
    expect(desk.page.locator("h1")).to_contain_text("<script>")

    assert desk.troubles == []


def test_the_worklist_is_worked_by_keyboard(chromium: Browser, site: Site) -> None:
    page = sit_down(chromium, site).page
    page.goto(f"{site.base}/worklist")

    page.keyboard.press("/")
    page.keyboard.type("lindq")
    expect(page.locator("[data-row]")).to_have_count(1)
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")

    expect(page.locator("h1")).to_have_text("LINDQVIST, MAJA E")
    assert "lindq" not in page.url


def test_the_worklist_follows_the_node_without_a_reload(chromium: Browser, site: Site) -> None:
    page = sit_down(chromium, site).page
    page.goto(f"{site.base}/worklist")
    expect(page.locator("[data-row]").first).to_be_visible()

    seed.add(
        site.engine, site.data_dir, seed.Case(name="JUST^ARRIVED", probability=0.97, minutes_ago=0)
    )

    # Under the other STAT, which waits longer.
    expect(page.locator("[data-row]").nth(1)).to_contain_text("JUST, ARRIVED")


def test_a_filter_stays_through_a_live_refresh(chromium: Browser, site: Site) -> None:
    page = sit_down(chromium, site).page
    page.goto(f"{site.base}/worklist")
    page.select_option("select[name=outcome]", "failed")
    expect(page.locator("[data-row]")).to_have_count(1)

    failed = seed.Case(name="ALSO^FAILED", state=AnalysisState.FAILED, reason=("x", "", "", "Why."))
    seed.add(site.engine, site.data_dir, failed)

    expect(page.locator("[data-row]")).to_have_count(2)
    expect(page.locator("text=ADEYEMI")).to_have_count(0)


def test_the_stack_scrolls_by_wheel_keys_and_track(chromium: Browser, site: Site) -> None:
    desk = sit_down(chromium, site)
    page = open_study(desk, site)
    place = page.locator("[data-place]")
    expect(place).to_contain_text("13 of 24")  # opens on the strongest key slice

    page.keyboard.press("ArrowDown")
    expect(place).to_contain_text("14 of 24")
    page.keyboard.press("Home")
    expect(place).to_contain_text("1 of 24")
    page.hover(".stage")
    page.mouse.wheel(0, 120)
    expect(place).not_to_contain_text(re.compile(r"\b1 of 24"))
    page.locator("[data-track]").fill("20")
    expect(place).to_contain_text("21 of 24")
    page.click("[data-jump='11']")
    expect(place).to_contain_text("12 of 24")

    expect(page.locator(".stage")).to_have_attribute("data-shown", "11")
    width = page.locator("[data-slice]").evaluate("image => image.naturalWidth")
    assert width == 256
    assert desk.troubles == []


def test_the_heat_map_lies_over_key_slices_only_and_fades(chromium: Browser, site: Site) -> None:
    page = open_study(sit_down(chromium, site), site)
    cam = page.locator("[data-cam]")
    expect(cam).to_be_visible()
    assert 0.15 <= float(cam.evaluate("image => image.style.opacity")) <= 0.45

    page.locator("[data-opacity]").fill("0.9")
    assert float(cam.evaluate("image => image.style.opacity")) == 0.9
    page.keyboard.press("h")
    expect(cam).to_be_hidden()
    page.keyboard.press("h")
    expect(cam).to_be_visible()
    page.locator("[data-track]").fill("0")
    expect(cam).to_be_hidden()


def test_a_window_preset_changes_the_picture(chromium: Browser, site: Site) -> None:
    page = open_study(sit_down(chromium, site), site)
    expect(page.locator("[data-slice]")).to_be_visible()
    before = page.locator("[data-slice]").get_attribute("src")

    page.click("text=Wide")

    expect(page.locator("[data-slice]")).not_to_have_attribute("src", before or "")
    expect(page.locator("[data-window-name]")).to_have_text("C 40 W 400")


def test_a_study_without_pictures_says_why(chromium: Browser, site: Site) -> None:
    page = open_study(sit_down(chromium, site), site, "ACC-88119")

    expect(page.locator("[data-words]")).to_contain_text("not kept any more")
    expect(page.locator(".verdict")).to_contain_text("made with a contrast agent")


def test_an_operator_asks_for_another_run(chromium: Browser, site: Site) -> None:
    page = open_study(sit_down(chromium, site), site)
    page.on("dialog", lambda dialog: dialog.accept())

    page.click("text=Run again")

    expect(page.locator(".notice.good")).to_contain_text("Asked for")
    expect(page.locator("button", has_text="Run again")).to_be_disabled()


def test_an_open_page_notices_that_its_session_is_revoked(chromium: Browser, site: Site) -> None:
    page = sit_down(chromium, site).page
    page.goto(f"{site.base}/worklist")

    with Session(site.engine) as session, session.begin():
        session.execute(delete(SessionRow))

    page.wait_for_url(f"{site.base}/login**")


def test_dark_stays_dark(chromium: Browser, site: Site) -> None:
    page = sit_down(chromium, site, color_scheme="light").page
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)

    page.click("[data-theme-toggle]")
    dark = page.evaluate(ground)
    page.goto(f"{site.base}/worklist")

    assert light != dark
    assert page.evaluate(ground) == dark


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_no_page_is_wider_than_the_screen(
    chromium: Browser, site: Site, viewport: dict[str, int]
) -> None:
    desk = sit_down(chromium, site, "admin", None, viewport=viewport)

    for path in ("/", "/worklist", f"/study/{site.studies['ACC-88121']}", "/health", "/docs"):
        desk.page.goto(site.base + path)
        width = desk.page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"], path
    expect(desk.page.locator(".research")).to_be_visible()
