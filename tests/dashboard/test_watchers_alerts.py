"""Alerts that a watcher keeps beside runs are shown with those that runs tell themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megaforge.dashboard import watchers_alerts
from megaforge.dashboard.feed import Feed
from megaforge.monitor import runs_folder
from megaforge.monitor.events import EventLog
from megaforge.monitor.runs_folder import Runs
from tests.dashboard.serving import a_run, told


@pytest.fixture(autouse=True)
def _looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers_alerts, "_SECONDS", 0.0)
    monkeypatch.setattr(runs_folder, "_RESCAN_SECONDS", 0.0)


def state(feed: Feed) -> dict[str, Any]:
    feed.poll()
    return dict(json.loads(feed.message()[1]))


def test_a_watchers_word_counts_as_the_runs_own(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "a")
    told(folder, "alert", 3, 5.0, alert="nan", state="firing", severity="critical", text="the loss is nan")
    feed = Feed(Runs(tmp_path), lambda: None, control=False, seconds=1.0)
    assert [alert["alert"] for alert in state(feed)["alerts"]] == ["nan"]
    watcher = EventLog(folder / "alerts.jsonl")
    watcher.tell("alert", alert="failure", state="firing", severity="critical", text="its process has gone")
    now = state(feed)
    assert [(one["alert"], one["text"]) for one in now["alerts"]] == [
        ("failure", "its process has gone"),
        ("nan", "the loss is nan"),
    ]
    assert now["runs"][0]["alerts"] == 2
    watcher.tell("alert", alert="nan", state="resolved", severity="critical", text="the loss is finite")
    now = state(feed)
    assert [(one["alert"], one["state"]) for one in now["alerts"]] == [("failure", "firing"), ("nan", "resolved")]
    assert now["runs"][0]["alerts"] == 1
    (folder / "alerts.jsonl").write_text("not JSON\n{}\n")  # written anew, with damage
    assert [one["alert"] for one in state(feed)["alerts"]] == ["nan"]
    shutil.rmtree(folder)
    assert state(feed)["alerts"] == []


def test_the_folders_disk_is_told_of_once(tmp_path: Path) -> None:
    a_run(tmp_path / "a")
    feed = Feed(Runs(tmp_path), lambda: None, control=False, seconds=1.0)
    assert state(feed)["alerts"] == []
    EventLog(tmp_path / "runs_alerts.jsonl").tell(
        "alert", alert="disk", state="firing", severity="warning", text="91 %"
    )
    (alert,) = state(feed)["alerts"]
    assert (alert["run"], alert["alert"], alert["text"]) == ("(runs folder)", "disk", "91 %")
