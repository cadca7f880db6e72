"""Attention's forms against the plain fp64 formula, and which form a device gets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megaforge.kernels import attention, native
from megaforge.kernels.attention import (
    PackedDocuments,
    additive_mask,
    blockwise,
    causal_attention,
    flash_serves,
    taken_mask,
    takes_documents,
)
from megaforge.kernels.attention.blockwise import BlockwiseAttention
from megaforge.kernels.attention.largest_logits import largest_logits
from megaforge.kernels.attention.reference import causal_attention_reference as formula
from megaforge.kernels.attention.reference import largest_logits_reference


def inputs(length: int, groups: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, 16), (2, groups, length, 16), (2, groups, length, 16), (2, 4, length, 16)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def document_mask(length: int) -> Tensor:
    documents = (torch.arange(length)[None, :] >= torch.tensor([[5], [length // 2]])).long()
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 24, 29])
def test_blocks_are_exact(monkeypatch: pytest.MonkeyPatch, length: int, packed: bool) -> None:
    """In wider arithmetic (fp32 is what the blocks accumulate in) only summation order is left."""
    monkeypatch.setattr(blockwise, "ROWS", 8)
    *qkv, direction = inputs(length)
    mask = document_mask(length) if packed else None
    ours = [t.float().requires_grad_() for t in qkv]
    theirs = [t.clone().requires_grad_() for t in qkv]
    out, expected = BlockwiseAttention.apply(*ours, mask), formula(*theirs, mask)
    assert relative(out.detach(), expected.detach()) < 1e-6
    found = torch.autograd.grad(out, ours, direction.float())
    for ours_grad, theirs_grad in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        if float(theirs_grad.norm()) > 0:  # one token alone has no say in its softmax
            assert relative(ours_grad, theirs_grad) < 2e-6


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_is_as_good_as_bf16_can_be(packed: bool, groups: int) -> None:
    *qkv, direction = inputs(150, groups)
    mask = document_mask(150) if packed else None
    ours = [t.bfloat16().requires_grad_() for t in qkv]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    out, expected = causal_attention(*ours, mask), formula(*theirs, mask)
    assert out.dtype == torch.bfloat16
    assert relative(out.detach(), expected.detach()) < 1e-2
    found = torch.autograd.grad(out, ours, direction.bfloat16())
    for ours_grad, theirs_grad in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        assert relative(ours_grad, theirs_grad) < 1.5e-2


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("packed", [False, True])
def test_a_run_of_one_token_and_saturated_scores(monkeypatch: pytest.MonkeyPatch, packed: bool, scale: float) -> None:
    """Equal keys share the attention evenly; in the second half one key has all of it, by hundreds."""
    monkeypatch.setattr(blockwise, "ROWS", 8)
    q, k, v, direction = inputs(24)
    q, k = (x[:, :, :1].expand_as(x).clone() * scale for x in (q, k))
    k[:, :, 15] *= 4
    mask = document_mask(24) if packed else None
    ours = [t.float().requires_grad_() for t in (q, k, v)]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    out, expected = BlockwiseAttention.apply(*ours, mask), formula(*theirs, mask)
    assert relative(out.detach(), expected.detach()) < 2e-5
    found = torch.autograd.grad(out, ours, direction.float())
    exact = torch.autograd.grad(expected, theirs, direction.float().double())
    for ours_grad, theirs_grad in zip(found, exact, strict=True):
        assert bool(ours_grad.isfinite().all())
        assert float((ours_grad - theirs_grad).norm()) <= 2e-5 * max(float(theirs_grad.norm()), 1.0, scale)


def test_wide_types_take_the_fused_kernel_and_agree() -> None:
    *qkv, _ = inputs(20, 2)
    for mask in (None, document_mask(20)):
        assert relative(causal_attention(*qkv, mask), formula(*qkv, mask)) < 1e-13


def fake_varlen(words: str) -> tuple[Callable[..., Tensor], list[dict[str, Any]]]:
    """A ``varlen_attn`` with the keywords of a torch release, and what it was called with. Each document is attended to
    on its own."""
    calls: list[dict[str, Any]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, **given: Any) -> Tensor:
        calls.append({"heads": (query.shape[1], key.shape[1]), "bounds": bounds.tolist(), **given})
        assert query.is_contiguous() and bounds.dtype == torch.int32
        pieces = []
        for begin, end in itertools.pairwise(bounds.tolist()):
            rows = [x[begin:end].transpose(0, 1)[None] for x in (query, key, value)]
            pieces.append(formula(*rows, None)[0].transpose(0, 1))
        return torch.cat(pieces)

    def until_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert cu_seq_k is cu_seq_q and query.shape[1] == key.shape[1]
        return attend(query, key, value, cu_seq_q, is_causal=is_causal, longest=(max_q, max_k))

    def from_2_12(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert cu_seq_k is cu_seq_q and (enable_gqa or query.shape[1] == key.shape[1])
        return attend(query, key, value, cu_seq_q, window_size=window_size, longest=(max_q, max_k))

    return {"is_causal": until_2_11, "window_size": from_2_12}[words], calls


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("words", ["is_causal", "window_size"])
def test_documents_are_the_same_as_their_mask(monkeypatch: pytest.MonkeyPatch, words: str, groups: int) -> None:
    function, calls = fake_varlen(words)
    monkeypatch.setattr(attention, "_VARLEN", function)
    *qkv, direction = inputs(12, groups)
    documents = PackedDocuments(torch.tensor([0, 5, 12, 18, 24], dtype=torch.int32), 7)  # document_mask's
    ours, theirs = ([t.clone().requires_grad_() for t in qkv] for _ in range(2))
    out, expected = causal_attention(*ours, documents=documents), formula(*theirs, document_mask(12))
    assert relative(out.detach(), expected.detach()) < 1e-14
    found = torch.autograd.grad(out, ours, direction)
    for ours_grad, theirs_grad in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        assert relative(ours_grad, theirs_grad) < 1e-14
    causal = {"is_causal": True} if words == "is_causal" else {"window_size": (-1, 0)}
    heads = (4, 4 if words == "is_causal" else groups)
    assert calls == [{"heads": heads, "bounds": [0, 5, 12, 18, 24], "longest": (7, 7), **causal}]


@pytest.mark.parametrize("groups", [4, 2])
def test_the_installed_varlen_takes_the_call_both_ways(groups: int) -> None:
    """Shapes alone: its kernels need a GPU."""
    q, k, v = (torch.empty(2, h, 24, 16, device="meta", dtype=torch.bfloat16) for h in (4, groups, groups))
    q.requires_grad_()
    documents = PackedDocuments(torch.empty(4, device="meta", dtype=torch.int32), 24)
    out = causal_attention(q, k, v, documents=documents)
    assert out.shape == q.shape and torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_what_flash_serves() -> None:
    assert flash_serves(torch.bfloat16, 128, (9, 0)) and flash_serves(torch.float16, 64, (8, 0))
    assert not flash_serves(torch.float32, 64, (9, 0)) and not flash_serves(torch.bfloat16, 64, (7, 5))
    assert not flash_serves(torch.bfloat16, 36, (9, 0)) and not flash_serves(torch.bfloat16, 256, (9, 0))
    assert not takes_documents(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))  # on a CPU


def test_a_gpu_whose_documents_need_a_mask_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(native, "print_rank_0", said.append)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention, "_VARLEN", fake_varlen("is_causal")[0])
    native.say_fallback.cache_clear()
    with FakeTensorMode():
        narrow, wide = (torch.empty(1, 1, 8, 64, device="cuda", dtype=t) for t in (torch.bfloat16, torch.float32))
    assert takes_documents(narrow) and not said
    assert not takes_documents(wide) and not takes_documents(wide)
    assert len(said) == 1 and "does not take torch.float32 in heads of 64" in said[0] and "using a mask" in said[0]
    native.say_fallback.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
def test_no_mask_meets_groups_on_a_gpu(monkeypatch: pytest.MonkeyPatch, device: str, masked: bool, groups: int) -> None:
    """There the two together leave only the kernel that holds all scores in fp32."""
    calls = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        calls.append((key.shape[1], value.shape[1], given["attn_mask"] is not None, given["enable_gqa"]))
        return query

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    monkeypatch.setattr(attention.native, "COMPILED", frozenset({"meta"}))
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(1, heads, 16, 64, device=device) for heads in (4, groups, groups))
        mask = torch.empty(1, 1, 16, 16, device=device, dtype=torch.bool) if masked else None
        causal_attention(q, k, v, mask)
    repeated = device == "cuda" and masked
    heads = 4 if repeated else groups
    assert calls == [(heads, heads, masked, groups != 4 and not repeated)]


def test_a_mask_to_add_hides_the_same() -> None:
    *qkv, _ = inputs(24)
    mask = document_mask(24)
    added = additive_mask(mask, torch.float64)
    assert added.dtype == torch.float64 and taken_mask(mask, torch.float64) is mask  # a CPU takes the bool one
    assert relative(causal_attention(*qkv, added), formula(*qkv, mask)) < 1e-13


@pytest.mark.parametrize("at_once", [1, 500, 1 << 24])
@pytest.mark.parametrize(("length", "groups"), [(1, 4), (7, 2), (29, 1)])
def test_the_largest_logit_of_each_head(
    monkeypatch: pytest.MonkeyPatch, length: int, groups: int, at_once: int
) -> None:
    monkeypatch.setattr("megaforge.kernels.attention.largest_logits.SCORES_AT_ONCE", at_once)
    query, key, *_ = inputs(length, groups)
    documents = (torch.arange(length)[None, :] >= torch.tensor([[5], [length // 2]])).long()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for own, visible in ((None, causal), ((documents, documents), document_mask(length))):
        expected = largest_logits_reference(query, key, visible)
        torch.testing.assert_close(largest_logits(query, key, 0, own), expected, rtol=1e-13, atol=0.0)
        rounded = largest_logits_reference(query.bfloat16().double(), key.bfloat16().double(), visible).float()
        torch.testing.assert_close(largest_logits(query.bfloat16(), key.bfloat16(), 0, own), rounded)
    half = length // 2  # the second half's queries, to keys of the first and of the second
    parts = [
        largest_logits(query[:, :, half:], block, ahead)
        for block, ahead in ((key[:, :, :half], half), (key[:, :, half:], 0))
    ]
    expected = largest_logits_reference(query[:, :, half:], key, causal[half:])
    torch.testing.assert_close(torch.maximum(*parts), expected, rtol=1e-13, atol=0.0)


def test_largest_logits_of_little() -> None:
    query, key, *_ = inputs(6)
    assert (largest_logits(query[:0], key[:0]) == -torch.inf).all() and (
        largest_logits(query, key, -6) == -torch.inf
    ).all()
    assert (largest_logits(query * 0, key) == 0).all() and largest_logits(
        query * 1e18, key.float() * 1e18
    ).isfinite().all()
    query[1, 2, 3, 0] = torch.nan
    assert largest_logits(query, key).isnan().tolist() == [False, False, True, False]
