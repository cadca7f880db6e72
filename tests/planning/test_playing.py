"""Stage B in plans and dry runs: heads beside the model, episodes, and the passes that play them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.planning.communication import gradient_traffic
from megaforge.planning.episodes import episodes_of
from megaforge.planning.gpus import GPUS, Efficiency
from megaforge.planning.layout import layout_of
from megaforge.planning.memory import rank_memory
from megaforge.planning.plan_command import run
from megaforge.planning.playing import Playing
from megaforge.planning.round_time import round_time
from megaforge.planning.stages import cut_stages, model_parts, stage_parameters
from megaforge.planning.time import stage_time
from megaforge.reasoning.agent.episode import Context, Episode, Seen, Setting, pack_contexts
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.memory.episodic import EpisodicIndex
from megaforge.reasoning.packing import rounded
from megaforge.reasoning.texts_beside import most_texts
from megaforge.tasks.chunked import make_chunked
from megaforge.verification.dry_run import report, try_ranks
from tests.reasoning.test_agent_parity import agent_arguments
from tests.training.tiny import make_trainer

CORE = "--config cdrmix-test --vocab-size 500 --micro-batch-size 2 --global-batch-size 16 --seq-length 128"
AGENT = "--objective agent --agent-heads --memory-dim 8 --data-path tasks://kv_chunks"
LORA = ("--peft", "lora", "--lora-dropout", "0")
H100 = GPUS["h100-80g"]


def config_of(*flags: str) -> Config:
    return parse_config([*CORE.split(), *flags, "--dry-run"]).config


def agent(*flags: str) -> Config:
    return config_of(*AGENT.split(), *flags)


@pytest.mark.parametrize(
    "flags",
    [
        "--peft plastic --tp 2 --sp --pp 2 --ep 2 --etp 1 --zero 1",
        "--peft lora --lora-dropout 0 --zero 1",
        "--rl-algorithm ppo",
    ],
)
def test_the_dry_run_of_stage_b_finds_the_plan_right(flags: str) -> None:
    """Bytes of heads, their reference and adapters are the plan's on every rank: else it raises."""
    config = agent("--dry-run-ranks", "stage", *flags.split())
    found, ranks = try_ranks(config, 4)
    for rank in ranks:  # the plan does not know that in front of the first adapter nothing is kept
        assert rank.activations <= 1.01 * rank.planned_activations
        assert not config.model.peft or rank.planned_activations <= 1.2 * rank.activations
        assert found.rounds is not None
        assert rank.making == found.rounds.device_bytes(model_parts(config.model, found.dtype), found, rank.stages) > 0
    assert sum(rank.stages[-1].last for rank in ranks) == 1 and found.rows >= 2
    assert "playing before a step, by the plan: 0.0" in report(config, found, ranks)


@pytest.mark.parametrize(("window", "chunks", "length"), [(24, 16, 128), (64, 16, 4096), (8, 3, 64), (200, 6, 512)])
def test_no_episode_has_more_contexts_or_tokens_than_the_plan_says(window: int, chunks: int, length: int) -> None:
    """One that writes, looks up and splices as often as it may."""
    flags = ("--agent-window", str(window), "--agent-chunks", str(chunks), "--seq-length", str(length))
    config = agent(*flags)
    sizes = episodes_of(config)
    assert sizes is not None
    setting = Setting(window, config.rl.agent_answer_steps, config.rl.memory_top_k)
    example = make_chunked("kv_chunks", config.training.seed, 0, chunks, config.tasks.task_chunk_tokens)
    split = [tuple(map(hash, text.split())) for text in (*example.chunks, example.question, example.answer)]
    for first in ((1,), (1, 2, 3), (1, 1, 2, 3), (0,)):
        actions = [*first, *((2, 3) * (sizes.decisions))]
        one = Episode(0, (split[:-2], split[-2], split[-1]), AgentMemory(MemoryShape(8, 64)), setting)
        contexts: list[Context] = []
        windows = set()
        while not one.decided:
            contexts.append(one.context())
            windows.add(len(one.window))
            key = torch.randn(8, generator=torch.Generator().manual_seed(len(contexts)))
            one.decide(Seen(key, key, key[None], False), key, actions[len(contexts) - 1])
        assert len(one.decisions) <= sizes.decisions and len(windows) - 1 <= sizes.changes
        lengths = [len(context.tokens) for context in [*contexts, one.context()]]
        assert sizes.shortest <= lengths[0] and max(lengths) <= sizes.longest <= length
        fills = pack_contexts([Context((n, *c.tokens[1:]), *c[1:]) for n in range(2) for c in contexts], length)
        assert rounded(fills.rows) <= sizes.rows(2, length)


def test_what_playing_takes(capsys: pytest.CaptureFixture[str]) -> None:
    config = agent(*LORA, "--agent-window", "48")
    layout = layout_of(config, 1)
    parts = model_parts(config.model, layout.dtype)
    stages = cut_stages(parts, layout)
    memory = rank_memory(parts, layout, stages, 0)
    rounds = layout.rounds
    assert rounds is not None
    assert memory.making == rounds.device_bytes(parts, layout, stages) + layout.libraries
    assert memory.made == rounds.host_bytes(parts, layout) and memory.made["what was seen"] > 0
    assert dataclasses.replace(memory, making=1e12).total == memory.state.total + 1e12
    plain = dataclasses.replace(layout, rounds=None)
    idle = rank_memory(parts, plain, stages, 0)
    assert round_time(parts, plain, stages, H100) is None and idle.making == 0 and not idle.made
    played = round_time(parts, layout, stages, H100)
    assert played is not None and 0 < played.least < played.most and played.reference == played.scored > 0
    again = layout_of(agent(*LORA, "--agent-window", "48", "--rl-resample", "3"), 1)
    more = round_time(parts, again, stages, H100)
    assert more is not None and (more.least, more.most) == (played.least, 4 * played.most)
    run([*CORE.split(), *AGENT.split(), *LORA, "--agent-window", "48", "--dp", "1"])
    said = capsys.readouterr().out
    assert "episodes of 16 chunks: at most 20 decisions" in said and "predicted step with its playing" in said
    run([*CORE.split(), *AGENT.split(), "--rl-epochs", "3", "--dp", "1"])
    said = capsys.readouterr().out
    assert "before every 3 steps: playing" in said and "the reference in the same pass" in said
    run([*CORE.split(), "--dp", "1"])
    assert "playing" not in capsys.readouterr().out


def test_rows_of_texts_beside_episodes_are_counted(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run's own step: those that are learnt from, and those beside them."""
    flags = (*LORA, "--rl-group-size", "4", "--rl-ce-weight", "0.1", "--rl-ce-samples", "3")
    argv = agent_arguments(words, *flags, "--micro-batch-size", "3", "--global-batch-size", "12")
    trainer = make_trainer(argv)
    layout = layout_of(trainer.config, 1)
    assert isinstance(layout.rounds, Playing) and layout.rounds.episodes.texts(3) == 3
    objective, batches = trainer.objective, trainer._loader(trainer.data, trainer.progress.batches)
    made = objective.experience(trainer, next(iter(batches)))  # type: ignore[attr-defined]
    texts = {int((batch.loss_mask.sum(1) > 0).sum()) for batch in made}
    assert max(texts) == 3 and made[0].tokens.shape[0] <= layout.rows
    sizes = layout.rounds.episodes
    assert layout.rows == dataclasses.replace(sizes, group_texts=0).rows(3, 64) + 3
    run([*CORE.split(), *AGENT.split(), *flags, "--dp", "1"])
    assert "of 128 at most, 2 of them texts beside them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("samples", "group", "each"), [(1, 4, 1), (3, 4, 2), (4, 4, 4), (6, 4, 3), (12, 5, 2), (2, 8, 0)]
)
def test_most_texts_of_samples_that_follow_each_other(samples: int, group: int, each: int) -> None:
    counts = [sum(k % group < each for k in range(first, first + samples)) for first in range(0, 40, samples)]
    assert most_texts(samples, group, each) == max(counts)


def test_the_runs_own_memory_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    config = agent("--agent-memory", "run", "--agent-memory-capacity", "70", "--task-chunk-tokens", "9")
    layout = layout_of(config, 1)
    index = EpisodicIndex(8, 70)
    for number in range(90):
        index.write(torch.full((8,), float(number)), range(9))
    assert layout.rounds is not None and len(index) == 70
    found = layout.rounds.host_bytes(model_parts(config.model, layout.dtype), layout)
    assert found["the run's memory"] == index.nbytes
    run([*CORE.split(), *AGENT.split(), "--agent-memory", "run", "--agent-memory-capacity", "100000000", "--dp", "1"])
    assert "17.60 GB of the run's memory in host memory" in capsys.readouterr().out


def test_frozen_weights_have_no_gradient_to_make_or_send() -> None:
    whole, tuned = (layout_of(one, 4) for one in (config_of(), config_of("--peft", "lora")))
    held, times = [], []
    for config, layout in ((config_of(), whole), (config_of("--peft", "lora"), tuned)):
        parts = model_parts(config.model, layout.dtype)
        stages = cut_stages(parts, layout)
        held.append(gradient_traffic(stage_parameters(parts, stages), layout).reduced)
        times.append(stage_time(parts, layout, stages[0], H100, Efficiency()))
    assert held[1] < held[0] / 2
    assert times[1].backward_weight < times[1].forward and times[0].backward_weight <= times[0].backward_input


@pytest.mark.parametrize(
    ("size", "rank", "memory", "reach"),
    [("1b", 8, 512, 16384), ("4b", 12, 640, 32768), ("40b", 16, 768, 131072), ("200b", 24, 1024, 262144)],
)
def test_presets_have_both_stages(size: str, rank: int, memory: int, reach: int) -> None:
    config = parse_config(["--config", f"cdrmix-reason-{size}", "--stage", "b", "--dry-run"]).config
    model, flags = config.model, config.rl
    assert (model.peft, model.plastic_rank, model.memory_dim, model.memory_stride) == ("plastic", rank, memory, 8)
    assert model.agent_heads and config.training.objective == "agent"
    assert flags.memory_slots * config.tasks.task_chunk_tokens == reach
    sizes = episodes_of(config)
    assert sizes is not None and sizes.decisions <= flags.agent_steps and sizes.rows(1, config.data.seq_length) == 1
