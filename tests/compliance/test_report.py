"""The score by hand, the levels at their bounds, and the report on runs that keep a control or break it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaforge.compliance.code import read_code
from megaforge.compliance.controls import Evidence, asked
from megaforge.compliance.measure import Finding, Part, level, reaches, score
from megaforge.compliance.report import (
    HTML_FILE,
    JSON_FILE,
    Report,
    calculate_compliance_score,
    failed,
    measure_code,
    measure_run,
)
from megaforge.config.phase5_config import ComplianceSection, TrainingConfig
from megaforge.errors import UserError
from megaforge.training import run_events
from tests.training.tiny import arguments, make_config, make_trainer, write_dataset
from tools import compliance_report

NAMES = ("audit", "encryption", "validation", "reproducibility", "digests")
SOURCE = '''"""A module."""

LEAST = 3


def at_least(value: int) -> int:
    """``value``, or the least one."""
    return max(value, LEAST)
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of code that has nothing wrong; its tools do not run here."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "a.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megaforge.compliance.tools.importlib.util.find_spec", lambda name: None)
        return measure_code(read_code(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that the controls look at."""
    folder = tmp_path_factory.mktemp("compliant")
    prefix, metrics = write_dataset(folder / "data"), str(folder / "metrics.jsonl")
    flags = ["--save", str(folder / "run"), "--save-interval", "3", "--eval-iters", "1", "--eval-interval", "3"]
    clean = {"version": "1", "commit": "c" * 40, "dirty": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAFORGE_KEY", "05" * 32)
        patch.setattr(run_events, "code_version", lambda: clean)  # these tests may run in a tree with changes
        recorded = ["--audit-trail", "--encrypt-checkpoints", "--metrics-file", metrics]
        make_trainer(arguments(prefix, *flags, *recorded)).train()
    records = [json.loads(line) | {"peak_memory_bytes": 1e9} for line in Path(metrics).read_text().splitlines()]
    Path(metrics).write_text("".join(json.dumps(record) + "\n" for record in records if record["kind"] == "step"))
    return folder / "run"


def test_the_score_is_the_weighted_mean_of_what_was_measured() -> None:
    parts = [Part("rule 1", 1.0), Part("rule 5", 0.25, 2), Part("rule 10", 0.5, 2), Part("audit", 1.0)]
    assert score(parts) == (1 + 0.5 + 1 + 1) / 6 and score([]) == 0
    for bad in (Part("a", 1.1), Part("a", -0.1), Part("a", 0.5, 0)):
        with pytest.raises(ValueError, match="a: a share of"):
            score([bad])


@pytest.mark.parametrize(
    ("shares", "gates", "reached"),
    [
        ((0.95, 0.95), True, "enhanced"),
        ((1.0, 0.90), True, "enhanced"),
        ((1.0, 0.9, 0.949), True, "standard"),
        ((1.0, 1.0, 1.0, 0.89), True, "standard"),
        ((1.0, 0.80), True, "standard"),
        ((1.0,) * 9 + (0.0,), True, "basic"),
        ((0.85,), True, "basic"),
        ((0.8499,), True, None),
        ((1.0, 1.0), False, None),
        ((), True, None),
    ],
)
def test_levels_at_their_bounds(shares: tuple[float, ...], gates: bool, reached: str | None) -> None:
    assert level([Part(str(place), share) for place, share in enumerate(shares)], gates) == reached


def test_a_higher_level_reaches_the_lower_ones() -> None:
    assert [reaches("standard", one) for one in ("basic", "standard", "enhanced")] == [True, True, False]
    assert not reaches(None, "basic")


def test_a_run_with_everything_is_enhanced(code: Report, run: Path) -> None:
    report = measure_run(run, code)
    assert {control.name: control.share for control in report.controls} == dict.fromkeys(NAMES, 1.0)
    assert next(measure for rule, measure in report.rules if rule.number == 3).applicable == 4
    assert report.level == "enhanced" and report.passes("enhanced", 1.0) and report.run == str(run)
    assert report.lacking("enhanced", 1.0) == []
    assert code.controls == () and next(measure for rule, measure in code.rules if rule.number == 3).share is None


def _edit_trail(run: Path) -> None:
    trail = run / "audit.jsonl"
    trail.write_text(trail.read_text().replace('"train_iters":6', '"train_iters":7'))


def _cut_trail(run: Path) -> None:
    trail = run / "audit.jsonl"
    trail.write_text("".join(trail.read_text().splitlines(keepends=True)[:5]))


def _flip(run: Path) -> None:
    file = next((run / "step_0000003").glob("rank_*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "an edited trail": (_edit_trail, "audit", "its chain holds: .*altered"),
    "a cut trail": (_cut_trail, "audit", "it fits the checkpoints: .*cut off"),
    "no trail": (lambda run: (run / "audit.jsonl").unlink(), "audit", "audit.jsonl is there"),
    "no events": (lambda run: (run / "events.jsonl").unlink(), "validation", "was evaluated"),
    "a flipped byte": (_flip, "digests", "step_0000003 is whole: .*has been altered"),
    "a lost manifest": (lambda run: (run / "step_0000003" / "manifest.json").unlink(), "digests", "manifest"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(tmp_path: Path, code: Report, run: Path, name: str) -> None:
    breaks, control_name, text = BROKEN[name]
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    breaks(copy)
    report = measure_run(copy, code)
    control = next(control for control in report.controls if control.name == control_name)
    assert control.share < 1
    failing = " | ".join(check.text for check in control.checks if not check.holds)
    assert re.search(text, failing), failing
    assert report.score < measure_run(run, code).score
    assert any(line.startswith(f"{control_name}: ") for line in report.lacking("enhanced"))


def test_a_plain_run_lacks_what_it_did_not_ask_for(tmp_path: Path, code: Report) -> None:
    prefix = write_dataset(tmp_path / "data")
    make_trainer(arguments(prefix, "--save", str(tmp_path / "run"))).train()
    report = measure_run(tmp_path / "run", code)
    shares = {control.name: control.share for control in report.controls}
    assert shares["audit"] == 0 and shares["encryption"] == 0 and shares["validation"] == 0.5
    assert shares["digests"] == 1 and shares["reproducibility"] > 0.5
    assert not report.passes("standard", 0) and "encryption: 0.000" in failed(report, "standard", 0)
    assert Evidence.of(tmp_path / "run").metrics is None
    with pytest.raises(UserError, match="no checkpoint"):
        measure_run(tmp_path, code)


def test_a_configuration_is_scored_by_what_it_asks_for(code: Report) -> None:
    flags = arguments("unused")
    little = calculate_compliance_score(make_config(flags), code)
    much = calculate_compliance_score(
        make_config([*flags, "--save", "r", "--audit-trail", "--encrypt-checkpoints", "--eval-iters", "1"]), code
    )
    assert little < much == 1.0
    theirs, silent = TrainingConfig(), ComplianceSection(enable_audit_trail=False)
    assert calculate_compliance_score(theirs, code) > calculate_compliance_score(
        dataclasses.replace(theirs, nasa_compliance=silent), code
    )
    assert {control.name: control.share for control in asked(make_config([*flags, "--save", "r"]))}["digests"] == 1


def test_a_broken_gate_bars_every_level(code: Report, run: Path) -> None:
    gates = (("no eval", (Finding("a.py:1", "a call of eval"),)),)
    report = dataclasses.replace(measure_run(run, code), gates=gates)
    assert report.level is None and not report.passes("basic", 0)
    assert report.lacking("basic")[0] == "no eval: 1, the first at a.py:1"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text(SOURCE + '\n\ndef f(x):\n    "<b>"\n    return f(x)\n')
    monkeypatch.setattr("megaforge.compliance.tools.importlib.util.find_spec", lambda name: None)
    line = ["--code", str(tmp_path / "code"), "--level", "basic", "--min-score", "0.85"]

    def command(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["compliance_report.py", *line, *more])
        return compliance_report.main()

    assert command("--output", str(tmp_path / "out")) == 0 and command("--enforce") == 1
    said = capsys.readouterr().out
    assert "score " in said and "lacking: the score is" in said and "rule  1         0.500" in said
    content = json.loads((tmp_path / "out" / JSON_FILE).read_text())
    assert content["passed"] is False and content["rules"][0]["findings"][0]["text"] == "f reaches itself"
    assert content["score"] == round((0.5 + 1 + 1 + 2 * 0.5) / 5, 6) and "not a certificate" in content["title"]
    html = (tmp_path / "out" / HTML_FILE).read_text()
    assert "f reaches itself" in html and "not passed" in html and "<script" not in html
    assert command("--json") == 0 and json.loads(capsys.readouterr().out)["level"] is None
