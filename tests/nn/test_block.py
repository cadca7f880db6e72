"""A block is its layers' updates, one after the other, and remembers what each of them does."""

from __future__ import annotations

import torch

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of
from megaforge.nn.block import make_block
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters


def test_a_block_adds_what_its_layers_make() -> None:
    cfg = ModelConfig(vocab_size=16, hidden_size=8, num_attention_heads=2, hybrid_layer_pattern="*-*", num_experts=2)
    ctx = ParallelContext.single()
    blocks = [make_block(make_layer_context(cfg, ctx, dtype=torch.float64), kind) for kind in blocks_of(cfg)]
    info, x = PackedSequence(2, 5, torch.device("cpu")), torch.randn(5, 2, 8, dtype=torch.float64)
    for block in blocks:
        name_parameters(block)
        initialize_parameters(block, ctx, 3)
        expected = x
        for norm, module in block.sublayers:
            expected = expected + module(norm(expected), info).update
        got, carried, losses = block(x, info)
        torch.testing.assert_close(got, expected)
        assert not carried and not losses
    assert [type(state).__name__ for block in blocks for state in block.new_states()] == ["KVCache", "NoneType"] + [
        "KVCache"
    ]
