"""A model's logical tensors: each element of each parameter belongs to exactly one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.attention_models import pieces
from megaforge.checkpoint.packed_file import open_quantized
from megaforge.checkpoint.published import architecture
from megaforge.checkpoint.sources import TensorSource
from megaforge.config.schema import config_to_dict
from tests.training.tiny import dense_arguments, make_config


class Described(TensorSource):
    """A checkpoint of which only its configuration is known."""

    def __init__(self, *flags: str) -> None:
        config = make_config(dense_arguments("unused", "*-*-", "--vocab-size", "61", *flags))
        self.path, self.meta = Path("run"), {"config": json.loads(json.dumps(config_to_dict(config)))}

    def read(self, key: str, box: Any = None) -> torch.Tensor:
        raise AssertionError("nothing is read")


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (("--activation", "swiglu", "--sub-norm", "--quantize-weights", "ternary"), "bitnet"),
        (("--activation", "swiglu", "--add-bias-linear", "--num-query-groups", "2"), "llama"),
        (("--untie-embeddings-and-output-weights",), "arcee"),
    ],
)
def test_every_row_belongs_to_one_tensor(flags: tuple[str, ...], kind: str) -> None:
    model = open_quantized(Described(*flags))
    assert architecture(model, "--to hf").name == kind
    rows = Counter[str]()
    for piece in pieces(model.config.model, model.specs):
        first, end = piece.rows or (0, model.specs[piece.name].shape[0])
        assert first == rows[piece.name]
        rows[piece.name] = end
    padded = {name: 61 for name in ("embedding.weight", "head.weight") if name in model.specs}
    assert dict(rows) == {name: spec.shape[0] for name, spec in model.specs.items()} | padded
    assert len({(piece.role, piece.layer, piece.is_bias) for piece in pieces(model.config.model, model.specs)}) == len(
        list(pieces(model.config.model, model.specs))
    )
