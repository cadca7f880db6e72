"""The page in a real browser: it starts a fleet, watches what trains, and stops it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaforge.dashboard.app import control_routes
from megaforge.dashboard.control import Control
from megaforge.dashboard.feed import Feed
from tests.dashboard.browser import Watched, browser_page, browser_path
from tests.dashboard.serving import TOKEN, Served, a_run, served
from tests.dashboard.serving import until as until_soon

FLEET = """
flags: {config: cdrmix-test, mock_data: true, vocab_size: 64, seq_length: 32, device: cpu, train_iters: 100000,
    save_interval: 20, log_interval: 10, audit_trail: true}
models: [{name: first, flags: {seed: 1}}, {name: second, flags: {seed: 2}}, {name: third, flags: {seed: 3}}]
"""
FIRST = "three/first"
# How many points of a picture are drawn on.
INKED = """canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
    .filter((value, index) => index % 4 === 3 && value > 0).length"""


def until(condition: Callable[[], Any]) -> Any:
    """Asks the browser ten times a second: more would keep it from its work."""
    return until_soon(condition, pause=0.1)


def iteration_of(page: Any, name: str) -> int:
    """What the list says of a run."""
    row = page.locator(f'tr[data-run="{name}"] td.number').first
    return int(row.inner_text().split("/")[0]) if row.count() else -1


def drawn(page: Any, metric: str) -> str:
    """What a chart says to those who do not see it; "" where there is none."""
    chart = page.locator(f'figure[data-metric="{metric}"] [role=img]')
    return str(chart.get_attribute("aria-label")) if chart.count() else ""


def transport(page: Any) -> str:
    return str(page.locator("main").get_attribute("data-transport"))


def status_of(page: Any, name: str) -> str:
    row = page.locator(f'tr[data-run="{name}"] .status')
    return str(row.inner_text()) if row.count() else ""


def test_a_fleet_is_started_watched_and_stopped(tmp_path: Path) -> None:
    runs, recipe = tmp_path / "runs", tmp_path / "three.yaml"
    a_run(runs / "other")
    recipe.write_text(FLEET)
    controls = list[Control]()

    def routes(feed: Feed) -> Any:
        controls.append(Control([recipe], runs, feed))
        return control_routes(controls[0])

    browser_path()  # before anything trains for nothing
    with served(runs, seconds=0.2, control=True, more=routes) as board, browser_page() as watched:
        page, address = watched.page, f"http://127.0.0.1:{board.port}"
        page.goto(f"{address}/?token={TOKEN}")
        assert page.url == f"{address}/" and page.title() == "MegaForge runs"
        try:
            _the_form_starts_a_fleet(page)
            _live_points_arrive(page)
            _polling_takes_over(watched)
            _keyboard_themes_and_narrow_screens(page)
            page.locator('[data-history="three"] polyline').wait_for(state="attached")
            _one_model_is_stopped(page, runs)
            page.get_by_role("button", name="Stop", exact=True).click()
            until(lambda: "not running" in page.locator('[data-overall="fleet three"]').inner_text())
        finally:
            _end_the_fleet(board, controls[0], runs / "three" / "fleet.jsonl")
        assert {status_of(page, f"three/{name}") for name in ("first", "second", "third")} <= {"stopped", "waiting", ""}
        shutil.rmtree(runs / FIRST)
        page.get_by_text(f"{FIRST}: this run's files are gone").wait_for()
        assert page.locator('tr[data-run="other"]').count() == 1
        assert watched.problems == [] and watched.gaps() == []


def _end_the_fleet(board: Served, control: Control, told: Path) -> None:
    """Also where the test failed before the server had heard that it runs: it looks for folders every two seconds."""
    until_soon(lambda: not told.exists() or "three" in board.feed.fleets())
    if board.feed.fleets().get("three", {}).get("alive"):
        control.stop("three")
        until_soon(lambda: not board.feed.fleets()["three"]["alive"])


def _the_form_starts_a_fleet(page: Any) -> None:
    page.get_by_role("radio", name="parallel").check()
    slider, verdict = page.get_by_role("slider", name="Workers"), page.locator("[data-verdict]")
    for workers, words in ((6, "6 workers need"), (1, "")):
        slider.fill(str(workers))
        until(lambda words=words: words in verdict.inner_text())
    slider.fill("6")  # more than a machine of two CPUs has room for: it says so, and runs as many as fit
    until(lambda: verdict.get_attribute("data-verdict") == "warning" and "will run at once" in verdict.inner_text())
    page.get_by_role("button", name="Start").click()
    page.get_by_text("three has started").wait_for()
    until(lambda: page.get_by_role("button", name="Start").is_disabled())  # once the page has heard that it runs
    until(lambda: status_of(page, FIRST) == "running")


def _live_points_arrive(page: Any) -> None:
    assert transport(page) == "socket"
    page.get_by_role("checkbox", name=f"draw {FIRST}").check()
    until(lambda: iteration_of(page, FIRST) > 0)
    first, label = iteration_of(page, FIRST), until(lambda: drawn(page, "loss"))
    until(lambda: iteration_of(page, FIRST) > first)
    until(lambda: drawn(page, "loss") != label)  # the curve has grown
    assert "run=three%2Ffirst" in page.url  # the view can be sent to others
    _a_part_is_looked_at(page)


def _a_part_is_looked_at(page: Any) -> None:
    """Dragging over a chart shows a part of the steps in all of them; a double click shows all again."""
    plot, whole = page.locator('figure[data-metric="loss"] .u-over'), page.get_by_role("button", name="Whole range")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert page.locator('figure[data-metric="loss"] canvas').evaluate(INKED) > 100 and whole.count() == 0
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60, steps=4)
    page.mouse.up()
    whole.wait_for()
    plot.dblclick()
    whole.wait_for(state="detached")


def _polling_takes_over(watched: Watched) -> None:
    page = watched.page
    watched.cut_sockets()
    until(lambda: transport(page) == "polling")
    page.get_by_text("live, by polling").wait_for()
    before, told = int(page.locator("main").get_attribute("data-sequence")), len(watched.messages)
    until(lambda: int(page.locator("main").get_attribute("data-sequence")) > before + 1)
    until(lambda: transport(page) == "polling" and {way for way, _ in watched.messages[told:]} == {"polling"})
    watched.cut = False
    until(lambda: transport(page) == "socket")
    told = len(watched.messages)
    until(lambda: transport(page) and [way for way, _ in watched.messages[told:]].count("socket") > 1)


def _keyboard_themes_and_narrow_screens(page: Any) -> None:
    box = page.get_by_role("checkbox", name="draw other")
    box.focus()
    page.keyboard.press("Space")
    assert box.is_checked() and page.url.count("run=") == 2
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator('[data-detail="other"]').wait_for()
    page.get_by_role("button", name="Close").press("Enter")
    for theme in ("Dark", "Light"):
        page.get_by_role("button", name=theme).click()
        assert page.locator("html").get_attribute("data-theme") == theme.lower()
    page.set_viewport_size({"width": 360, "height": 700})
    until(lambda: page.evaluate("document.documentElement.scrollWidth") <= 360)
    page.set_viewport_size({"width": 1280, "height": 900})


def _one_model_is_stopped(page: Any, runs: Path) -> None:
    page.locator(f'button[title="{FIRST}"]').click()
    page.get_by_role("button", name="Stop this model").click()
    until(lambda: status_of(page, FIRST) == "stopped")
    newest = page.locator('[data-table="checkpoints"] tbody tr').first
    until(lambda: newest.count() and newest.locator("th").inner_text() == (runs / FIRST / "latest").read_text().strip())
    until(lambda: status_of(page, "three/second") == "running")  # the others go on
    page.get_by_role("tab", name="Audit and compliance").click()
    page.get_by_role("button", name="Verify the audit trail").click()
    page.locator('[data-audit="holds"]').wait_for()
    page.get_by_role("tab", name="Events").click()
    page.locator("ol.events li", has_text="goodput").first.wait_for()


@pytest.mark.parametrize("path", ["/?token=wrong", "/"])
def test_a_wrong_token_is_refused(tmp_path: Path, path: str) -> None:
    browser_path()
    with served(tmp_path) as board, browser_page() as watched:
        answer = watched.page.goto(f"http://127.0.0.1:{board.port}{path}")
        assert answer is not None and answer.status == 401 and watched.page.locator("main").count() == 0
        watched.page.get_by_label("Token").fill(TOKEN)  # the right one, by hand
        watched.page.get_by_role("button", name="Open").press("Enter")
        watched.page.locator('main[data-transport="socket"]').wait_for()
