"""``--objective rlvr`` in plans: what writing answers takes, beside a run that writes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.inference.live import LiveModel
from megaforge.planning.answers import answers_of
from megaforge.planning.continuing import Texts
from megaforge.planning.gpus import GPUS
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.memory import rank_memory
from megaforge.planning.meter import StorageMeter
from megaforge.planning.plan_command import run
from megaforge.planning.round_time import round_time
from megaforge.planning.rounds import rounds_of
from megaforge.planning.stages import ModelParts, StagePart, cut_stages, model_parts
from megaforge.planning.writing import Writing
from megaforge.reasoning.rlvr.conversation import Sizes
from megaforge.reasoning.rlvr.objective import Writing as WritingObjective
from megaforge.reasoning.rlvr.prompts import Prompts
from megaforge.training.trainer import Trainer
from megaforge.verification.dry_run import report, try_ranks
from tests.training.tiny import make_trainer

FLAGS = (
    *("--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "48", "--rwkv-head-size", "8"),
    *("--data-path", "tasks://kv_chunks", "--seq-length", "96", "--device", "cpu", "--num-workers", "0"),
    *("--micro-batch-size", "4", "--global-batch-size", "12", "--train-iters", "1"),
    *("--alerts-off", "throughput", "memory", "disk", "--objective", "rlvr", "--rl-group-size", "4"),
    *("--rl-task-chunks", "2", "--task-chunk-tokens", "9", "--task-window", "18", "--task-questions", "2"),
    *("--rl-max-new-tokens", "6", "--rl-kl", "0", "--rl-rollout-batch-size", "8"),
)
HYBRID = ("--hybrid-layer-pattern", "R-*ERM", "--num-experts", "4", "--mamba-head-dim", "8", "--mamba-state-dim", "8")
DENSE = ("--hybrid-layer-pattern", "R-*-R*")
READING = (
    "--rl-chunk-tokens",
    "7",
    "--rl-memory-tokens",
    "3",
    "--rl-reading-prompt",
    "ask {question} {memory} {chunk}",
)


class Seen:
    """What a run's writing comes to: calls of the model, tokens of prompts, and bytes that are remembered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.prompts = self.state = self.texts = 0
        logits = LiveModel.logits

        def counted(model: LiveModel, tokens: torch.Tensor, state: Any) -> Any:
            found = logits(model, tokens, state)
            if tokens.shape[1] == 1:
                self.steps += 1
                sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in state.contents()}
                assert state.unused_B is not None
                own = sum(sizes.values()) - state.unused_B.nbytes
                self.texts, self.state = max(self.texts, len(tokens)), max(self.state, own)
            else:
                self.prompts += len(tokens)
            return found

        monkeypatch.setattr(LiveModel, "logits", counted)


def planned(trainer: Trainer) -> tuple[ModelParts, PlannedLayout, list[StagePart], Writing]:
    layout = layout_of(trainer.config, 1)
    parts = model_parts(trainer.config.model, layout.dtype)
    assert isinstance(layout.rounds, Writing)
    return parts, layout, list(cut_stages(parts, layout)), layout.rounds


@pytest.mark.parametrize("flags", [DENSE, HYBRID, (*DENSE, *READING)], ids=("dense", "hybrid", "reading"))
def test_the_plan_is_what_a_run_writes(words: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    """Its memory to the byte; steps, prompts and rows are no more than planned, and are all there."""
    trainer = make_trainer([*FLAGS, *flags, "--tokenizer-model", str(words), "--seed", "3"])
    parts, layout, stages, rounds = planned(trainer)
    answers, seen = rounds.answers, Seen(monkeypatch)
    objective = trainer.objective
    assert isinstance(objective, WritingObjective)
    loader = trainer._loader(trainer.data, trainer.progress.batches, 0, objective.look_ahead)
    batches = next(iter(loader))
    meter = StorageMeter(trainer.model.parameters())
    with meter, torch.no_grad():
        spoken = objective.written(trainer, list(range(12)))
    assert meter.peak <= rounds.device_bytes(parts, layout, stages) <= 8 * meter.peak
    assert seen.texts == 8 and seen.state == rounds.state_bytes(parts, layout, stages)
    most = sum(answers.steps(turn) for turn in range(answers.turns)) * len(answers.batches(12))
    assert most / 2 < seen.steps <= most
    assert seen.prompts <= sum(answers.prompts(n, turn) for n in answers.batches(12) for turn in range(answers.turns))
    turns = [turn for one in spoken for turn in one.turns]
    assert max(len(turn.tokens) for turn in turns) <= answers.longest
    assert len(turns) == 12 * answers.turns
    sizes = Sizes.of(trainer.config.rollout, Prompts(trainer.config).tokenizer)
    assert answers.longest == sizes.longest(Prompts(trainer.config).of(0).asked)
    monkeypatch.undo()
    made = objective.experience(trainer, batches)
    assert len(made) == layout.micro_batches and made[0].tokens.shape[0] <= layout.rows
    fields = [getattr(made[0], field.name) for field in dataclasses.fields(made[0])]
    tensors = [x for x in fields if isinstance(x, torch.Tensor) and x.dim() == 2]
    tensors += [x for name, x in made[0].extras.items() if name != "told"]
    assert sum(x.nbytes for x in tensors) * layout.rows / made[0].tokens.shape[0] * len(made) == pytest.approx(
        rounds.host_bytes(parts, layout)["what is learnt from"]
    )


def test_writing_in_plans_and_dry_runs(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "cdrmix-test", "--vocab-size", "500", *FLAGS, "--tokenizer-model", str(words)]
    flags[flags.index("--device") : flags.index("--device") + 2] = ["--tp", "2", "--pp", "2", "--sp", "--ep", "2"]
    config = parse_config([*flags, "--peft", "lora", "--lora-dropout", "0", "--dry-run"]).config
    found, ranks = try_ranks(config, 4)
    assert found.rounds is not None and "writing before a step, by the plan: 0.0" in report(config, found, ranks)
    parts = model_parts(config.model, found.dtype)
    stages = cut_stages(parts, found)
    for rank in ranks:
        assert rank.making == found.rounds.device_bytes(parts, found, rank.stages) > 0
        assert rank.planned_activations >= 0.99 * rank.activations
    memory = rank_memory(parts, found, stages, 1)
    assert memory.making == found.rounds.device_bytes(parts, found, [stages[1]]) + found.libraries
    assert dataclasses.replace(memory, making=1e12).total == memory.state.total + 1e12
    taken = round_time(parts, found, stages, GPUS["h100-80g"])
    assert taken is not None and 0 < taken.least < taken.most and taken.reference == taken.scored > 0
    run([*flags, "--dp", "1"])
    said = capsys.readouterr().out
    assert "answers: at most 26 tokens of prompt and answer" in said and "(1 to 6 tokens of each)" in said
    assert "writing: " in said and "no reference" in said and "predicted step with its writing" in said
    run([*flags, "--dp", "1", "--rl-resample", "2", "--rl-epochs", "2", *READING])
    said = capsys.readouterr().out
    assert (
        "answers in 4 turns" in said and "(4 to 15 tokens of each, 3 times)" in said and "before every 2 steps" in said
    )


def test_the_weights_that_a_run_began_with_are_counted(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where all are trained, as masters are: else the dry run raises."""
    flags = ["--config", "cdrmix-test", "--vocab-size", "500", *FLAGS, "--tokenizer-model", str(words), "--bf16"]
    flags += ["--dry-run-ranks", "0", "--dry-run", "--ep", "2", "--zero", "1"]
    flags += ["--micro-batch-size", "3"]
    held = []
    for more in (("--rl-kl", "0"), ("--rl-kl", "0", "--ema-decay", "0.9"), ("--rl-kl", "0.1")):
        found, [rank] = try_ranks(parse_config([*flags, *more]).config, 2)
        assert found.rounds is not None and found.rounds.has_reference == ("0.1" in more)
        held.append(rank.state)
    assert held[0].optimizer < held[1].optimizer and held[1] == held[2], "as large as an average of the weights"
    run([*flags[: flags.index("--dry-run-ranks")], "--rl-kl", "0.1", "--dp", "1"])
    said = capsys.readouterr().out
    assert "s, reference 0." in said and "no reference" not in said


def test_more_tokens_take_more_time_and_memory(words: Path) -> None:
    flags = [*FLAGS, *DENSE, "--tokenizer-model", str(words), "--seq-length", "4096", "--vocab-size", "100"]
    gpu = GPUS["h100-80g"]

    def taken(*more: str) -> tuple[float, float, float]:
        config = parse_config([*flags, *more]).config
        layout = layout_of(config, 1)
        parts = model_parts(config.model, layout.dtype)
        stages = cut_stages(parts, layout)
        seconds = round_time(parts, layout, stages, gpu)
        assert seconds is not None and layout.rounds is not None
        return seconds.least, seconds.most, layout.rounds.device_bytes(parts, layout, stages)

    short, long = taken(), taken("--rl-max-new-tokens", "3000")
    assert short[0] == long[0] and long[1] > 100 * short[1] and long[2] > 2 * short[2]
    again = taken("--rl-resample", "1")
    assert again[0] == short[0] and again[1] == 2 * short[1] and again[2] == short[2]
    one = taken("--rl-rollout-batch-size", "1")
    assert one[1] > 2 * short[1] and one[2] < short[2], "weights are read for each"


def test_questions_of_a_file_may_be_as_long_as_a_row(tmp_path: Path, words: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "ask k1", "answer": "v1"}\n', encoding="utf-8")
    flags = [*FLAGS, "--tokenizer-model", str(words)]
    flags[flags.index("tasks://kv_chunks")] = f"questions://{file}"
    cut = flags.index("--rl-task-chunks")
    config = parse_config([*flags[:cut], *flags[cut + 8 :], *DENSE]).config
    answers, rounds = answers_of(config), rounds_of(config)
    assert (answers.prompt, answers.longest, answers.rows(4, 96)) == (90, 96, 4)
    layout = PlannedLayout(1, micro_batch_size=4, global_batch_size=12, sequence_length=96, rounds=rounds)
    assert isinstance(rounds, Writing) and rounds.texts(layout) == Texts(rows=3, piece=90, places=96, length=96)
    assert rounds_of(parse_config(["--config", "cdrmix-test"]).config) is None
