"""Messages with sequence numbers: following them gives the state, from wherever one begins."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from megaforge.dashboard import feed as feed_module
from megaforge.dashboard.feed import Feed
from megaforge.dashboard.series import View
from megaforge.errors import UserError
from megaforge.monitor import runs_folder
from megaforge.monitor.runs_folder import Runs
from tests.dashboard.serving import a_run, stepped, told


@pytest.fixture(autouse=True)
def _scans_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_folder, "_RESCAN_SECONDS", 0.0)


def feed_of(directory: Path) -> Feed:
    found = Feed(Runs(directory), lambda: None, control=False, seconds=1.0)
    found.poll()
    return found


class Page:
    """Takes messages as the page's feed.ts does."""

    def __init__(self) -> None:
        self.sequence, self.epoch = 0, ""
        self.rows: dict[str, Any] = {}

    def ask(self, feed: Feed) -> dict[str, Any]:
        _, text = feed.message(self.sequence, self.epoch)
        message = json.loads(text)
        if message["full"]:
            self.rows = {}
        else:
            assert message["since"] <= self.sequence
        for name in message["removed"]:
            self.rows.pop(name, None)
        self.rows |= {row["name"]: row for row in message["runs"]}
        self.sequence, self.epoch = message["sequence"], message["epoch"]
        return message


def test_pages_that_ask_at_any_time_have_the_same_state(tmp_path: Path) -> None:
    draw, feed = random.Random(3), feed_of(tmp_path)
    pages = [Page() for _ in range(4)]
    for _ in range(40):
        name = f"r{draw.randrange(5)}"
        if (tmp_path / name).exists() and draw.random() < 0.3:
            shutil.rmtree(tmp_path / name)
        elif (tmp_path / name).exists():
            told(tmp_path / name, "progress", draw.randrange(9))
        else:
            a_run(tmp_path / name)
        feed.poll()
        for page in pages:
            if draw.random() < 0.5:
                page.ask(feed)
    for page in pages:
        page.ask(feed)
    new = Page()
    assert new.ask(feed)["full"] and all(page.rows == new.rows for page in pages)
    assert sorted(new.rows) == sorted(path.name for path in tmp_path.iterdir())


def test_only_what_changed_is_told(tmp_path: Path) -> None:
    a_run(tmp_path / "a")
    a_run(tmp_path / "b")
    feed, page = feed_of(tmp_path), Page()
    assert len(page.ask(feed)["runs"]) == 2
    stepped(tmp_path / "b", 5, 6)
    feed.poll()
    message = page.ask(feed)
    assert [(row["name"], row["iteration"], row["points"]) for row in message["runs"]] == [("b", 6, 6)]
    assert not message["full"] and message["overall"]["share"] == (0.5 + 0.75) / 2
    before = page.sequence
    feed.poll()
    assert page.ask(feed)["runs"] == [] and page.sequence == before  # nothing new is no message


def test_a_page_of_an_earlier_server_or_of_long_ago_gets_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_REMEMBERED", 1)
    a_run(tmp_path / "a")
    a_run(tmp_path / "b")
    a_run(tmp_path / "c")
    feed, page = feed_of(tmp_path), Page()
    page.ask(feed)
    for name in "ab":
        shutil.rmtree(tmp_path / name)
        feed.poll()
    assert page.ask(feed)["full"] and list(page.rows) == ["c"]
    again, number = feed_of(tmp_path), page.sequence
    assert json.loads(again.message(number, page.epoch)[1])["full"]
    assert json.loads(feed.message(number + 5, feed.epoch)[1])["full"]  # a number that was never told
    assert json.loads(feed.message(-1, feed.epoch)[1])["full"]


def test_the_row_of_a_run(tmp_path: Path) -> None:
    a_run(tmp_path / "a")
    told(tmp_path / "a", "alert", 3, 5.0, alert="nan", state="firing", severity="critical", text="the loss is nan")
    told(tmp_path / "a", "alert", 3, 6.0, alert="disk", state="firing", severity="warning", text="91 % full")
    told(tmp_path / "a", "alert", 4, 7.0, alert="disk", state="resolved", severity="warning", text="80 % full")
    told(tmp_path / "a", "end", 4, 9.0, reason="SIGTERM", complete=False)
    page = Page()
    message = page.ask(feed_of(tmp_path))
    (row,) = message["runs"]
    assert (row["status"], row["reason"], row["iteration"], row["train_iters"]) == ("stopped", "SIGTERM", 4, 8)
    assert (row["share"], row["seconds_per_step"], row["eta_seconds"], row["alerts"]) == (0.5, 0.5, 2.0, 1)
    assert row["last"] == {"loss": 0.25}
    assert [(alert["alert"], alert["state"], alert["time"]) for alert in message["alerts"]] == [
        ("nan", "firing", 5.0),
        ("disk", "resolved", 7.0),
    ]


def test_curves_are_made_once_and_follow_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_run(tmp_path / "a")
    feed, made = feed_of(tmp_path), list[Any]()
    real = feed_module.series.curves
    monkeypatch.setattr(feed_module.series, "curves", lambda *given: made.append(given) or real(*given))
    for _ in range(50):
        found = feed.curves(["a"], ["loss", "lr"], View())
    assert len(made) == 1 and [curve["y"] for curve in found["curves"]] == [[1, 0.5, pytest.approx(1 / 3), 0.25]]
    assert found["metrics"] == ["iteration", "loss", "tokens", "step_seconds"]
    (folder / "metrics.jsonl").unlink()  # a run that went back writes its steps anew
    stepped(folder, 1, 2, loss=9.0)
    feed.poll()
    (curve,) = feed.curves(["a"], ["loss"], View())["curves"]
    assert (curve["x"], curve["y"]) == ([1, 2], [9, 9])
    shutil.rmtree(folder)  # while it is watched
    feed.poll()
    assert feed.curves(["a"], ["loss"], View()) == {"curves": [], "metrics": [], "missing": ["a"]}
    with pytest.raises(UserError, match="run 'a': there is none of this name below"), feed.run("a"):
        pass


def test_a_poll_that_fails_is_told_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    feed = Feed(Runs(tmp_path), lambda: None, control=False, seconds=0.01)
    feed.start()
    real, polls = feed.poll, list[int]()

    def poll() -> bool:
        polls.append(1)
        if len(polls) == 1:
            raise OSError("the disk hiccups")
        return real()

    monkeypatch.setattr(feed, "poll", poll)
    a_run(tmp_path / "a")
    while not feed.sequence or not json.loads(feed.message()[1])["runs"]:
        pass
    feed.stop()
    assert "the disk hiccups" in caplog.text
