"""The page in a real browser, on a run that trains meanwhile."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.browser import Watched, browser_page, browser_path
from tests.dashboard.serving import TOKEN, a_run, served
from tests.dashboard.serving import until as until_soon
from tests.end_to_end.launch import LIMIT, command, environment

STEPS = 150


def until(condition: Callable[[], Any]) -> Any:
    """Asks the browser ten times a second: more would keep it from its work."""
    return until_soon(condition, seconds=120.0, pause=0.1)


@contextmanager
def training(directory: Path, steps: int = STEPS) -> Iterator[subprocess.Popen[bytes]]:
    """A real run of a small model that saves below ``directory``."""
    flags = ("--config", "cdrmix-test", "--mock-data", "--vocab-size", "64", "--seq-length", "32", "--device", "cpu")
    line = command(1, "pretrain_cdrmix.py", *flags, "--train-iters", str(steps), "--save-interval", "50")
    line += ["--save", str(directory), "--metrics-file", str(directory / "metrics.jsonl"), "--audit-trail"]
    line += ["--eval-interval", "50", "--eval-iters", "1", "--log-interval", "10"]
    with (directory.parent / "log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment())
    try:
        yield process
    finally:
        process.kill()
        process.wait()


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


def test_a_real_run_is_watched(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    a_run(runs / "other")
    browser_path()  # before anything trains for nothing
    with served(runs, seconds=0.2) as board, browser_page() as watched, training(runs / "live") as process:
        page, address = watched.page, f"http://127.0.0.1:{board.port}"
        page.goto(f"{address}/?token={TOKEN}")
        assert page.url == f"{address}/" and page.title() == "MegaForge runs"
        page.locator('tr[data-run="live"]').wait_for()
        _live_points_arrive(page)
        _polling_takes_over(watched)
        _keyboard_themes_and_narrow_screens(page)
        _the_run_ends(page, process, runs)
        shutil.rmtree(runs / "live")
        page.get_by_text("live: this run's files are gone").wait_for()
        assert page.locator('tr[data-run="other"]').count() == 1 and page.locator('tr[data-run="live"]').count() == 0
        assert watched.problems == [] and watched.gaps() == []


def _live_points_arrive(page: Any) -> None:
    assert transport(page) == "socket"
    page.get_by_role("checkbox", name="draw live").check()
    until(lambda: iteration_of(page, "live") > 0)
    first, label = iteration_of(page, "live"), until(lambda: drawn(page, "loss"))
    until(lambda: iteration_of(page, "live") > first)
    until(lambda: drawn(page, "loss") != label)  # the curve has grown
    assert "run=live" in page.url  # the view can be sent to others


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


def _the_run_ends(page: Any, process: subprocess.Popen[bytes], runs: Path) -> None:
    assert process.wait(timeout=LIMIT) == 0
    page.locator('tr[data-run="live"] .status.completed').wait_for()
    assert iteration_of(page, "live") == STEPS
    page.get_by_role("button", name="live", exact=True).click()
    newest = page.locator('[data-table="checkpoints"] tbody tr').first
    newest.wait_for()
    assert newest.locator("th").inner_text() == (runs / "live" / "latest").read_text().strip()
    page.get_by_role("tab", name="Audit and compliance").click()
    page.get_by_role("button", name="Verify the audit trail").click()
    page.locator('[data-audit="holds"]').wait_for()
    page.get_by_role("tab", name="Events").click()
    page.locator("ol.events li", has_text="goodput").wait_for()


@pytest.mark.parametrize("path", ["/?token=wrong", "/"])
def test_a_wrong_token_is_refused(tmp_path: Path, path: str) -> None:
    browser_path()
    with served(tmp_path) as board, browser_page() as watched:
        answer = watched.page.goto(f"http://127.0.0.1:{board.port}{path}")
        assert answer is not None and answer.status == 401 and watched.page.locator("main").count() == 0
        watched.page.get_by_label("Token").fill(TOKEN)  # the right one, by hand
        watched.page.get_by_role("button", name="Open").press("Enter")
        watched.page.locator('main[data-transport="socket"]').wait_for()
