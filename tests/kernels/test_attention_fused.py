"""Attention on a whole projection against rotation and attention written out in fp64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.attention.fused import Turns, fused_attention, takes_fused
from megaforge.kernels.attention.reference import causal_attention_reference as formula
from megaforge.kernels.attention.segments import documents_of, segments_of, whole
from megaforge.kernels.pointwise.reference import apply_rotary_reference
from tests.kernels.test_attention_native import MOST, TYPES, error, ids_of, isa, mask_of

__all__ = ["isa"]
pytestmark = pytest.mark.skipif(
    not takes_fused(torch.empty(1, 1, 3, 1)), reason="the compiled attention is not built, or before this operator"
)
BATCH, LENGTHS = 2, (1, 16, 17, 66)
LENGTH = sum(LENGTHS)


def inputs(heads: int, groups: int, width: int, half: int, apart: bool) -> tuple[list[Tensor], Turns | None]:
    """[fused, value where it is apart, direction] and angles, of fp32."""
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int) -> Tensor:
        return torch.randn(LENGTH, BATCH, *shape, generator=generator)

    given = [random(heads + (1 if apart else 2) * groups, width), *([random(groups, width)] if apart else [])]
    angles = random(half).double() * 100
    return [*given, random(heads, width)], Turns(angles.cos().float(), angles.sin().float()) if half else None


def exact(given: list[Tensor], turns: Turns | None, heads: int, groups: int, mask: Tensor) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in given[:-1]]
    query, key, *rest = leaves[0].split((heads, groups, *([groups] if len(leaves) == 1 else [])), dim=2)
    if turns is not None:
        cos, sin = (x.double().unsqueeze(2) for x in turns)
        query, key = apply_rotary_reference(query, cos, sin), apply_rotary_reference(key, cos, sin)
    out = formula(*(x.permute(1, 2, 0, 3) for x in (query, key, *rest, *leaves[1:])), mask).permute(2, 0, 1, 3)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[-1].double())]


def results(given: list[Tensor], turns: Turns | None, heads: int, segments: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given[:-1]]
    out = fused_attention(leaves[0], leaves[1] if len(leaves) > 1 else None, turns, segments, heads)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[-1])]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "width", "half", "apart"),
    [(4, 2, 64, 32, False), (2, 1, 20, 7, True), (2, 2, 48, 0, False), (1, 1, 128, 20, True)],
)
def test_values_and_gradients(
    isa: str, dtype: torch.dtype, heads: int, groups: int, width: int, half: int, apart: bool
) -> None:
    given, turns = inputs(heads, groups, width, half, apart)
    given, ids = [x.to(dtype) for x in given], ids_of(LENGTHS)
    places = range(LENGTH)
    got = results(given, turns, heads, segments_of(documents_of(ids), places, places))
    found = [error(x, y) for x, y in zip(got, exact(given, turns, heads, groups, mask_of(ids)), strict=True)]
    # Turned queries and keys are rounded to bf16, too.
    more = 1.5 if dtype == torch.bfloat16 else 1.0
    assert found[0] <= MOST[dtype][0] * more and max(found[1:]) <= MOST[dtype][1] * more, found
    assert all(x.dtype == dtype for x in got)


def test_the_same_bits_at_any_number_of_threads_and_from_views() -> None:
    given, turns = inputs(4, 2, 64, 32, False)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(results(given, turns, 4, whole(BATCH, LENGTH)))
    finally:
        torch.set_num_threads(threads)
    wide = torch.cat([given[0], given[0]], dim=2)[:, :, :8]
    found.append(results([wide, given[1]], turns, 4, whole(BATCH, LENGTH)))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_what_nobody_sees_has_zeros() -> None:
    given, turns = inputs(2, 1, 16, 8, False)
    out, grad = results(given, turns, 2, torch.tensor([[0, 10, 5, 10, 5, 0]]))
    seen = torch.zeros(LENGTH, BATCH, dtype=torch.bool)
    seen[10:15, 0] = True
    assert out[seen].all() and not out[~seen].any() and not grad[~seen].any() and grad[10, 0].any()


def test_what_does_not_fit() -> None:
    (fused, _), turns = inputs(2, 1, 16, 8, False)
    assert turns is not None
    one = whole(BATCH, LENGTH)
    for bad, why in (
        (lambda: fused_attention(fused[:, :, :3], None, turns, one, 2), "do not go with"),
        (lambda: fused_attention(fused, fused, turns, one, 4), "do not go with"),
        (lambda: fused_attention(fused, None, Turns(turns.cos.double(), turns.sin), one, 2), "fp32"),
        (lambda: fused_attention(fused, None, Turns(turns.cos[1:], turns.sin[1:]), one, 2), "fp32"),
    ):
        with pytest.raises(RuntimeError, match=why):
            bad()
