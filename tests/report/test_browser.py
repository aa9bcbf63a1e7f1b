"""The report in a real browser without a network: it draws, filters, sorts, fits and prints."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from helpers.report_world import write_atlas, write_atlas_run, write_attacks, write_reproduction, write_run, write_sweep
from srmu.report.build import write_report
from srmu.testbed.ground import EAST, NORTH, SOUTH, WEST

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: .ci/chromium installs it")

FIRST = "() => document.querySelector('main table').tBodies[1].rows[0].cells[0].textContent.trim()"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A comparison, a sweep, a reproduction and a map as pages."""
    root = tmp_path_factory.mktemp("pages")
    for label, percents in {"RMU": (44, 80, 90), "SRMU": (34, 90, 95)}.items():
        for seed in range(2):
            folder = write_run(root / "runs" / f"{label}-{seed}", label, "", seed, percents, 20)
            write_attacks(folder, 0.9 if label == "RMU" else 0.7, seed)
    made = {
        "runs": root / "runs",
        "sweep": write_sweep(root / "sweep", runs=True),
        "again": write_reproduction(root / "again"),
        "map": write_atlas_run(root / "atlas-run", write_atlas(root / "atlas")),
    }
    return {name: write_report([folder], root / f"{name}.html") for name, folder in made.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Open a page in a window of its own; nothing may go wrong in it or ask for more."""
    opened, wrong = [], []

    def go(name: str, **options: Any) -> Any:
        window = browser.new_context(offline=True, **options)
        opened.append(window)
        page = window.new_page()
        page.on("console", lambda told: wrong.append(told.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:"))
                or wrong.append(asked.url))  # fmt: skip
        page.goto(pages[name].as_uri())
        return page

    yield go
    for window in opened:
        window.close()
    assert wrong == []


def shown(page: Any, selector: str) -> int:
    return page.locator(f"{selector}:visible").count()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runs", "sweep", "again", "map"])
def test_every_figure_draws(visit: Any, pages: dict[str, Path], name: str) -> None:
    assert pages[name].stat().st_size < 6_000_000
    page = visit(name)
    figures = page.locator(".plot")
    assert figures.count() > 0
    for i in range(figures.count()):
        figure = figures.nth(i)
        assert figure.locator("svg.main-svg").count() > 0
        assert figure.locator(".points path, path.js-line").count() > 0
        assert len(figure.get_attribute("aria-label")) > 30


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_dot_of_the_map_is_where_it_should_be(visit: Any, width: int) -> None:
    plot = visit("map", viewport={"width": width, "height": 900}).locator(".map").last
    ground, dot = plot.locator("image").bounding_box(), plot.locator(".points path").first.bounding_box()
    assert ground["width"] / ground["height"] == pytest.approx((EAST - WEST) / (NORTH - SOUTH), rel=0.01)
    assert ground["width"] > 0.7 * width
    x, y = dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2
    assert x == pytest.approx(ground["x"] + (34.75 - WEST) / (EAST - WEST) * ground["width"], abs=2)  # Kisumu
    assert y == pytest.approx(ground["y"] + (NORTH + 0.1) / (NORTH - SOUTH) * ground["height"], abs=2)


@pytest.mark.slow
def test_a_figure_is_saved_as_an_svg_with_its_legend(visit: Any, tmp_path: Path) -> None:
    figure = visit("again").locator(".plot").first
    figure.hover()
    with figure.page.expect_download() as saved:
        figure.locator(".modebar-btn").click()
    saved.value.save_as(tmp_path / "figure.svg")
    drawn = ElementTree.parse(tmp_path / "figure.svg").getroot()
    texts = {element.text for element in drawn.iter() if element.tag.endswith("text")}
    assert {"RMU", "SRMU (ratio)", "accuracy forgotten", "accuracy kept"} <= texts
    assert sum(element.get("class", "").startswith("point ") for element in drawn.iter()) == 33


@pytest.mark.slow
def test_a_click_hides_a_method_everywhere_and_another_shows_it(visit: Any) -> None:
    page = visit("runs")
    marks = page.locator(".plot").first.locator(".points path")
    rows = page.locator("main table").first.locator("tbody tr:visible")
    assert (marks.count(), rows.count()) == (3, 3)  # the original, and two methods
    button = page.get_by_role("button", name="srmu", exact=True)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert (marks.count(), rows.count()) == (2, 2)
    assert shown(page, "tr[data-labels*='\"srmu\"']") == 0
    assert shown(page, ".pair[data-labels*='\"srmu\"']") == 0  # its importance map
    assert shown(page, "tr[data-labels*='\"rmu\"']") > 0
    button.press("Enter")
    assert (marks.count(), rows.count()) == (3, 3)
    page.get_by_role("button", name="None").click()
    assert (marks.count(), rows.count()) == (1, 1)
    page.get_by_role("button", name="All").click()
    assert (marks.count(), rows.count()) == (3, 3)


@pytest.mark.slow
def test_a_trial_behind_the_front_can_be_hidden(visit: Any) -> None:
    page = visit("sweep")
    marks = page.locator(".plot").first.locator(".points path")
    before = marks.count()
    page.get_by_role("button", name="behind the front").click()
    assert 0 < marks.count() < before


@pytest.mark.slow
def test_a_click_on_a_head_sorts(visit: Any) -> None:
    page = visit("runs")
    head = page.locator("main table").first.locator("th", has_text="hazard")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert page.evaluate(FIRST) == "rmu"
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.evaluate(FIRST) == "srmu"
    importance = page.locator(".tall table").first
    importance.get_by_role("button", name="Dimension").click()
    assert importance.locator("tbody th").first.inner_text() == "191"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runs", "sweep", "again", "map"])
def test_a_narrow_screen_does_not_overflow(visit: Any, name: str) -> None:
    page = visit(name, viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_without_scripts_every_table_is_there(visit: Any) -> None:
    page = visit("runs", java_script_enabled=False)
    tables = page.locator("main table")
    assert tables.count() > 8
    for details in page.locator("details").all():
        details.locator("summary").click()
    assert shown(page, "main table") == tables.count()
    assert "33.5" in tables.first.inner_text()
    assert shown(page, ".plot") == 0
    assert shown(page, "#filter") == 0
    assert page.locator("noscript .note").is_visible()


@pytest.mark.slow
def test_dark_is_dark_and_paper_is_white(visit: Any) -> None:
    def ground(page: Any) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = visit("runs"), visit("runs", color_scheme="dark")
    assert ground(light) == "rgb(255, 255, 255)"
    assert ground(dark) == "rgb(20, 23, 27)"
    dark.emulate_media(media="print")
    assert ground(dark) == "rgb(255, 255, 255)"
    assert shown(dark, "#filter") == 0


@pytest.mark.slow
def test_on_paper_what_belongs_together_stays_together(visit: Any) -> None:
    """What is folded is open; no head, note or line of a folded table stands at the foot of a page alone."""
    page = visit("runs", viewport={"width": 690, "height": 1000})  # an A4 page between its margins
    page.emulate_media(media="print")
    style = "(element, name) => getComputedStyle(element)[name]"
    for selector in ("h2", "section p", "thead", "details summary"):
        assert page.locator(selector).first.evaluate(style, "breakAfter") == "avoid", selector
    for selector in ("tr", "p", ".scroll:has(.numbers):not(.tall)"):
        assert page.locator(selector).first.evaluate(style, "breakInside") == "avoid", selector
    assert page.locator("details table").first.bounding_box()["height"] > 50
    for table in page.locator("main table").all():
        box = table.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 690


@pytest.mark.slow
def test_the_keyboard_reaches_the_content_first(visit: Any) -> None:
    page = visit("runs")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
