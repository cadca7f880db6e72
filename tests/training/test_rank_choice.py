"""Ranks by gradients: the fewest singular values, the same at every layout, kept by a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.config.rank_config import RankConfig
from megaforge.training.rank_choice import enough
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.peft.test_adapter_files import train
from tests.peft.test_lora import MODEL, SIZES
from tests.training.tiny import arguments, write_dataset

RUN = ("--train-iters", "1", "--fp64", "--micro-batch-size", "1", "--global-batch-size", "4")
CHOOSE = ("--peft", "lora", "--lora-rank", "6", "--lora-rank-steps", "2", "--lora-rank-energy", "0.7")


@pytest.mark.parametrize(
    ("squares", "energy", "rank"),
    [
        ([4.0, 3.0, 2.0, 1.0], 0.7, 2),
        ([4.0, 3.0, 2.0, 1.0], 0.71, 3),
        ([4.0, 3.0, 2.0, 1.0], 1.0, 4),
        ([1.0], 0.5, 1),
        ([0.0, 0.0], 0.9, 1),
        ([1.0, 0.0, 0.0], 1.0, 1),
    ],
)
def test_the_fewest_that_hold_so_much(squares: list[float], energy: float, rank: int) -> None:
    assert enough(torch.tensor(squares, dtype=torch.float64), energy) == rank


def chosen(argv: list[str]) -> tuple[str, ...]:
    return trainer_of(argv).config.model.lora_rank_pattern


def test_the_layout_changes_no_rank(ranks: RankPool, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "train_text_document")
    flags = arguments(data, *MODEL, *SIZES, *RUN)
    train([*flags, "--save", str(tmp_path / "base")])
    line = [*flags, *CHOOSE, "--pretrained-checkpoint", str(tmp_path / "base")]
    trainer = trainer_of([*line, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")])
    pattern = trainer.config.model.lora_rank_pattern
    given = {name: int(rank) for name, _, rank in (one.rpartition("=") for one in pattern)}
    for path in ("layers.1.mixer.qkv.q", "layers.1.mixer.output", "layers.0.ffn.up.gate", "layers.0.mixer.key"):
        assert 1 <= given[path] <= 6
    assert len(set(given.values())) > 1
    part = trainer.model.get_parameter("layers.1.mixer.qkv.lora.q_A")
    assert len(part) == given["layers.1.mixer.qkv.q"]
    for layout in (("--tp", "2", "--sp"), ("--ep", "2", "--zero", "1"), ("--pp", "2")):
        assert set(ranks.run(2, chosen, [*line, *layout])) == {pattern}
    trainer.train()
    again = [*line, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--lora-rank-steps", "1"]
    assert chosen(again) == pattern
    assert RankConfig().lora_rank_steps == 0
