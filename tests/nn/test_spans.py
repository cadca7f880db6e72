"""``--sequence-checkpoint``: recurrences in spans give the gradients of whole ones, and keep a state a span."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.nn.spans import in_spans
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import named_specs
from tests.nn.support import CTX, filled

CFG = ModelConfig(
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    rwkv_head_size=8,
    num_experts=4,
    moe_router_topk=2,
    mamba_head_dim=8,
    mamba_num_groups=2,
    mamba_state_dim=4,
    vocab_size=61,
    hybrid_layer_pattern="R-ME*-OER-",
)


def found(
    span: int | None, length: int, recompute: str = "none", dtype: torch.dtype = torch.float64, documents: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores, and the gradient of every weight."""
    layer = make_layer_context(CFG, CTX, dtype=dtype, recompute=recompute, sequence_checkpoint=span)
    model = filled(HybridModel(layer))
    tokens = torch.arange(2 * length).view(2, length) * 7 % 61
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, ::19] = starts[1, length // 2] = True
    out = model(tokens, tokens.roll(-1, 1), torch.ones(2, length), starts if documents else None)
    (out.loss_sum + sum(term.sum for term in out.terms.values())).backward()
    return out.losses_SB.detach(), {spec.name: p.grad.clone() for spec, p in named_specs(model) if p.grad is not None}


@pytest.mark.parametrize("length", [1, 3, 16, 17, 70])
@pytest.mark.parametrize(("span", "recompute"), [(16, "none"), (16, "selective"), (32, "full")])
def test_gradients_are_those_of_whole_sequences(length: int, span: int, recompute: str) -> None:
    """Several spans and documents that begin within them, at their ends, or not at all; the last span of one token."""
    expected_losses, expected = found(None, length)
    losses, gradients = found(span, length, recompute)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max()) or 1.0
        assert float((gradient - expected[name]).abs().max()) <= 1e-11 * scale, name


def test_one_document_and_fp32() -> None:
    _, expected = found(None, 70, documents=False)
    _, gradients = found(16, 70, dtype=torch.float32, documents=False)
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max()) or 1.0
        assert float((gradient - expected[name]).abs().max()) <= 2e-3 * scale, name


def test_without_gradients_there_is_one_span() -> None:
    calls = []

    def step(tokens: tuple[Any, ...], state: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        calls.append(len(tokens[0]))
        total = tokens[0].cumsum(0) + (0 if state[0] is None else state[0])
        return (total,), (total[-1],)

    x = torch.arange(10.0, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        assert in_spans(step, 4, (x, None), (None,))[0].tolist() == x.cumsum(0).tolist() and calls == [10]
    calls.clear()
    [made] = in_spans(step, 4, (x, None), (None,))
    assert made.tolist() == x.cumsum(0).tolist() and calls == [4, 4, 2]
    (made * made.detach()).sum().backward()
    assert x.grad is not None and x.grad.tolist() == x.detach().cumsum(0).flip(0).cumsum(0).flip(0).tolist()


@pytest.mark.parametrize("pattern", ["R-", "M-"])
def test_a_state_a_span_is_kept_instead_of_what_lies_between(pattern: str) -> None:
    """Bytes that the graph holds behind a forward pass: fewer than without, and by a state a span more than none."""
    cfg = dataclasses.replace(CFG, hybrid_layer_pattern=pattern)

    def kept(span: int | None) -> int:
        model = filled(HybridModel(make_layer_context(cfg, CTX, sequence_checkpoint=span)))
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = torch.zeros(1, 256, dtype=torch.int64)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(tokens, tokens, torch.ones(1, 256))
        del out
        return sum(storages.values())

    whole, rare, often = kept(None), kept(128), kept(16)
    state = 16 * 8 * 4 if pattern == "R-" else 32 * 4 * 4
    assert rare < 0.95 * whole and often - rare >= (16 - 2) * state
