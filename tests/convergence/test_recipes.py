"""How curves are compared; that each recipe has one; and that the text never changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megaforge.config.cli import parse_config
from tests.convergence import __main__ as command
from tests.convergence.recipes import CURVES, EVERY, RECIPES, curve, departures, flags_of, write_text
from tests.end_to_end.launch import Outcome


def test_curves_are_compared_point_by_point() -> None:
    kept = [4.0, 2.0, 1.0]
    assert departures([4.1, 1.95, 1.0], kept) == []
    assert departures([4.0, 2.2, 1.0], kept) == ["point 2: 2.2000, and 2.0000 is kept (+10.0%)"]
    too_good = departures([4.0, 1.5, 1.0], kept)
    assert too_good == ["point 2: 1.5000, and 2.0000 is kept (-25.0%)"]
    assert departures([4.0, float("nan"), 1.0], kept)[0].startswith("point 2: nan")
    assert departures([4.0, 2.0], kept) == ["2 points, and 3 are kept"] and departures(kept, []) != []


def test_a_curve_is_means_of_steps_and_an_evaluation() -> None:
    steps = [{"kind": "step", "loss": float(number)} for number in range(2 * EVERY)]
    lines = [json.dumps(one) for one in [*steps, {"kind": "evaluation", "loss": 0.5}]]
    assert curve(lines) == [(EVERY - 1) / 2, EVERY + (EVERY - 1) / 2, 0.5]


@pytest.mark.parametrize(
    ("factor", "broken", "status", "said"),
    [
        (1.0, False, 0, "all within their bands"),
        (1.02, False, 0, "all within their bands"),
        (1.04, False, 1, "1 recipes are outside of 3% around their curves"),
        (0.96, False, 1, "1 recipes are outside of 3% around their curves"),
        (1.0, True, 1, "muon: ended with 3"),
    ],
)
def test_the_command_fails_where_a_curve_is_outside_of_its_band(
    factor: float,
    broken: bool,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one recipe: the last point is so much off, or the run itself fails."""
    *means, last = json.loads(CURVES.read_text("utf-8"))["muon"]

    def run(ranks: int, script: str, *flags: str) -> Outcome:
        steps = [{"kind": "step", "loss": mean} for mean in means for _ in range(EVERY)]
        lines = [json.dumps(one) for one in [*steps, {"kind": "evaluation", "loss": last * factor}]]
        Path(flags[flags.index("--metrics-file") + 1]).write_text("\n".join(lines))
        return Outcome(3 if broken else 0, "", "it is broken")

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr("sys.argv", ["convergence", "muon"])
    assert command.main() == status and said in capsys.readouterr().out


def test_every_recipe_is_a_valid_run_and_has_a_curve_that_falls(tmp_path: Path) -> None:
    kept = json.loads(CURVES.read_text("utf-8"))
    assert kept.keys() == RECIPES.keys()
    for name, points in kept.items():
        assert parse_config(flags_of(name, "text", tmp_path / "m.jsonl")).config.training.train_iters == 120
        assert len(points) == 120 // EVERY + 1 and points[-1] < 0.75 * points[0]


def test_the_text_is_the_one_that_curves_are_of(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    digest = hashlib.sha256((tmp_path / "text.bin").read_bytes()).hexdigest()
    assert digest == "d6bd605aa83618c1d512ebff0ac8c8e87a90c4e803aa98920f9123c91f3b0a46", (
        "examples have changed: python -m tests.convergence --update"
    )
