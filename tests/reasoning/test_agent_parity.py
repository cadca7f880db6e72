"""A step of stage B is the same at every layout: episodes, rewards, every metric, gradient and weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train

LAYOUTS = {
    "dp4": ("--micro-batch-size", "4"),
    "tp2 x pp2": ("--tp", "2", "--pp", "2"),
    "tp2, sp, dp2, zero 2": ("--tp", "2", "--sp", "--zero", "2", "--micro-batch-size", "8"),
    "cp2 x pp2, zb-v": ("--cp", "2", "--pp", "2", "--pipeline-schedule", "zb-v"),
    "tp4": ("--tp", "4"),
    "pp2, vpp2, dp2": ("--pp", "2", "--vpp", "2", "--micro-batch-size", "4"),
    "ep2 x tp2": ("--ep", "2", "--tp", "2"),
}
PLAYED = ("reward", "accuracy", "actions", "memory_summaries", "memory_entries", "policy_ratio", "kl", "memory_loss")


def agent_arguments(words: Path, *more: str) -> list[str]:
    """Flags of a model whose agent plays in milliseconds."""
    return [
        *("--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "48", "--rwkv-head-size", "8"),
        *("--data-path", "tasks://kv_chunks", "--tokenizer-model", str(words), "--seq-length", "64"),
        *("--device", "cpu", "--num-workers", "0", "--log-interval", "1", "--micro-batch-size", "8"),
        *("--global-batch-size", "16", "--train-iters", "2", "--lr", "1e-2", "--lr-decay-style", "constant"),
        *("--alerts-off", "throughput", "memory", "disk", "--hybrid-layer-pattern", "R-*-R*", "--fp64"),
        *("--objective", "agent", "--agent-heads", "--memory-dim", "8", "--rl-group-size", "4", "--agent-chunks", "4"),
        *("--task-chunk-tokens", "9", "--task-window", "18", "--agent-window", "12", *more),
    ]


def steps(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in outcome["records"] if one["kind"] == "step"]


@pytest.mark.parametrize("layouts", [("dp4", "tp2 x pp2"), ("tp2, sp, dp2, zero 2", "cp2 x pp2, zb-v")])
def test_heads_on_a_frozen_model(ranks: RankPool, words: Path, layouts: tuple[str, ...]) -> None:
    argv = agent_arguments(words, "--rl-algorithm", "ppo", "--rl-epochs", "2", "--rl-entropy", "0.01")
    expected = train(argv)
    first, second = steps(expected)
    assert first["policy_ratio"] == 1 and second["policy_ratio"] != 1, "exactly, on the first update"
    assert abs(first["kl"]) < 1e-15 and second["kl"] > 1e-6 and set(PLAYED) <= first.keys()
    assert first["reward"] == second["reward"] and first["actions"] > 2, "the second step learns from the same episodes"
    for layout in layouts:
        found = ranks.run(4, train, [*argv, *LAYOUTS[layout]])
        assert all(steps(one)[0]["policy_ratio"] == 1 for one in found), layout
        compare(found, expected, 1e-10)


def test_a_memory_of_the_run(ranks: RankPool, words: Path) -> None:
    """The second step's episodes look up what the accepted ones of the first have left, and evict."""
    argv = agent_arguments(words, "--agent-memory", "run", "--agent-memory-capacity", "5", "--rl-algorithm", "ppo")
    expected = train(argv)
    first, second = steps(expected)
    assert first["run_memory_entries"] == 5 and second["run_memory_evicted"] > first["run_memory_evicted"] > 0
    for layout in ("tp4", "pp2, vpp2, dp2"):
        compare(ranks.run(4, train, [*argv, *LAYOUTS[layout]]), expected, 1e-10)


def test_adapters_and_experts(ranks: RankPool, words: Path) -> None:
    """Plastic adapters learn from rewards too, from texts, and from what they correlate with; the reference is the
    model without them."""
    argv = agent_arguments(
        *(words, "--rl-algorithm", "ppo", "--hybrid-layer-pattern", "RE*-R*", "--num-experts", "4"),
        *("--peft", "plastic", "--plastic-rank", "2", "--plastic-chunk", "4", "--seed", "3", "--rl-resample", "1"),
        *("--rl-ce-weight", "0.5", "--plastic-correlation", "0.3", "--moe-aux-loss-coeff", "0.1"),
    )
    expected = train(argv)
    assert any(".plastic." in name for name in expected["gradients"])
    first, second = steps(expected)
    assert first["policy_ratio"] == second["policy_ratio"] == 1, "each step plays anew"
    assert all(first[name] for name in ("loss", "cross_entropy", "correlation_loss", "load_balance_loss"))
    assert first["kl"] > 0, "fast weights are in the policy, not in the reference"
    compare(ranks.run(4, train, [*argv, *LAYOUTS["ep2 x tp2"]]), expected, 1e-10)
