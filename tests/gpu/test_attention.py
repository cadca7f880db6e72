"""Attention on a GPU: each form against the plain fp64 formula, and which kernel it runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megaforge.kernels.attention import additive_mask, causal_attention, takes_documents
from megaforge.parallel.packed_sequence import PackedSequence
from tests.kernels.test_attention import formula, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTH, HEADS, WIDTH = 256, 8, 64


def inputs(groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LENGTH, WIDTH) for heads in (HEADS, groups, groups, HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def packed() -> PackedSequence:
    start = torch.zeros(2, LENGTH, dtype=torch.bool)
    start[0, [5, 6, 100]] = start[1, 200] = True
    return PackedSequence(2, LENGTH, torch.device("cuda"), start)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("form", ["causal", "mask", "documents"])
def test_forms_agree_with_the_formula(form: str, groups: int, deterministic: bool) -> None:
    *qkv, direction = inputs(groups)
    info = packed()
    ours = [x.bfloat16().cuda().requires_grad_() for x in qkv]
    theirs = [x.detach().cpu().double().requires_grad_() for x in ours]
    assert takes_documents(ours[0])
    mask = info.attention_mask()
    assert mask is not None
    given = {
        "causal": {},
        "mask": {"mask": additive_mask(mask, torch.bfloat16)},
        "documents": {"documents": info.packed_documents()},
    }[form]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        out = causal_attention(*ours, **given)
        found = torch.autograd.grad(out, ours, direction.bfloat16().cuda())
    finally:
        torch.use_deterministic_algorithms(before)
    expected = formula(*theirs, None if form == "causal" else mask.cpu())
    assert relative(out.detach().cpu(), expected.detach()) < 1e-2
    for got, wanted in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        assert relative(got.cpu(), wanted) < 1.5e-2


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("form", ["causal", "mask", "documents"])
def test_no_form_holds_all_scores(form: str, groups: int) -> None:
    """The kernel that does is a softmax of its own."""
    info = packed()
    q, k, v = (x.bfloat16().cuda() for x in inputs(groups)[:3])
    given = {
        "causal": {},
        "mask": {"mask": info.score_mask(torch.bfloat16)},
        "documents": {"documents": info.packed_documents()},
    }[form]
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        causal_attention(q, k, v, **given)
    names = [event.key.lower() for event in seen.key_averages()]
    assert names and not any("softmax" in name for name in names), names
