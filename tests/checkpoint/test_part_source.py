"""Parameters put together from the tensors of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.checkpoint.architectures.base import Part
from megaforge.checkpoint.part_source import PartSource, check_parts
from megaforge.errors import UserError
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.param_spec import ParamSpec

THEIRS = {"q": torch.arange(8.0).view(4, 2), "k": -torch.arange(4.0).view(2, 2), "low": torch.arange(6.0).view(3, 2)}
PARTS = [
    Part("q", "qkv", ((0, 4), (0, 2)), (4, 2)),
    Part("k", "qkv", ((4, 6), (0, 2)), (2, 2)),
    Part("low", "lora", ((0, 2), (0, 3)), (3, 2), transposed=True),
]


def test_any_box_of_a_parameter() -> None:
    specs = {name: ParamSpec(name, shape, Constant(0.0)) for name, shape in (("qkv", (8, 2)), ("lora", (2, 3)))}
    source = PartSource(Path("x"), {}, specs, PARTS, lambda part: THEIRS[part.theirs].bfloat16())
    whole = torch.cat([THEIRS["q"], THEIRS["k"], torch.zeros(2, 2)])
    assert torch.equal(source.read("qkv"), whole) and source.read("qkv").dtype == torch.float32
    assert torch.equal(source.read("qkv", ((3, 7), (1, 2))), whole[3:7, 1:])
    assert torch.equal(source.read("lora"), THEIRS["low"].t())
    assert torch.equal(source.read("lora", ((1, 2), (0, 2))), THEIRS["low"].t()[1:, :2])
    for part in PARTS:
        assert torch.equal(part.to_theirs(part.to_ours(THEIRS[part.theirs])), THEIRS[part.theirs])


def test_what_does_not_fit_is_named() -> None:
    there = {name: tuple(value.shape) for name, value in THEIRS.items()}
    check_parts(PARTS, there | {"x.inv_freq": (3,)}, "dir", (".inv_freq",))
    check_parts(PARTS, there | {"q": (1, 4, 2)}, "dir")  # sizes of 1 do not count
    many = [Part(f"w{i}", "w", ((0, 1),), (1,)) for i in range(7)]
    for parts, found, message in (
        (PARTS, {"q": (4, 2)}, r"dir: 2 weights \(k, low\) are missing"),
        (many, {}, r"7 weights \(w0, w1, w2, w3, w4 and 2 more\) are missing"),
        (
            many,
            {f"w{i}": (2,) for i in range(7)},
            r"w4 has the shape \(2,\), which should be \(1,\) \(2 more do not fit",
        ),
        (PARTS, there | {"moba": (1,)}, "the tensor moba is of a part of the model that we do not have"),
    ):
        with pytest.raises(UserError, match=message):
            check_parts(parts, found, "dir")
