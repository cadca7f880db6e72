"""Attention on a GPU: each form against the plain fp64 formula, and which kernel it runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megaforge.kernels.attention import blocks, causal_attention, form_for, varlen
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
@pytest.mark.parametrize("form", ["causal", "documents", "blocks"])
def test_forms_agree_with_the_formula(form: str, groups: int, deterministic: bool) -> None:
    *qkv, direction = inputs(groups)
    info = packed()
    dtype = torch.float32 if form == "blocks" else torch.bfloat16
    ours = [x.to(dtype).cuda().requires_grad_() for x in qkv]
    theirs = [x.detach().cpu().double().requires_grad_() for x in ours]
    segments = None if form == "causal" else info.segments(range(LENGTH), range(LENGTH))
    assert segments is None or form_for(ours[0], ours[1], segments) is (blocks if form == "blocks" else varlen)
    mask = info.attention_mask()
    assert mask is not None
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        out = causal_attention(*ours, segments)
        found = torch.autograd.grad(out, ours, direction.to(dtype).cuda())
    finally:
        torch.use_deterministic_algorithms(before)
    expected = formula(*theirs, None if form == "causal" else mask.cpu())
    assert relative(out.detach().cpu(), expected.detach()) < 1e-2
    for got, wanted in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        assert relative(got.cpu(), wanted) < 1.5e-2


@pytest.mark.parametrize("groups", [8, 2])
def test_parts_as_a_ring_has_them(groups: int) -> None:
    """Two halves of the keys, put together by their log-sum-exp, and their gradients: flash against blocks."""
    *qkv, direction = (x.bfloat16().cuda() for x in inputs(groups))
    info, half = packed(), LENGTH // 2
    rows = range(half, LENGTH)
    query, grad = (x[:, :, half:] for x in (qkv[0], direction))
    results = []
    for form in (varlen, blocks):
        parts = []
        for keys in (rows, range(half)):
            kv, segments = [x[:, :, keys.start : keys.stop] for x in qkv[1:]], info.segments(rows, keys)
            assert varlen.takes(query, kv[0], segments)
            parts.append((kv, segments, *form.attention_with_lse(query, *kv, segments)))
        lse = torch.logaddexp(parts[0][3], parts[1][3])
        out = sum(o * (own - lse).exp().unsqueeze(-1) for *_, o, own in parts)
        grads = [form.attention_gradients(grad, query, *kv, out, lse, segments) for kv, segments, *_ in parts]
        results.append([out, lse, *(x for one in grads for x in one)])
    for got, wanted in zip(*results, strict=True):
        assert relative(got.cpu(), wanted.double().cpu()) < 1.5e-2


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("form", ["causal", "documents"])
def test_no_form_holds_all_scores(form: str, groups: int) -> None:
    """The kernel that does is a softmax of its own."""
    info = packed()
    q, k, v = (x.bfloat16().cuda() for x in inputs(groups)[:3])
    segments = None if form == "causal" else info.segments(range(LENGTH), range(LENGTH))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        causal_attention(q, k, v, segments)
    names = [event.key.lower() for event in seen.key_averages()]
    assert names and not any("softmax" in name for name in names), names
