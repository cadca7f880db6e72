"""Queries, keys and values of a mixer, caught as its forward pass makes them."""

from __future__ import annotations

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.nn.relations import Watch, mixer_with_relations
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context

WIDTHS = ("--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2", "--rwkv-head-size", "8")


@pytest.fixture(scope="module")
def model() -> HybridModel:
    flags = (*WIDTHS, "--hybrid-layer-pattern", "R-*-", "--ffn-hidden-size", "16", "--vocab-size", "61")
    ctx = ParallelContext.single()
    made = HybridModel(make_layer_context(parse_config(flags).config.model, ctx))
    initialize_parameters(made, ctx, seed=1)
    return made


@pytest.mark.parametrize(("index", "heads"), [(0, [4, 4, 4]), (1, [4, 2, 2]), (None, [4, 2, 2])])
def test_vectors_of_the_newest_pass(model: HybridModel, index: int | None, heads: list[int]) -> None:
    watch = Watch(mixer_with_relations(model, index, "the model"), training_only=False)
    assert watch.heads == heads
    with torch.no_grad():
        model.logits(torch.zeros(2, 3, dtype=torch.long))
        model.logits(torch.arange(10).view(2, 5))
    vectors = watch.take()
    assert [tuple(one.shape) for one in vectors] == [(2, number, 5, 8) for number in heads]
    assert all(one.isfinite().all() and not torch.equal(one[0], one[1]) for one in vectors)
    with pytest.raises(KeyError):
        watch.take()  # they are forgotten


def test_evaluations_can_be_left_out(model: HybridModel) -> None:
    watch = Watch(mixer_with_relations(model, 1, "the model"), training_only=True)
    with torch.no_grad():
        model.eval().logits(torch.zeros(1, 3, dtype=torch.long))
    model.train()
    with pytest.raises(KeyError):
        watch.take()


def test_a_block_that_is_not_there(model: HybridModel) -> None:
    with pytest.raises(UserError, match="--distill-relation-layer 5: that block of the teacher has no .*0, 1 have"):
        mixer_with_relations(model, 5, "the teacher")
