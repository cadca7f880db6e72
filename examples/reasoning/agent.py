#!/usr/bin/env python3
"""Both stages of a small reasoning model, and what its agent does that the model alone cannot.

A text of 16 chunks holds 48 pairs of a key and a value, of which one is asked for. The model sees 24 tokens of it at
once, besides the chunk that it reads, and the index keeps two chunks. Stage A trains a model of two layers to answer
from what it sees, stage B its agent to keep the right chunk and to look it up (docs/agent.md)::

    python examples/reasoning/agent.py --output runs/agent

Prints the share of right answers of each arm, of texts that neither stage has seen, and draws ``accuracy.png``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.cli import parse_config
from megaforge.config.entry import run_entry
from megaforge.errors import require
from megaforge.parallel.context import ParallelContext
from megaforge.reasoning.agent.episode import Episode, Setting
from megaforge.reasoning.agent.heads import AgentHeads
from megaforge.reasoning.agent.objective import AgentObjective
from megaforge.reasoning.agent.player import Policy, greedy, play
from megaforge.reasoning.agent.texts import TaskTexts
from megaforge.registry import AGENT_ACTIONS
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer
from megaforge.training.trainer import Trainer

REPO = Path(__file__).parents[2]
NAMES = AGENT_ACTIONS.names()
BOTH = ("--data-path", "tasks://kv_chunks", "--device", "cpu", "--alerts-off", "throughput", "loss_spike")
STAGE_A = (
    *("--hybrid-layer-pattern", "R-*-", "--hidden-size", "64", "--num-attention-heads", "2", "--rwkv-head-size", "16"),
    *("--ffn-hidden-size", "128", "--init-std", "0.125", "--untie-embeddings-and-output-weights"),
    *("--seq-length", "256", "--micro-batch-size", "16", "--global-batch-size", "16", "--lr", "3e-3"),
    *("--lr-warmup-iters", "20", "--eval-iters", "4", "--eval-interval", "100", "--log-interval", "100"),
)
STAGE_B = (
    *("--use-checkpoint-args", "--agent-heads", "--objective", "agent", "--memory-dim", "32", "--memory-slots", "2"),
    *("--seq-length", "128", "--micro-batch-size", "128", "--global-batch-size", "128", "--lr", "3e-2"),
    *("--lr-warmup-iters", "2", "--weight-decay", "0", "--log-interval", "20"),
)
# The weight of the divergence, which keeps every action in play at first, falls until the policy may be sure.
SURER = ("--rl-kl-target", "1", "--rl-kl-horizon", "10")
ALGORITHMS = {"grpo": (*SURER, "--no-rl-scale-advantages"), "ppo": (*SURER, "--rl-algorithm", "ppo", "--lr", "1e-2")}


def random_actions(heads: AgentHeads, hidden: Tensor, flags: Tensor, memory: Tensor, draws: Tensor) -> Tensor:
    """Each possible action alike."""
    possible = heads.possible[flags[:, 0].long()].double()
    return (possible.cumsum(1) / possible.sum(1, keepdim=True) <= draws[:, None]).sum(1)


def always_write(heads: AgentHeads, hidden: Tensor, flags: Tensor, memory: Tensor, draws: Tensor) -> Tensor:
    """Writes every chunk, then looks up what is left of them."""
    write, retrieve, splice = (NAMES.index(name) for name in ("cache_write", "retrieve", "splice_window"))
    behind = torch.where(flags[:, 2] > 0, splice, retrieve)
    return torch.where(flags[:, 0] > 0, behind, write)


def alone(heads: AgentHeads, hidden: Tensor, flags: Tensor, memory: Tensor, draws: Tensor) -> Tensor:
    """Does nothing; :func:`share_right` gives it the text's last tokens."""
    return torch.where(flags[:, 0] > 0, NAMES.index("retrieve"), NAMES.index("summarize"))


def run(script: str, *flags: str) -> float:
    """Runs one of the repository's commands; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(REPO / script), *flags], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def resumed(place: Path) -> tuple[str, ...]:
    """Flags of a run that goes on where it was ended."""
    return "--save", str(place), "--load", str(place)


def loaded(words: Path, saved: Path, chunks: int, seed: int) -> Trainer:
    """The agent of a run, to play texts of so many chunks that no run has seen."""
    flags = ("--load", str(saved), "--finetune", "--tokenizer-model", str(words), "--seed", str(seed + 1000))
    sizes = ("--agent-chunks", str(chunks), "--agent-steps", str(chunks + 4))
    config = parse_config([*BOTH, *STAGE_B, *flags, *sizes, "--train-iters", "9"]).config
    return build_trainer(prepare(config), ParallelContext.single())


def share_right(trainer: Trainer, policy: Policy, examples: int) -> tuple[float, float]:
    """Of right answers, and the actions that an episode took."""
    objective = trainer.objective
    assert isinstance(objective, AgentObjective)
    texts, reader = TaskTexts(trainer.config), objective.reader(trainer)
    reader.share_heads()
    setting = Setting.of(trainer.config.rl)
    dtype = reader.heads.policy.weight.dtype
    episodes = [Episode(k, texts.of(k), objective.new_memory(dtype), setting) for k in range(examples)]
    if policy is alone:
        for one in episodes:
            one.window = sum(one.chunks, ())[-setting.window :]
            one.place = len(one.chunks)
    play(episodes, reader, policy, trainer.config.training.seed, 0)
    right = sum(bool(one.verdict) for one in episodes)
    return right / examples, sum(one.cost for one in episodes) / examples


def one_seed(seed: int, output: Path, words: Path, asked: argparse.Namespace) -> dict[str, str]:
    """Both stages, and each arm's share of right answers."""
    core, common = output / f"core{seed}", ("--tokenizer-model", str(words), "--seed", str(seed), *BOTH)
    first = run("pretrain_cdrmix.py", *STAGE_A, *common, "--train-iters", str(asked.stage_a), *resumed(core))
    row = {"stage A, CPU s": f"{first:.0f}"}
    for name, flags in ALGORITHMS.items():
        saved, told = output / f"{name}{seed}", ("--metrics-file", str(output / f"{name}{seed}.jsonl"))
        line = (*STAGE_B, *common, *flags, "--pretrained-checkpoint", str(core), *resumed(saved), *told)
        seconds = run("pretrain_cdrmix.py", *line, "--train-iters", str(asked.stage_b))
        for chunks in (16, 64):
            trainer = loaded(words, saved, chunks, seed)
            if name == "grpo" and chunks == 16:
                arms = {"backbone alone": alone, "random actions": random_actions, "always write": always_write}
                for arm, policy in arms.items():
                    row[arm] = f"{100 * share_right(trainer, policy, asked.examples)[0]:.1f}%"
            right, actions = share_right(trainer, greedy, asked.examples)
            row[f"{name}, {chunks} chunks"] = f"{100 * right:.1f}%"
            row[f"{name}, {chunks} chunks, actions"] = f"{actions:.1f}"
        row[f"{name}, CPU s"] = f"{seconds:.0f}"
    return row


def draw(output: Path, seeds: Sequence[int]) -> None:
    """The share of right answers of the episodes of each update."""
    require("matplotlib", extra="train", purpose="examples/reasoning/agent.py").use("Agg")
    pyplot: Any = require("matplotlib.pyplot", extra="train", purpose="examples/reasoning/agent.py")
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="tight")
    for name, colour in zip(ALGORITHMS, ("tab:blue", "tab:orange"), strict=True):
        for number, seed in enumerate(seeds):
            lines = (json.loads(line) for line in (output / f"{name}{seed}.jsonl").open(encoding="utf-8"))
            steps = [line for line in lines if line["kind"] == "step"]
            x, y = [one["iteration"] for one in steps], [one["accuracy"] for one in steps]
            axes.plot(x, y, color=colour, alpha=0.7, label=name.upper() if number == 0 else None)
    axes.set(xlabel="update", ylabel="right answers", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(output / "accuracy.png", dpi=80)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/agent"), help="directory of all runs")
    parser.add_argument("--seeds", type=integer(0), nargs="+", default=[0, 1, 2], help="of runs and texts")
    parser.add_argument("--stage-a", type=integer(1), default=300, help="steps of stage A")
    parser.add_argument("--stage-b", type=integer(1), default=150, help="updates of stage B")
    parser.add_argument("--examples", type=integer(1), default=512, help="texts that each arm answers")
    return parser.parse_args(arguments)


def main() -> int:
    flags = parse_arguments()
    torch.set_num_threads(1)
    flags.output.mkdir(parents=True, exist_ok=True)
    words = flags.output / "words.json"
    if not words.exists():
        run("tools/make_task_tokenizer.py", "--tasks", "kv_chunks", "--output", str(words))
    rows = [one_seed(seed, flags.output, words, flags) for seed in flags.seeds]
    print("| arm |" + "".join(f" seed {seed} |" for seed in flags.seeds))
    print("|---|" + "---:|" * len(rows))
    for name in rows[0]:
        print(f"| {name} |" + "".join(f" {row[name]} |" for row in rows))
    draw(flags.output, flags.seeds)
    return 0


if __name__ == "__main__":
    run_entry(main)
