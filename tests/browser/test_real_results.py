"""The pages over results of the real stages, in a real browser: what is shown is what is stored."""

import base64
import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from playwright.sync_api import Browser, Page, expect
from pydicom import Dataset
from sqlalchemy import URL, select
from sqlalchemy.orm import Session

from dashboard import happenings
from db import paint
from db.files import result_folder
from db.result import Finding, percent
from db.tables import EventRow, ObjectRow, StudyRow
from db.wording import plain, prevalence_words, shown_threshold
from tests.browser.desk import DESK, PHONE, Desk, open_study, sign_in
from tests.browser.real import Node, hospital
from tests.conftest import TEMPLATE

# A picture's channel as the page has it, in base64: as numbers it would take seconds to hand over.
_PIXELS = """
(image, channel) => {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let text = "";
  for (let i = channel; i < data.length; i += 4) text += String.fromCharCode(data[i]);
  return btoa(text);
}
"""


@pytest.fixture(scope="module")
def node(database_server: URL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with hospital(database_server, TEMPLATE, tmp_path_factory.mktemp("real")) as made:
        made.site.account("mia", "manager", "north")
        made.site.account("rita", "reader", "north")
        yield made
    torch.set_num_threads(n_threads)


@pytest.fixture
def desk(chromium: Browser, node: Node) -> Iterator[Desk]:
    """A manager's; whoever leaves it has seen no error, nothing from elsewhere, no violation."""
    found = sign_in(chromium, node.site, "mia")
    yield found
    assert found.violations == []
    assert found.troubles == []
    assert found.hosts == {node.site.base.removeprefix("http://")}
    found.page.context.close()


RED, ALPHA = 0, 3


def pixels(page: Page, selector: str, channel: int) -> NDArray[np.uint8]:
    """Shape (rows, columns)."""
    image = page.locator(selector)
    expect(image).to_be_visible()
    image.evaluate("image => image.decode()")  # fails where it is no picture
    width, height = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    flat = base64.b64decode(image.evaluate(_PIXELS, channel))
    return np.frombuffer(flat, np.uint8).reshape(height, width)


def shown_slice(page: Page, index: int) -> NDArray[np.uint8]:
    """The grey levels of the slice once the page says that it is the one shown."""
    expect(page.locator(".stage")).to_have_attribute("data-shown", str(index))
    return pixels(page, "[data-slice]", RED)


def source_of(node: Node, name: str, finding: Finding, index: int) -> NDArray[np.float32]:
    """What the scanner sent for an analysed image, rescaled."""
    uid = finding.images[index].sop_instance_uid
    sent: Dataset = next(one for one in node.sent[name] if uid == one.SOPInstanceUID)
    rescaled: NDArray[np.float32] = sent.pixel_array.astype(np.float32) * np.float32(
        sent.RescaleSlope
    ) + np.float32(sent.RescaleIntercept)
    return rescaled


def key_start(finding: Finding) -> int:
    return max(finding.key_images, key=lambda key: key.raw.logit).image


def test_the_study_page_shows_the_numbers_that_are_stored(desk: Desk, node: Node) -> None:
    for name, verdict in (("positive", "SUSPECTED"), ("negative", "NOT DETECTED")):
        _, finding = node.result(name)
        primary = finding.primary
        page = open_study(desk, node.site, name)

        assert primary.probability is not None
        assert primary.threshold is not None
        first = page.locator(".labels li").first
        words = f"{percent(primary.probability)} {prevalence_words(primary)}"
        expect(first.locator("b")).to_have_text(words)
        threshold = shown_threshold(primary)
        assert threshold is not None
        expect(first.locator("small")).to_contain_text(f"threshold {plain(100 * threshold)} %")
        width = first.locator("rect.fill").get_attribute("width")
        assert float(width or 0) == pytest.approx(100 * primary.probability.value, abs=0.01)
        expect(page.locator(".verdict h2")).to_have_text(f"{finding.output.short_name}: {verdict}")
        expect(page.locator(".verdict .badge")).to_have_count(1 if finding.is_positive else 0)
        expect(page.locator(".facts")).to_contain_text(f"{len(finding.images)} slices")
        expect(page.locator(".facts code").first).to_have_text(finding.model.weights_sha256[:12])
        raw = page.locator(".labels + details td.num").all_text_contents()
        exploratory = [label for label in finding.labels if label.probability is None]
        assert raw == [f"{label.raw.output:.2f}" for label in exploratory]


def test_the_worklist_and_the_overview_show_the_same(desk: Desk, node: Node) -> None:
    page = desk.page
    page.goto(f"{node.site.base}/worklist")
    rows = page.locator("[data-row]")

    names = ["positive", "partial", "negative"]
    results = {name: node.result(name)[1] for name in names}
    assert rows.count() == 4
    first = rows.first
    expect(first.locator(".badge")).to_have_text(results["positive"].urgency.value)
    for name, finding in results.items():
        row = page.locator(f"[data-row]:has(a[href$='{node.site.studies[name]}'])")
        shown = finding.primary.probability
        assert shown is not None
        expect(row.locator(".prob")).to_have_text(
            f"{percent(shown)}{prevalence_words(finding.primary)}"
        )
        expect(row.locator(".sent")).to_contain_text("pacs: delivered")
    expect(page.locator("[data-row]", has_text="INCOMPLETE")).to_have_count(1)

    page.goto(node.site.base)
    tiles = page.locator(".tiles")
    expect(tiles).to_contain_text("Studies4")
    expect(tiles).to_contain_text("1 of 3 results")
    means = [
        np.mean(
            [
                result.primary.probability.value
                for result in results.values()
                if result.primary.probability and result.is_positive is is_positive
            ]
        )
        for is_positive in (True, False)
    ]
    words = [f"{100 * mean:.1f} %" for mean in means]
    expect(tiles).to_contain_text(f"{words[0]} · {words[1]}")
    expect(tiles).to_contain_text("suspected (n 1) · not detected (n 2)")


def test_the_slices_are_those_the_scanner_sent(desk: Desk, node: Node) -> None:
    _, finding = node.result("positive")
    page = open_study(desk, node.site, "positive")
    output = finding.output

    start = key_start(finding)
    steps: list[tuple[int, Callable[[], None]]] = [
        (start, lambda: None),
        (start + 1, lambda: page.keyboard.press("ArrowDown")),
        (0, lambda: page.keyboard.press("Home")),
    ]
    for index, act in steps:
        act()
        wanted = paint.grey_levels(
            source_of(node, "positive", finding, index), output.window_centre, output.window_width
        )
        np.testing.assert_allclose(shown_slice(page, index).astype(int), wanted, atol=1)

    page.hover(".stage")
    page.mouse.wheel(0, 120)
    expect(page.locator("[data-place]")).to_contain_text(re.compile(r"· [234] of"))
    index = int(page.locator("[data-track]").input_value())
    expected = paint.grey_levels(source_of(node, "positive", finding, index), 40, 80)
    np.testing.assert_allclose(shown_slice(page, index).astype(int), expected, atol=1)


def test_each_window_shows_other_pixels_of_the_same_slice(desk: Desk, node: Node) -> None:
    _, finding = node.result("positive")
    page = open_study(desk, node.site, "positive")
    start = key_start(finding)
    source = source_of(node, "positive", finding, start)
    shown = {"display": shown_slice(page, start)}

    for name, words in (("wide", "C 40 W 400"), ("full", "Full range")):
        before = page.locator("[data-slice]").get_attribute("src")
        page.click(f"[data-window={name}]")
        expect(page.locator("[data-window-name]")).to_have_text(words)
        expect(page.locator("[data-slice]")).not_to_have_attribute("src", before or "")
        shown[name] = shown_slice(page, start)

    wide = paint.grey_levels(source, 40, 400)
    low, high = float(source.min()), float(source.max())
    full = paint.grey_levels(source, (low + high) / 2, high - low)
    np.testing.assert_allclose(shown["wide"].astype(int), wide, atol=1)
    np.testing.assert_allclose(shown["full"].astype(int), full, atol=1)
    assert (shown["display"] != shown["wide"]).any()


def test_the_overlay_is_the_stored_heat_map_and_fades(desk: Desk, node: Node) -> None:
    result_id, finding = node.result("positive")
    page = open_study(desk, node.site, "positive")
    cam = page.locator("[data-cam]")
    start = key_start(finding)
    shown_slice(page, start)

    seen = pixels(page, "[data-cam]", ALPHA)
    number = [key.image for key in finding.key_images].index(start)
    with np.load(result_folder(node.site.data_dir, "north", result_id) / "maps.npz") as maps:
        cam_there = maps[f"cam_{number}"]
    # Nothing is painted on the air round the head, as on the overlay in the PACS.
    inside = paint.inside(cam_there, source_of(node, "positive", finding, start), "CT")
    _, weight = paint.colours(inside, finding.map_scale)
    assert seen.shape == (finding.images[start].rows, finding.images[start].columns)
    np.testing.assert_allclose(seen / 255, weight, atol=0.01)
    assert weight.max() > 0

    opacity = float(cam.evaluate("image => image.style.opacity"))
    assert opacity == pytest.approx(paint.opacity(finding.primary), abs=0.051)  # the slider's step
    page.locator("[data-opacity]").fill("0.9")
    assert float(cam.evaluate("image => image.style.opacity")) == 0.9
    page.locator("[data-opacity]").fill("0")
    expect(cam).to_be_hidden()
    page.locator("[data-opacity]").fill("0.4")
    expect(cam).to_be_visible()
    other = next(key.image for key in finding.key_images if key.image != start)
    page.click(f"[data-jump='{other}']")
    shown_slice(page, other)
    assert (pixels(page, "[data-cam]", ALPHA) != seen).any()


def test_the_timeline_tells_what_happened_in_its_order(desk: Desk, node: Node) -> None:
    page = open_study(desk, node.site, "positive")
    with Session(node.site.engine) as session:
        kinds = session.scalars(
            select(EventRow.kind)
            .join(StudyRow, StudyRow.id == EventRow.study_id)
            .where(StudyRow.public_id == node.site.studies["positive"])
            .order_by(EventRow.id)
        ).all()

    told = page.locator(".timeline li")
    titles = page.locator(".timeline li b").all_inner_texts()

    assert [one.get_attribute("data-event") for one in told.all()] == list(reversed(kinds))
    assert titles == [happenings.event(kind) for kind in reversed(kinds)]
    in_order = ["study_opened", "series_ready", "findings_stored", "objects_built", "all_accepted"]
    assert [kind for kind in kinds if kind in in_order] == in_order
    text = page.locator(".timeline").inner_text()
    assert "32 images from CT1" in text
    assert "to pacs" in text
    assert "2.25." not in text  # UIDs are for machines


def test_deliveries_name_the_pacs_and_its_state(desk: Desk, node: Node) -> None:
    page = open_study(desk, node.site, "positive")
    row = page.locator("section:has(h2:text-is('Deliveries')) tbody tr")

    expect(row).to_have_count(1)
    expect(row).to_contain_text("pacs")
    expect(row).to_contain_text("delivered")


def test_the_download_is_what_is_stored_and_what_the_pacs_got(desk: Desk, node: Node) -> None:
    result_id, finding = node.result("positive")
    page = open_study(desk, node.site, "positive")

    with page.expect_download() as waiting:
        page.click("text=DICOM (ZIP)")
    archive = zipfile.ZipFile(Path(waiting.value.path()))
    got = {Path(name).stem: archive.read(name) for name in archive.namelist()}

    with Session(node.site.engine) as session:
        rows = session.scalars(select(ObjectRow).where(ObjectRow.result_id == result_id)).all()
    folder = result_folder(node.site.data_dir, "north", result_id)
    stored = {path.stem: path.read_bytes() for path in folder.glob("*.dcm")}
    assert got
    assert all(stored[uid] == data for uid, data in got.items())
    assert {uid: hashlib.sha256(data).hexdigest() for uid, data in got.items()} == {
        row.sop_instance_uid: row.sha256 for row in rows if row.sop_instance_uid in got
    }
    assert {row.role for row in rows} == {r.role for r in rows if r.sop_instance_uid in got}
    in_pacs = {
        str(one.SOPInstanceUID): raw
        for one, raw in zip(node.pacs.received, node.pacs.raw, strict=True)
    }
    assert all(in_pacs[uid] == data_set(data) for uid, data in got.items())
    assert got.keys() == in_pacs.keys() & stored.keys()

    with page.expect_download() as waiting:
        page.click("text=JSON")
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert f'"result_uuid": "{finding.result_uuid}"' in text


def data_set(whole: bytes) -> bytes:
    """A file without preamble and meta group: what travels in a C-STORE."""
    file = io.BytesIO(whole)
    file.seek(140)
    length = int.from_bytes(file.read(4), "little")
    return whole[144 + length :]


def test_what_could_not_be_judged_says_why(desk: Desk, node: Node) -> None:
    page = open_study(desk, node.site, "contrast")

    expect(page.locator(".verdict h2")).to_contain_text("Not analysed")
    expect(page.locator(".verdict .reason")).not_to_be_empty()
    expect(page.locator(".verdict .facts")).to_contain_text("CTA")
    expect(page.locator(".labels")).to_have_count(0)
    assert "%" not in page.locator("#live").inner_text()
    index = int(page.locator("[data-track]").input_value())
    assert shown_slice(page, index).max() > 0  # its pictures can be looked at


def test_an_incomplete_study_never_looks_like_a_negative(desk: Desk, node: Node) -> None:
    _, finding = node.result("partial")
    page = open_study(desk, node.site, "partial")

    expect(page.locator(".verdict h2")).to_contain_text("INCOMPLETE")
    expect(page.locator(".verdict")).to_contain_text(f"PARTIAL - {len(finding.images)} slices")
    expect(page.locator(".verdict")).to_contain_text(re.compile("missing", re.IGNORECASE))


def test_h47_a_reader_has_no_button_to_run_it_again(chromium: Browser, node: Node) -> None:
    page = open_study(sign_in(chromium, node.site, "rita"), node.site, "negative")

    expect(page.locator("text=DICOM (ZIP)")).to_be_visible()
    expect(page.locator("button", has_text="Run again")).to_have_count(0)
    page.context.close()


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_no_real_page_is_wider_than_the_screen(
    chromium: Browser, node: Node, viewport: dict[str, int]
) -> None:
    desk = sign_in(chromium, node.site, "mia", viewport=viewport)

    for path in ("/", "/worklist", *(f"/study/{key}" for key in node.site.studies.values())):
        desk.page.goto(node.site.base + path)
        width = desk.page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"], path
    desk.page.context.close()


def test_a_manager_runs_a_study_again_and_watches_the_second_result(desk: Desk, node: Node) -> None:
    """Last: it makes a second result."""
    first_id, first = node.result("negative")
    page = open_study(desk, node.site, "negative")
    page.on("dialog", lambda dialog: dialog.accept())

    page.click("text=Run again")
    expect(page.locator(".notice.good")).to_contain_text("Asked for")
    expect(page.locator("button", has_text="Run again")).to_be_disabled()
    node.stages.readiness.carry_out_requests()
    node.run()

    expect(page.locator(".facts")).to_contain_text("revision 2")
    second_id, second = node.result("negative")
    assert second_id != first_id
    assert second.primary.raw == first.primary.raw
    expect(page.locator(".timeline")).to_contain_text("Run again by an operator")
    rows = page.locator("section:has(h2:text-is('Deliveries')) tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first.locator("td").nth(1)).to_have_text("2")
    expect(rows.first).to_contain_text("delivered")
