"""Six faults of a run of two ranks, which ends as a run that nothing disturbed (``run_scripts/chaos.sh`` has more)."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.chaos import chaos
from tests.chaos.report import report

KINDS = ("slow rank", "kill mid-save", "kill mid-load", "flipped bit", "node lost", "clock jump")


def test_six_faults_leave_no_trace(corpus: Path, tmp_path: Path) -> None:
    outcome = chaos(tmp_path, count=6, seed=1, ranks=2, kinds=KINDS, timeout=30.0, restarts=9, text=corpus)
    log = (tmp_path / "disturbed" / "launch.log").read_text(encoding="utf-8")
    assert not outcome.findings, f"{outcome.findings}\n{log[-6000:]}"
    assert outcome.run.launches == 1 and outcome.redone, "torchrun has started the ranks again"
    assert "has been altered" in log
    text = report(outcome)
    assert "6 of 6 faults (seed 1)" in text and "Wrong" not in text
    assert "| kill mid-load | 1 | 1 |" in text and "| node lost | 1 | 1 | 1, 0 |" in text
    assert outcome.spent["steps"] > 0 and outcome.spent["re-done"] > 0 and "The run's own account: " in text
