"""Learned positions: a table, and what does not fit into it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.flops import active_matmul_parameters
from megaforge.models.hybrid import HybridModel
from megaforge.nn.position_table import PositionTable
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import named_specs
from tests.nn.support import assert_agrees, filled, layer_context, random

SHAPE = {"hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8, "vocab_size": 16}
LEARNED = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 6}


def config(**changes: object) -> ModelConfig:
    return ModelConfig(**{**SHAPE, "hybrid_layer_pattern": "*-", **LEARNED, **changes})  # type: ignore[arg-type]


def test_positions_within_documents() -> None:
    start = torch.zeros(2, 6, dtype=torch.bool)
    start[0, 4] = start[1, 1] = start[1, 2] = True
    info = PackedSequence(2, 6, torch.device("cpu"), start)
    table = filled(PositionTable(layer_context(config())), "p")

    def oracle(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        places = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 0, 0, 1, 2, 3]])
        return x + F.one_hot(places.t(), 6).double() @ w["p.weight"]

    assert_agrees(table, lambda x: table(x, info), oracle, random(6, 2, 8))


def test_what_is_longer_is_refused() -> None:
    model = filled(HybridModel(layer_context(config())))
    with pytest.raises(UserError, match="7 tokens in a sequence: the model has positions for 6"):
        model.logits(torch.zeros(1, 7, dtype=torch.long))
    state = model.new_state()
    model.logits(torch.zeros(1, 5, dtype=torch.long), state=state)
    model.logits(torch.zeros(1, 1, dtype=torch.long), state=state)
    with pytest.raises(UserError, match="positions for 6"):
        model.logits(torch.zeros(1, 1, dtype=torch.long), state=state)


def test_the_number_of_positions_is_needed() -> None:
    with pytest.raises(UserError, match="add --max-position-embeddings N"):
        config(max_position_embeddings=None).validate()


def test_a_table_multiplies_nothing() -> None:
    learned, none = (HybridModel(layer_context(config(**more))) for more in ({}, {"position_embedding_type": "none"}))
    assert active_matmul_parameters(learned) == active_matmul_parameters(none)


def test_the_embedding_has_a_norm_only_beside_rwkv() -> None:
    for pattern, normed in (("*-", False), ("R-*-", True)):
        cfg = config(hybrid_layer_pattern=pattern, normalization="layernorm", rwkv_head_size=8)
        names = {spec.name for spec, _ in named_specs(HybridModel(layer_context(cfg)))}
        assert ("embedding_norm.weight" in names) == normed and "positions.weight" in names


def test_a_tied_embedding_with_its_own_scale() -> None:
    for bound, expected in ((True, 4 / 512), (False, 0.02)):
        cfg = config(hidden_size=512, vocab_size=512, bound_tied_embedding=bound)
        [spec] = [spec for spec, _ in named_specs(HybridModel(layer_context(cfg))) if spec.name == "embedding.weight"]
        values = spec.init.fill(3, spec.name, spec.shape, ((0, 512), (0, 512)))
        assert abs(float(values.std()) / expected - 1) < 0.02
