"""examples/reasoning/agent.py: both stages and every arm, at sizes that teach nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megaforge.data.task_tokenizer import make_task_tokenizer
from tests.training.tiny import make_trainer

FILE = Path(__file__).parents[2] / "examples" / "reasoning" / "agent.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_example", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["agent_example"] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_and_the_picture(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(script: str, *flags: str) -> float:
        if script == "pretrain_cdrmix.py":
            make_trainer([*flags, "--num-workers", "0"]).train()
        else:
            make_task_tokenizer(["kv_chunks"], flags[-1])
        return 1.0

    small = ("--rl-group-size", "4", "--global-batch-size", "4", "--micro-batch-size", "4")
    monkeypatch.setattr(example, "run", run)
    monkeypatch.setattr(example, "STAGE_A", (*example.STAGE_A, "--lr-warmup-iters", "0", "--eval-iters", "1"))
    monkeypatch.setattr(example, "STAGE_B", (*example.STAGE_B, *small, "--lr-warmup-iters", "0"))
    line = ("--output", str(tmp_path), "--seeds", "3", "--stage-a", "1", "--stage-b", "1", "--examples", "2")
    monkeypatch.setattr(sys, "argv", ["agent.py", *line])
    assert example.main() == 0
    rows = [text.split("|")[1].strip() for text in capsys.readouterr().out.splitlines() if text.startswith("| ")]
    assert rows[1:5] == ["stage A, CPU s", "backbone alone", "random actions", "always write"]
    assert {"grpo, 16 chunks", "ppo, 64 chunks", "ppo, CPU s"} <= set(rows)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_arms_choose_what_is_possible(example: ModuleType) -> None:
    heads = torch.nn.Module()
    heads.possible = torch.tensor([[True] * 4, [False, False, True, True]])
    flags = torch.tensor([[0.0, 0, 0, 0]] * 4 + [[1.0, 1, 0, 0], [1.0, 1, 1, 0]])
    draws = torch.tensor([0.0, 0.3, 0.6, 0.99, 0.49, 0.51], dtype=torch.float64)
    nothing = torch.zeros(6, 1)
    assert example.random_actions(heads, nothing, flags, nothing, draws).tolist() == [0, 1, 2, 3, 2, 3]
    assert example.always_write(heads, nothing, flags, nothing, draws).tolist() == [1, 1, 1, 1, 2, 3]
    assert example.alone(heads, nothing, flags, nothing, draws).tolist() == [0, 0, 0, 0, 2, 2]
