"""BitFit: biases alone change, alike at every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaforge.errors import UserError
from megaforge.parallel.param_spec import named_specs
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, trainer_of
from tests.peft.test_lora import MODEL, SIZES, small_model, train
from tests.training.tiny import arguments, write_dataset

RUN = ("--train-iters", "2", "--fp64", "--lr", "1e-3", "--micro-batch-size", "1", "--global-batch-size", "4")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def flags(prefix: str, *more: str) -> list[str]:
    return arguments(prefix, *MODEL, *SIZES, *RUN, "--add-bias-linear", "--peft", "bitfit", *more)


@pytest.mark.parametrize("layout", [("--tp", "2", "--sp"), ("--pp", "2")])
def test_the_layout_changes_nothing(ranks: RankPool, prefix: str, layout: tuple[str, ...]) -> None:
    compare(ranks.run(2, train, flags(prefix, *layout)), train(flags(prefix)), 1e-10)


def test_biases_alone_change(prefix: str) -> None:
    trainer = trainer_of(flags(prefix))
    before = {spec.name: p.clone() for spec, p in named_specs(trainer.model)}
    trainer.train()
    changed: dict[str, Any] = {s.name: p for s, p in named_specs(trainer.model) if not torch.equal(p, before[s.name])}
    ends = {name.rpartition(".")[2] for name in changed}
    biases = {"bias", "conv_bias", "dt_bias", "w0", "a0", "v0"}
    # A new RWKV-7 layer gives nothing to the stream, so that its own biases have no gradient yet.
    assert "bias" in ends and ends <= biases
    trained = {spec.name.rpartition(".")[2] for spec, p in named_specs(trainer.model) if p.requires_grad}
    assert {"bias", "w0", "a0"} <= trained <= biases
    assert any("qkv.bias" in name for name in changed)


def test_a_model_without_biases_is_refused(prefix: str) -> None:
    with pytest.raises(UserError, match="this model has no biases"):
        small_model(prefix, "--hybrid-layer-pattern", "*-*-", "--peft", "bitfit")
