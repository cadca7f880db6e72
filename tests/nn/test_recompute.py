"""What is computed again is computed once, with the same numbers, also where the backward pass comes in two halves."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.nn import recompute
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import named_specs
from megaforge.parallel.pipeline.split_backward import backward_input
from tests.nn.support import CTX, filled, random

CFG = ModelConfig(
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    rwkv_head_size=8,
    num_experts=4,
    moe_router_topk=2,
    vocab_size=61,
    hybrid_layer_pattern="R-RE*-",
)
PARTS = {"none": 0, "selective": 2, "moe": 1, "full": 2}  # of the second and third block


@dataclass
class Note:
    """How often a part ran again, and its places; it does not keep the part alive."""

    places: list[weakref.ref[recompute._Place]]
    runs: int = 0

    def alive(self) -> int:
        return sum(place() is not None for place in self.places)

    def filled(self) -> int:
        places = [place() for place in self.places]
        return sum(place is not None and place.value is not None for place in places)


class Watched(recompute._Part):
    """Makes a note of every part."""

    made: list[Note] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.note = Note(self._places)
        self.made.append(self.note)

    def run_again(self) -> None:
        self.note.runs += 1
        super().run_again()


def gradients(kind: str, *, split: bool, first: bool = False) -> dict[str, Tensor]:
    """Of every weight and input of the second and third block (``first``: of the whole model), in fp64. In a split
    backward pass, checks what is alive between its halves."""
    Watched.made.clear()
    layers = range(0 if first else 1, 3)
    model = filled(HybridModel(make_layer_context(CFG, CTX, dtype=torch.float64, recompute=kind), layers))
    tokens = torch.arange(12).view(2, 6)
    inputs = [] if first else [random(6, 2, 16, seed=1).requires_grad_(), random(6, 2, 16, seed=2).requires_grad_()]
    received = dict(zip(("x", "v_first"), inputs, strict=False))
    output, _ = model.run_stage(tokens, tokens, torch.ones(2, 6), received=received)
    loss = output.loss_sum + sum(term.sum for term in output.terms.values())
    del output
    if split:
        roots, start = [get_gradient_edge(loss)], [torch.ones_like(loss)]
        del loss
        found, deferred = backward_input(roots, start, inputs, model.parameters())
        if not first and kind in ("full", "moe"):
            assert all(0 < part.filled() < part.alive() for part in Watched.made), "only what weights need stays"
        deferred.run()
        del roots, deferred
    else:
        loss.backward()
        found = [tensor.grad for tensor in inputs]
    result = {spec.name: p.grad for spec, p in named_specs(model) if p.grad is not None}
    return result | {f"input {index}": gradient for index, gradient in enumerate(found)}


@pytest.mark.parametrize("first", [False, True], ids=["later stage", "first stage"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("kind", ["full", "moe", "selective"])
def test_once_and_the_same(monkeypatch: pytest.MonkeyPatch, kind: str, split: bool, first: bool) -> None:
    expected = gradients("none", split=False, first=first)
    monkeypatch.setattr(recompute, "_Part", Watched)
    found = gradients(kind, split=split, first=first)
    assert len(Watched.made) == PARTS[kind] + (first and kind != "moe")
    assert [part.runs for part in Watched.made] == [1] * len(Watched.made)
    assert [part.alive() for part in Watched.made] == [0] * len(Watched.made), "nothing outlives the graph"
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14, msg=name)


def test_a_weight_in_two_places_is_computed_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its second half gradient flows from one place to the other again, through the sine between them."""
    monkeypatch.setattr(recompute, "_Part", Watched)
    Watched.made.clear()
    weight, x = nn.Parameter(random(4, 4)), random(4, 4, seed=1).requires_grad_()
    loss = recompute.recomputed(True, lambda x: ((x @ weight).sin() @ weight).sum(), x)
    _, deferred = backward_input([get_gradient_edge(loss)], [torch.ones_like(loss)], [x], [weight])
    deferred.run()
    assert Watched.made[0].runs == 1
    (expected,) = torch.autograd.grad(((x @ weight).sin() @ weight).sum(), [weight])
    torch.testing.assert_close(weight.grad, expected)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.5).sin()


def test_random_numbers_are_drawn_again() -> None:
    x = random(100).requires_grad_()
    torch.manual_seed(1)
    y = recompute.recomputed(True, Noisy(), x)
    after = torch.rand(())
    y.sum().backward()
    torch.manual_seed(1)
    z = Noisy()(x)
    assert torch.equal(after, torch.rand(())), "the second run leaves the random state alone"
    assert torch.equal(y, z)
    ours, x.grad = x.grad, None
    z.sum().backward()
    assert torch.equal(ours, x.grad)


def test_a_part_that_is_no_function_of_its_inputs_is_an_error() -> None:
    sizes = iter((3, 2))
    y = recompute.recomputed(True, lambda x: x[: next(sizes)].sin().sum(), random(5).requires_grad_())
    with pytest.raises(RuntimeError, match=r"made a tensor of shape \(2,\) where it was \(3,\)"):
        y.backward()
    kept = iter((2, 1))
    y = recompute.recomputed(
        True, lambda x: [x.sin() for _ in range(next(kept))][-1].cos().sum(), random(5).requires_grad_()
    )
    with pytest.raises(RuntimeError, match="kept fewer tensors than at first"):
        y.backward()
