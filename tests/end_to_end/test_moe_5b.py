"""The 5B family: its presets are of the sizes that they name, and the example's arms in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples.moe_5b.arms import SMALL
from megaforge.config.cli import parse_config
from megaforge.models.parameter_count import count_parameters, total
from tests.end_to_end.launch import records, run
from tools import generate


def test_the_presets_are_one_family() -> None:
    """The small one has every part of the large one."""
    large, small = (parse_config(["--config", name, "--vocab-size", "2048"]).config for name in ("moe-5b", "moe-test"))
    whole = total(count_parameters(parse_config(["--config", "moe-5b"]).config.model))
    assert 4.9e9 < whole.stored < 5.2e9 and 1.4e9 < whole.active < 2e9
    assert large.length.train_tokens == 100_000_000_000 and small.length.train_tokens == 1_000_000
    for name in (
        "mod_capacity_factor",
        "mtp_num_layers",
        "mtp_mode",
        "num_experts",
        "moe_router_topk",
        "rom_num_experts",
    ):
        assert getattr(large.model, name) == getattr(small.model, name)
    letters = [set(config.model.hybrid_layer_pattern or "") for config in (large, small)]
    assert letters == [{"O", "E", "*"}] * 2
    assert all(config.model.query_groups < config.model.num_attention_heads for config in (large, small))


def test_arms_are_trained_once_and_listed(corpus: Path, tmp_path: Path) -> None:
    line = (
        "examples/moe_5b/arms.py",
        "--small",
        "--output",
        str(tmp_path),
        "--arms",
        "all",
        "without routing (Mamba-2)",
    )
    line += ("--data", str(corpus / "text_text_document"), "--tokenizer", str(corpus / "tok.json"))
    both = run(1, *line, "--train-tokens", "64")
    assert both.status != 0 and "--train-tokens: --small has its own length" in both.err
    first = run(1, *line)
    assert first.status == 0, first.err
    rows = first.out.splitlines()[-3:]
    assert rows[0].split()[:2] == ["arm", "loss"] and [row[:3] for row in rows[1:]] == ["all", "wit"]
    again = run(1, *line)
    assert "pretrain_cdrmix.py" not in again.out and again.out.splitlines()[-3:] == rows


def test_the_small_one_is_trained_by_four_ranks_continued_by_one_and_writes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part of it at once, by the real script on real text."""
    line = ("pretrain_cdrmix.py", "--config", "moe-test", "--device", "cpu", *SMALL, "--global-batch-size", "4")
    line += ("--micro-batch-size", "1", "--train-iters", "4", "--save-interval", "2", "--num-workers", "0")
    line += ("--data-path", str(corpus / "text_text_document"), "--tokenizer-model", str(corpus / "tok.json"))
    found, saves = [], [tmp_path / "four", tmp_path / "one"]
    for ranks, save, layout in (
        (4, saves[0], ("--tp", "2", "--pp", "2")),
        (1, saves[1], ("--load", str(saves[0] / "step_0000002"))),
    ):
        metrics = tmp_path / f"{ranks}.jsonl"
        outcome = run(ranks, *line, *layout, "--save", str(save), "--metrics-file", str(metrics))
        assert outcome.status == 0, outcome.err
        found.append([record for record in records(metrics) if record["iteration"] > 2])
    expected, continued = found
    assert [(r["kind"], r["iteration"]) for r in continued] == [("step", 3), ("step", 4), ("evaluation", 4)]
    for ours, theirs in zip(continued, expected, strict=True):
        assert ours.keys() == theirs.keys()
        names = {"loss", "grad_norm", "load_balance_loss", "mtp_loss/1", "mtp_loss/3"} & ours.keys()
        for name in sorted(names):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, ours["iteration"])

    monkeypatch.setattr(sys, "argv", ["generate.py", "--load", str(saves[0]), "--prompt", "def ", "--temperature", "0"])
    sys.argv += ["--max-new-tokens", "12", "--device", "cpu"]
    assert generate.main() == 0
    text = capsys.readouterr().out
    sys.argv += ["--speculate", "mtp"]
    assert generate.main() == 0
    assert len(text) > 12 and capsys.readouterr().out.startswith(text.rstrip("\n")), "drafts change no token"
