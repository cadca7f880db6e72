"""The picture of losses: what its lines are made of, and where it goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megaforge.errors import UserError

pytest.importorskip("matplotlib", reason="needs the train extra")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import plot_loss
from plot_loss import curve, names_of, parse_arguments, running_mean


def metrics(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"kind": "step", "iteration": i, "loss": 4.0 / i, "tokens": 100 * i} for i in range(1, 6)]
    records.insert(2, {"kind": "step", "iteration": 9, "loss": None, "tokens": 900})
    records.append({"kind": "evaluation", "iteration": 4, "loss": 2.0, "tokens": 7})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_mean_is_unbiased() -> None:
    assert running_mean([5.0] * 4, 0.9) == pytest.approx([5.0] * 4)
    # The first value must not outweigh its age: weights 0.9, 1 of two values, 0.81, 0.9, 1 of three.
    assert running_mean([10.0, 0.0, 0.0], 0.9) == pytest.approx([10, 9 / 1.9, 8.1 / 2.71])
    assert running_mean([3.0, 1.0], 0.0) == [3.0, 1.0]
    assert running_mean([], 0.9) == []


def test_evaluations_stand_at_the_tokens_of_their_step(tmp_path: Path) -> None:
    records = [json.loads(line) for line in Path(metrics(tmp_path / "m.jsonl")).read_text().splitlines()]
    assert curve(records, "step")[0] == [1, 2, 3, 4, 5]
    assert curve(records, "step", "tokens")[0] == [100, 200, 300, 400, 500]
    assert curve(records, "evaluation") == ([4], [2.0])
    assert curve(records, "evaluation", "tokens") == ([400], [2.0])


def test_runs_are_told_apart() -> None:
    assert names_of(["x/m.jsonl"]) == ["loss"]
    assert names_of(["a/metrics.jsonl", "b/metrics.jsonl"]) == ["a", "b"]
    assert names_of(["a/one.jsonl", "a/two.jsonl"]) == ["one", "two"]
    assert names_of(["r/a/m.jsonl", "s/a/m.jsonl"]) == ["r/a", "s/a"]
    assert names_of(["a/m.jsonl", "b/m.jsonl", "b/n.jsonl"]) == ["a/m", "b/m", "b/n"]
    assert len(names_of(["a/m.jsonl", "a/m.jsonl"])) == 2


def test_draws_several_runs_into_a_new_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, output = [metrics(tmp_path / name / "m.jsonl") for name in "ab"], tmp_path / "new" / "loss.svg"
    monkeypatch.setattr(sys, "argv", ["x", "--metrics-file", *files, "--output", str(output), "--x-axis", "tokens"])
    assert plot_loss.main() == 0
    picture = output.read_text()
    for text in ("a: validation", "b: validation", "tokens"):
        assert f"<!-- {text} -->" in picture, text
    assert [path.name for path in output.parent.iterdir()] == ["loss.svg"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output", "loss"), "--output loss: its ending"),
        (("--output", "metrics.jsonl"), "--output metrics.jsonl: its ending"),
        (("--output", "x.png", "--name", "a", "b"), "--name a b: 2 for 1 runs"),
    ],
)
def test_bad_flags_are_named(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(["--metrics-file", "m.jsonl", *flags])


@pytest.mark.parametrize(
    ("name", "drawn"),
    [("\udcff\udce9", "??"), ("$x^$", "$x^$"), ("a $ b", "a $ b"), ("\\frac", "\\frac"), ("_x", "_x"), ("_", "_")],
)
def test_any_name_is_drawn_to_the_letter(tmp_path: Path, name: str, drawn: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        plot_loss.draw([metrics(tmp_path / "m.jsonl")], [name], str(tmp_path / "out.svg"), 0.9)
    picture = (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert f">{drawn}</text>" in picture and f">{drawn}: validation</text>" in picture


def test_a_metrics_file_of_other_bytes_is_named(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    metrics.write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(UserError, match="m.jsonl: is not UTF-8 text"):
        plot_loss.draw([str(metrics)], ["x"], str(tmp_path / "out.png"), 0.9)
