"""The grokking example: its equations, and its arms in small."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters, named_specs, spec_of
from tests.end_to_end.launch import REPO, run
from tests.training.tiny import make_config


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"grokking_{name}", REPO / "examples" / "grokking" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modular() -> ModuleType:
    return load("modular")


def equations(view: object, numbers: range) -> list[tuple[int, ...]]:
    found = []
    for k in numbers:
        tokens, marks = np.full(5, -1), np.zeros(5, np.bool_)
        assert view.fill(k, tokens, marks) == 4  # type: ignore[attr-defined]
        assert marks.tolist() == [True] * 4 + [False], "only the answer counts"
        found.append(tuple(tokens.tolist()))
    return found


def test_each_equation_is_right_and_in_one_half(modular: ModuleType) -> None:
    data = modular.ModularMultiplication(11, seed=3, batch=11)
    held_out = data.validation()
    assert len(held_out) == 55
    first, second = equations(data, range(55)), equations(data, range(55, 110))
    others = equations(held_out, range(55))
    assert set(first) == set(second) and first != second, "each epoch has an order of its own"
    assert len({*first, *others}) == 110
    for x, times, y, equals, z in first + others:
        assert (times, equals, z) == (12, 11, x * y % 11) and 0 <= x < 11 and 1 <= y < 11
    assert equations(modular.ModularMultiplication(11, seed=3, batch=11), range(55, 110)) == second
    assert equations(modular.ModularMultiplication(11, seed=4, batch=11), range(55)) != first
    assert held_out.fill(55, np.zeros(5, np.int64), np.zeros(5, np.bool_)) == 0


def test_an_epoch_ends_with_what_is_left(modular: ModuleType) -> None:
    """55 equations in batches of 16 are 16, 16, 16 and 7, as published."""
    data = modular.ModularMultiplication(11, seed=3, batch=16)
    for epoch in range(2):
        assert len(set(equations(data, range(64 * epoch, 64 * epoch + 55)))) == 55
        for k in range(64 * epoch + 55, 64 * epoch + 64):
            tokens, marks = np.full(5, -1), np.zeros(5, np.bool_)
            assert data.fill(k, tokens, marks) == 0 and not tokens.any(), "an empty sample"


def test_initial_weights_are_those_of_torchs_modules(modular: ModuleType) -> None:
    flags = ("--hidden-size", "32", "--num-attention-heads", "2", "--layer-schedule", "attention", "--ffn", "dense")
    flags += ("--activation", "gelu_exact", "--normalization", "layernorm", "--add-bias-linear", "--vocab-size", "11")
    flags += ("--make-vocab-size-divisible-by", "1")
    config = make_config([*flags, "--num-layers", "1", "--untie-embeddings-and-output-weights"])
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(config.model, ctx))
    modular.as_published(model, ctx)
    name_parameters(model)
    initialize_parameters(model, ctx, 0)
    attention, ffn = torch.nn.MultiheadAttention(32, 2), torch.nn.Linear(32, 128)
    block = model.blocks[0]
    published = [
        (model.embedding.weight, torch.nn.Embedding(11, 32).weight),
        (model.embedding.positions.weight, torch.nn.Embedding(4, 32).weight),
        (block.mixer.qkv.weight, attention.in_proj_weight),
        (block.mixer.qkv.bias, attention.in_proj_bias),
        (block.mixer.output.weight, attention.out_proj.weight),
        (block.mixer.output.bias, attention.out_proj.bias),
        (block.ffn.up.weight, ffn.weight),
        (block.ffn.up.bias, ffn.bias),
        (block.ffn.down.weight, torch.nn.Linear(128, 32).weight),
        (block.ffn.down.bias, torch.nn.Linear(128, 32).bias),
        (model.head.weight, torch.nn.Linear(32, 11).weight),
    ]
    for ours, theirs in published:
        assert spec_of(ours).weight_decay and ours.shape == theirs.shape
        if len(theirs.shape) == 2 and theirs is not published[0][1] and theirs is not published[1][1]:
            torch.testing.assert_close(ours.abs().max(), theirs.abs().max(), rtol=0.05, atol=0)
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.3, atol=0)
    assert all(spec_of(parameter).weight_decay for parameter in model.parameters())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data-path", "modular://9"), "odd prime"),
        (("--data-path", "modular://x"), "odd prime"),
        (("--data-path", "modular://97", "--seq-length", "8"), "--seq-length 8"),
        (("--data-path", "modular://97", "--seq-length", "4", "--vocab-size", "98"), "has 99 tokens"),
        (("--data-path", "modular://97", "--seq-length", "4"), "--no-reset-at-document-boundaries"),
    ],
)
def test_what_the_task_cannot_use_is_refused(modular: ModuleType, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        modular.check(make_config(["--vocab-size", "99", *more]))


def test_the_published_stream_is_normed_itself(modular: ModuleType) -> None:
    flags = ("--hidden-size", "32", "--num-attention-heads", "2", "--layer-schedule", "attention", "--ffn", "dense")
    config = make_config([*flags, "--num-layers", "2", "--normalization", "layernorm", "--vocab-size", "11", "--fp64"])
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(config.model, ctx, dtype=torch.float64))
    modular.norm_stream(model)
    initialize_parameters(model, ctx, 0)
    block, x = model.blocks[0], torch.randn(4, 3, 32, dtype=torch.float64) * 5
    block.stream_norm.weight.data.uniform_(0.5, 2)
    info = PackedSequence(3, 4, x.device)
    normed = F.layer_norm(x, (32,), block.stream_norm.weight, block.stream_norm.bias, config.model.norm_epsilon)
    middle = normed + block.mixer(normed, info)[0]
    expected = middle + block.ffn(block.ffn_norm(middle), info)[0]
    torch.testing.assert_close(block(x, info)[0], expected, rtol=1e-12, atol=1e-12)
    names = [spec.name for spec, _ in named_specs(model)]
    assert len(names) == len(set(names)), "every norm is there once"


def test_arms_are_trained_once_listed_and_drawn(tmp_path: Path) -> None:
    line = ("examples/grokking/arms.py", "--small", "--arms", "ma", "--output", str(tmp_path))
    first = run(1, *line)
    assert first.status == 0, first.err
    assert "--grokfast ma" in first.out and "95% at" in first.out
    assert (tmp_path / "curves.png").stat().st_size > 1000
    again = run(1, *line)
    assert "pretrain_cdrmix.py" not in again.out and "95% at" in again.out


def test_arms_of_another_command_are_not_mixed_in(tmp_path: Path) -> None:
    arms = load("arms")
    flags = arms.parse_arguments(["--output", str(tmp_path), "--arms", "ema"])
    line = arms.line_of("ema", 0, small=True)
    (tmp_path / "ema.0.done").write_text(" ".join(line))
    with pytest.raises(UserError, match="trained there by another command: pretrain_cdrmix.py .* modular://23"):
        arms.train(flags)
    with pytest.raises(UserError, match="nothing generalises with --small"):
        arms.parse_arguments(["--output", str(tmp_path), "--small", "--check"])


def test_what_the_curves_must_show() -> None:
    arms = load("arms")
    held = {("none", 0): {800: 0.01, 1600: 0.05}, ("none-0.01", 0): {1600: 0.02}, ("adamw", 0): {1600: 0.3}}
    held |= {("ema", 0): {800: 0.2, 1550: 0.96, 1600: 0.94}, ("ma", 0): {1600: 0.95}}
    assert arms.failures(held) == []
    [late] = arms.failures({**held, ("ma", 1): {1600: 0.949}})
    assert late == "Adam, L2 of 0.01, --grokfast ma, seed 1: 94.9% of the held-out equations, below 95%"
    [early] = arms.failures({**held, ("none-0.01", 1): {1600: 0.1}})
    assert early.startswith("Adam, L2 of 0.01, no filter, seed 1: 10.0%")
