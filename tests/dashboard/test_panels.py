"""What is shown of one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaforge.compliance.measure import Measure, Rule
from megaforge.compliance.report import Report
from megaforge.dashboard import panels
from megaforge.dashboard.machine import MachineMeter, parse_gpus
from megaforge.monitor.audit import AuditTrail
from megaforge.monitor.runs import Run
from megaforge.monitor.samples import WrittenText, append_sample
from tests.dashboard.serving import a_run, told


def polled(folder: Path) -> Run:
    run = Run("r", folder)
    run.poll()
    return run


def test_checkpoints_are_those_that_are_there(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r")
    for iteration, fields in (
        (2, {"path": "step_2", "sums": "ab"}),
        (4, {"path": "step_4", "sums": None}),
        (5, {"path": "step_5", "error": "OSError: full"}),
        (6, {"path": "../secret"}),
        (7, {"path": None}),
        (8, {"path": 7}),
        (9, {"path": "step_9"}),  # retained no longer
    ):
        told(folder, "save", iteration, float(iteration), **fields)
    for name in ("step_2", "step_4", "step_5", "../secret"):
        (folder / name / "inner").mkdir(parents=True)
        (folder / name / "inner" / "x").write_bytes(b"123")
    found = panels.checkpoints(polled(folder))
    assert found == [
        {"name": "step_4", "iteration": 4, "time": 4.0, "sums": None, "bytes": 3},
        {"name": "step_2", "iteration": 2, "time": 2.0, "sums": "ab", "bytes": 3},
    ]


def test_a_report_of_compliance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "compliance.json"
    assert panels.compliance(tmp_path) is None
    measure = Measure("functions", 4, 3)
    report = Report(
        rules=((Rule(1, "Flow", "no goto", lambda _: measure), measure),),
        gates=(),
        waivers=(),
        made="2026-11-27",
    )
    report.write(tmp_path, "enhanced", 0.95)
    found = panels.compliance(tmp_path) or {}
    assert (found["score"], found["asked"], found["passed"], found["made"]) == (0.75, "enhanced", False, "2026-11-27")
    assert found["parts"] == [{"title": "rule 1: Flow", "share": 0.75}] and found["lacking"]
    for content, word in (
        ("[1]", "is not a report"),
        ("{}", "is not a report (KeyError"),
        ('{"made": "x", "score": null}', "is not a report (TypeError"),
        ("{", "is not JSON"),
    ):
        path.write_text(content)
        assert word in (panels.compliance(tmp_path) or {})["problem"]
    monkeypatch.setattr(panels, "_LARGEST", 10)
    path.write_text("{" + " " * 10 + "}")
    assert panels.compliance(tmp_path) == {"problem": "compliance.json is larger than 10 bytes"}


def test_the_audit_trail_is_verified(tmp_path: Path) -> None:
    assert panels.audit(tmp_path)["state"] == "absent"
    trail = AuditTrail(tmp_path / "audit.jsonl")
    trail.append("save", path="step_1")
    trail.append("end")
    assert panels.audit(tmp_path) == {"state": "holds", "message": "3 records hold, none of them signed"}
    content = (tmp_path / "audit.jsonl").read_bytes()
    (tmp_path / "audit.jsonl").write_bytes(content.replace(b"step_1", b"step_2"))
    found = panels.audit(tmp_path)
    assert found["state"] == "broken" and "line 2 (save)" in found["message"]


def test_the_whole_of_a_run_is_json(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r")
    told(folder, "evaluate", 4, 9.0, loss=float("nan"))
    append_sample(folder, WrittenText(4, "Once", " upon"))
    found = panels.detail(polled(folder))
    assert found["start"] == {"run": "r", "host": "elsewhere", "pid": 1}
    assert found["samples"] == [{"iteration": 4, "prompt": "Once", "text": " upon"}]
    assert [event["kind"] for event in found["events"]] == ["evaluate", "start"]
    assert json.loads(panels.as_json(found))["events"][0]["loss"] is None


def test_the_machine_is_measured(tmp_path: Path) -> None:
    meter = MachineMeter(tmp_path)
    found = meter()
    assert 0 <= found["cpu_share"] <= 1 and found["cpus"] >= 1
    assert 0 < found["memory_bytes"] <= found["memory_total_bytes"]
    assert 0 < found["disk_bytes"] <= found["disk_total_bytes"]
    assert json.loads(panels.as_json(found)) == found
    gone = MachineMeter(tmp_path / "gone")()
    assert gone["disk_bytes"] is None


def test_the_words_of_nvidia_smi() -> None:
    text = "NVIDIA H100 80GB HBM3, 87, 1024, 81559\nA, odd name, [N/A], 5, 10\n\nbroken"
    first, second = parse_gpus(text)
    assert first == {
        "name": "NVIDIA H100 80GB HBM3",
        "used_share": 0.87,
        "memory_bytes": 2**30,
        "memory_total_bytes": 81559 * 2**20,
    }
    assert (second["name"], second["used_share"]) == ("A, odd name", None)
