"""One line trains stage A, then stage B: ended anywhere, the same line goes on, and ends as if nothing had been."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megaforge import pretrain as module
from megaforge.errors import UserError
from megaforge.monitor.sinks import read_metrics
from megaforge.resilience.leaving import COMPLETED, STAGE_A_COMPLETED, UNFINISHED
from megaforge.resilience.requests import Requests

FILE = """
model: {vocab_size: 32, hidden_size: 32, num_attention_heads: 2, hybrid_layer_pattern: "R-*-", rwkv_head_size: 16,
        ffn_hidden_size: 32}
data: {data_path: ["progressions://32"], seq_length: 32}
training: {train_iters: 6, micro_batch_size: 2, eval_iters: 1}
logging: {log_interval: 3}
checkpoint: {save_interval: 0}
stage_b:
  model: {peft: plastic, plastic_chunk: 8}
  training: {train_iters: 5, eval_iters: 0}
"""


def losses(file: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(file) if record["kind"] == "step"]


def test_one_line_trains_both_stages_and_goes_on_in_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.yaml").write_text(FILE)
    monkeypatch.setattr(Requests, "listen", lambda self, announce: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ})

    def run(name: str, *flags: str) -> str:
        save = str(tmp_path / name)
        line = ["pretrain_cdrmix.py", "--config", str(tmp_path / "two.yaml"), "--save", save, "--load", save]
        more = ["--metrics-file", f"{save}/m.jsonl", "--requeue-exit-code", "85", *flags]
        monkeypatch.setattr(sys, "argv", [*line, *more])
        status = module.pretrain("pretrain_cdrmix.py", "")
        found = capfd.readouterr()
        return f"{status} {found.out}{found.err}"

    whole = run("whole")
    assert whole.startswith("0 ") and whole.index("stage A: training") < whole.index("stage B: training")
    assert "with adapters reset, +0.00% beside the " in whole and "before stage B, within 1%" in whole
    parts, cut = tmp_path / "parts", ("--exit-interval", "4")
    assert run("parts", *cut).startswith("85 ") and (parts / UNFINISHED).exists()
    assert not (parts / STAGE_A_COMPLETED).exists() and not (parts / "stage_b").exists()
    assert run("parts", *cut).startswith("85 "), "the rest of stage A, and some of stage B"
    assert (parts / STAGE_A_COMPLETED).exists() and (parts / UNFINISHED).exists() and not (parts / COMPLETED).exists()
    last = run("parts", *cut)
    assert last.startswith("0 ") and "stage A: training" not in last and "after iteration 4" in last
    assert (parts / COMPLETED).exists() and (parts / "stage_b" / COMPLETED).exists()
    assert not list(parts.rglob(UNFINISHED))
    assert run("parts", *cut).count("nothing is left to do") == 2
    assert "with adapters reset, +0.00% beside the " in last
    for file, steps in (("m.jsonl", 6), ("m.stage_b.jsonl", 5)):
        assert losses(parts / file) == losses(tmp_path / "whole" / file) and len(losses(parts / file)) == steps
    alone = run("alone", "--stage", "b", "--load", str(parts))
    assert "stage A" not in alone and losses(tmp_path / "alone" / "m.jsonl") == losses(parts / "m.stage_b.jsonl")


def test_what_is_wrong_with_stage_b_is_said_before_stage_a(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.yaml").write_text(FILE + "  data: {data_path: [nowhere]}\n")
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(tmp_path / "two.yaml"), "--save", str(tmp_path / "r")])
    with pytest.raises(UserError, match=r"nowhere\.idx does not exist"):
        module.pretrain("pretrain_cdrmix.py", "")
    assert not (tmp_path / "r").exists()
