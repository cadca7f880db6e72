"""``tools/plan.py schedule`` prints and draws what the simulator says, and refuses what could deadlock."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.parallel.pipeline.simulator import simulate
from megaforge.planning.schedule_command import run
from megaforge.planning.schedule_drawing import draw_text
from megaforge.planning.search import candidates
from megaforge.registry import SCHEDULES


def test_text_timeline() -> None:
    assert draw_text(simulate(build_schedule("1f1b", pp=2, vpp=1, microbatches=2))).splitlines() == [
        "rank  0 |F0|F1|......B0|---...B1|---",
        "rank  1 |...F0|B0|---F1|B1|---......",
    ]


def test_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "timeline.png"
    sizes = ["--pp", "4", "--vpp", "2", "--microbatches", "8", "--schedule", "zb-v"]
    assert run([*sizes, "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "bubble share 5.88%" in printed
    assert printed.count("8 / 4") == 4
    assert sum(line.startswith("rank ") and "|" in line for line in printed.splitlines()) == 4


def test_writes_what_the_name_says_where_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, begins in (("a.svg", b"<?xml"), ("b.PDF", b"%PDF"), ("c.txt", b"rank  0 |")):
        assert run(["--pp", "2", "--microbatches", "2", "--output", str(tmp_path / "d" / name)]) == 0
        assert (tmp_path / "d" / name).read_bytes().startswith(begins)
        assert f"wrote {tmp_path / 'd' / name}" in capsys.readouterr().out
    assert len(list((tmp_path / "d").iterdir())) == 3
    for name in ("timeline", "timeline.gif", "timeline.jsonl"):
        with pytest.raises(UserError, match=f"--output .*{name}: its ending must say"):
            run(["--output", str(tmp_path / name)])
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        run(["--output", str(tmp_path / "x.png")])


def test_without_a_place_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["--pp", "2"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_own_schedule_that_could_deadlock_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("F0.0 B0.0 F0.1 B0.1\nF1.1 B1.1 F1.0 B1.0\n")
    with pytest.raises(UserError, match="deadlocks"):
        run(["--schedule-file", str(file)])
    file.write_text("F0.0 B0.0 F0.1 B0.1\nF1.0 B1.0 F1.1 B1.1\n")
    assert run(["--schedule-file", str(file)]) == 0


def test_actions_are_printed_as_the_file_format_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--schedule", "zb-h1", "--pp", "3", "--microbatches", "4", "--print-actions"]) == 0
    first = capsys.readouterr().out
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(line for line in first.splitlines() if line.startswith("F")))
    assert run(["--schedule-file", str(file)]) == 0
    assert first.splitlines()[:3] == capsys.readouterr().out.splitlines()[:3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--schedule", "interleaved", "--microbatches", "6"], "valid here: 4 or 8"),
        (["--forward-cost", "0"], "--forward-cost 0: must be positive"),
        (["--communication-cost", "-1"], "--communication-cost -1: must be at least 0"),
        (["--schedule-file", "/nowhere/x"], "/nowhere/x: No such file"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        run(arguments)


def test_a_schedule_of_ones_own_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SCHEDULES, "_parts", dict(SCHEDULES._parts))
    file = tmp_path / "mine.py"  # a copy, so that it registers itself again
    file.write_text((Path(__file__).parents[1] / "toys" / "latest_first_schedule.py").read_text())
    with pytest.raises(UserError, match=r"'latest-first' is not a known pipeline schedule \(there are gpipe"):
        run(["--schedule", "latest-first"])
    sizes = ["--pp", "2", "--microbatches", "2"]
    assert run(["--schedule", "latest-first", "--extensions", str(file), *sizes, "--print-actions"]) == 0
    assert capsys.readouterr().out.endswith("F0.0 F0.1 B0.1 B0.0\nF1.0 F1.1 B1.1 B1.0\n")
    with pytest.raises(UserError, match="latest-first with --vpp 2 .* use --vpp 1, or interleaved or zb-v"):
        run(["--schedule", "latest-first", "--vpp", "2"])
    config = parse_config(["--pipeline-schedule", "latest-first", "--vocab-size", "64", "--global-batch-size", "4"])
    tried = {layout.schedule_name for layout in candidates(config.config, 2) if layout.pp == 2}
    assert tried == {"1f1b", "interleaved", "zb-h1", "zb-v", "latest-first"}
