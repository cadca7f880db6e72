"""The dashboard with many runs and a long one: what the server takes to answer, and how long a browser's frames are.

    bash run_scripts/bench.sh dashboard [--runs 1000] [--steps 1000000]

One run has --steps steps, the others a few; 50 of them change every second. A frame is the time between two calls of
requestAnimationFrame in headless Chromium (run_scripts/browser.sh installs it; without it only the server is measured).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest

from tests.dashboard.browser import Watched, browser_page
from tests.dashboard.serving import TOKEN, Served, served, stepped, told, until

LONG = "a-long-run"
CHANGING = 50
FRAMES = """() => { window.frames_ms = []; let last = performance.now();
const step = (now) => { window.frames_ms.push(now - last); last = now; requestAnimationFrame(step); };
requestAnimationFrame(step); }"""


def write_runs(directory: Path, runs: int, steps: int) -> None:
    """Files as runs write them."""
    start = {"train_iters": 2 * steps, "host": "elsewhere", "pid": 1, "born": 1.0}
    for number in range(runs - 1):
        folder = directory / f"run-{number:04d}"
        told(folder, "start", time=time.time(), run="small", **{**start, "train_iters": 100})
        stepped(folder, 1, 20, tokens_per_second=1e4, grad_norm=1.0, lr=1e-3)
    folder, draw = directory / LONG, random.Random(0)
    told(folder, "start", time=time.time(), run="long", **start)
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(1, steps + 1):
            loss = 2 + 6 / math.sqrt(i) + draw.random() / 5
            numbers = f'"loss": {loss:.6f}, "lr": 0.001, "grad_norm": {draw.random():.5f}, "tokens": {i * 512}'
            file.write(
                f'{{"kind": "step", "iteration": {i}, {numbers}, "step_seconds": 0.1, "tokens_per_second": 5e3}}\n'
            )


def keep_changing(directory: Path, ended: threading.Event, runs: int) -> None:
    """Some runs make a step every second."""
    step = 20
    while not ended.wait(1.0):
        step += 1
        for number in range(min(CHANGING, runs - 1)):
            stepped(directory / f"run-{number:04d}", step, step)


def milliseconds(call: Callable[[], Any], repeat: int = 7) -> float:
    """The median of some calls."""
    found = []
    for _ in range(repeat):
        begun = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(found), 1)


def server_times(board: Served) -> dict[str, float]:
    """Milliseconds of each answer; no curve is asked for twice, as those are kept."""
    numbers = iter(range(10_000))
    curve = f"/api/series?run={LONG}&metric=loss&points="
    state = board.json("/api/state")
    return {
        "all rows": milliseconds(lambda: board.get("/api/state")),
        "rows of the last second": milliseconds(
            lambda: board.get(f"/api/state?since={state['sequence']}&epoch={state['epoch']}")
        ),
        "a curve of the long run": milliseconds(lambda: board.get(f"{curve}{800 - next(numbers)}")),
        "and its mean": milliseconds(lambda: board.get(f"{curve}{800 - next(numbers)}&smooth=0.9")),
        "a curve that is kept": milliseconds(lambda: board.get(f"{curve}801")),
    }


def frames(watched: Watched, act: Callable[[Any], None]) -> dict[str, float]:
    """The frames while ``act`` uses the page: median, 95 % and longest, ms."""
    page = watched.page
    page.evaluate("window.frames_ms.length = 0")
    act(page)
    found = sorted(page.evaluate("window.frames_ms"))
    pick = {"median": found[len(found) // 2], "p95": found[int(0.95 * len(found))], "longest": found[-1]}
    return {name: round(value, 1) for name, value in pick.items()} | {"frames": len(found)}


def _scroll(page: Any) -> None:
    for _ in range(30):
        page.locator(".scroll").evaluate("element => element.scrollBy(0, 900)")
        page.wait_for_timeout(100)


def _filter(page: Any) -> None:
    field = page.get_by_role("searchbox")
    for word in ("run-0", "run-09", "run-099", "", LONG, ""):
        field.fill(word)
        page.wait_for_timeout(400)


def _smooth(page: Any) -> None:
    for value in ("0.5", "0.9", "0.99", "0.95"):
        page.locator("input[type=range]:not([name=workers])").fill(value)
        page.wait_for_timeout(1000)


def _draw_ten(page: Any) -> None:
    """Ten runs in all charts of all groups, and one theme after the other, which draws all of them anew."""
    for number in range(9):
        page.get_by_role("checkbox", name=f"draw run-{number:04d}").check()
    for group in page.locator("details:not([open]) summary").all():
        group.click()
        page.wait_for_timeout(300)
    for theme in ("Dark", "Light"):
        page.get_by_role("button", name=theme).click()
        page.wait_for_timeout(700)


def browser_frames(board: Served) -> dict[str, dict[str, float]]:
    """Of each way to use the page."""
    with browser_page() as watched:
        page = watched.page
        page.goto(f"http://127.0.0.1:{board.port}/?token={TOKEN}")
        page.locator("tr[data-run]").first.wait_for()
        page.evaluate(FRAMES)
        page.goto(f"http://127.0.0.1:{board.port}/#run={LONG}")
        page.reload()
        page.locator('figure[data-metric="loss"] canvas').wait_for()
        page.evaluate(FRAMES)
        found = {
            "watching": frames(watched, lambda page: page.wait_for_timeout(5000)),
            "scrolling the list": frames(watched, _scroll),
            "filtering the list": frames(watched, _filter),
            "smoothing the long curve": frames(watched, _smooth),
            "drawing ten runs": frames(watched, _draw_ten),
        }
        assert watched.problems == [], watched.problems
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1_000_000)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory, ended = Path(name) / "runs", threading.Event()
        write_runs(directory, flags.runs, flags.steps)
        begun = time.perf_counter()
        with served(directory, seconds=1.0) as board:
            found: dict[str, Any] = {"runs": flags.runs, "steps of the long run": flags.steps, "load": os.getloadavg()}
            until(lambda: f'"iteration":{flags.steps},' in board.feed.message()[1], seconds=600.0, pause=0.2)
            found["seconds to read all"] = round(time.perf_counter() - begun, 1)
            changing = threading.Thread(target=keep_changing, args=(directory, ended, flags.runs))
            changing.start()
            try:
                found["poll_ms"] = milliseconds(board.feed.poll)
                found["answer_ms"] = server_times(board)
                try:
                    found["frame_ms"] = browser_frames(board)
                except pytest.skip.Exception as reason:
                    print(f"no frames: {reason}")
            finally:
                ended.set()
                changing.join()
    for title, values in found.items():
        print(f"{title}: {values}" if not isinstance(values, dict) else f"{title}:")
        if isinstance(values, dict):
            for what, value in values.items():
                print(f"  {what:<26} {value}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
