"""Attention's forms against the plain fp64 formula, and which form a device gets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megaforge.kernels import native
from megaforge.kernels.attention import (
    attention_gradients,
    attention_with_lse,
    blocks,
    causal_attention,
    form_for,
    varlen,
)
from megaforge.kernels.attention import native as compiled
from megaforge.kernels.attention.largest_logits import largest_logits
from megaforge.kernels.attention.reference import causal_attention_reference as formula
from megaforge.kernels.attention.reference import largest_logits_reference
from megaforge.kernels.attention.segments import documents_of, segments_of, whole
from megaforge.kernels.attention.varlen import flash_serves


def inputs(length: int, groups: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, 16), (2, groups, length, 16), (2, groups, length, 16), (2, 4, length, 16)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def document_ids(length: int) -> Tensor:
    return (torch.arange(length)[None, :] >= torch.tensor([[5], [length // 2]])).long()


def document_segments(length: int, packed: bool = True) -> Tensor:
    documents = documents_of(document_ids(length) * packed)
    return segments_of(documents, range(length), range(length))


def document_mask(length: int) -> Tensor:
    documents = document_ids(length)
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "groups"), [(1, 4), (7, 1), (29, 2)])
def test_blocks_are_exact(
    monkeypatch: pytest.MonkeyPatch, length: int, groups: int, packed: bool, dtype: torch.dtype
) -> None:
    """In wider arithmetic only summation order is left."""
    monkeypatch.setattr(blocks, "ROWS", 8)
    *qkv, direction = inputs(length, groups)
    ours = [t.to(dtype).requires_grad_() for t in qkv]
    theirs = [t.clone().requires_grad_() for t in qkv]
    out = blocks.attention(*ours, document_segments(length, packed))
    expected = formula(*theirs, document_mask(length) if packed else None)
    close = 2e-6 if dtype == torch.float32 else 1e-14
    assert relative(out.detach(), expected.detach()) < close
    found = torch.autograd.grad(out, ours, direction.to(dtype))
    for ours_grad, theirs_grad in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        if float(theirs_grad.norm()) > 0:  # one token alone has no say in its softmax
            assert relative(ours_grad, theirs_grad) < close


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_is_as_good_as_bf16_can_be(monkeypatch: pytest.MonkeyPatch, packed: bool, groups: int) -> None:
    monkeypatch.setattr(compiled, "COMPILED", frozenset({"meta"}))
    *qkv, direction = inputs(150, groups)
    ours = [t.bfloat16().requires_grad_() for t in qkv]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    out = causal_attention(*ours, document_segments(150) if packed else None)
    expected = formula(*theirs, document_mask(150) if packed else None)
    assert out.dtype == torch.bfloat16
    assert relative(out.detach(), expected.detach()) < 1e-2
    found = torch.autograd.grad(out, ours, direction.bfloat16())
    for ours_grad, theirs_grad in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        assert relative(ours_grad, theirs_grad) < 1.5e-2


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("packed", [False, True])
def test_a_run_of_one_token_and_saturated_scores(monkeypatch: pytest.MonkeyPatch, packed: bool, scale: float) -> None:
    """Equal keys share the attention evenly; in the second half one key has all of it, by hundreds."""
    monkeypatch.setattr(blocks, "ROWS", 8)
    q, k, v, direction = inputs(24)
    q, k = (x[:, :, :1].expand_as(x).clone() * scale for x in (q, k))
    k[:, :, 15] *= 4
    ours = [t.float().requires_grad_() for t in (q, k, v)]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    out = blocks.attention(*ours, document_segments(24, packed))
    expected = formula(*theirs, document_mask(24) if packed else None)
    assert relative(out.detach(), expected.detach()) < 2e-5
    found = torch.autograd.grad(out, ours, direction.float())
    exact = torch.autograd.grad(expected, theirs, direction.float().double())
    for ours_grad, theirs_grad in zip(found, exact, strict=True):
        assert bool(ours_grad.isfinite().all())
        assert float((ours_grad - theirs_grad).norm()) <= 2e-5 * max(float(theirs_grad.norm()), 1.0, scale)


def test_blocks_of_parts_and_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in two parts, put together by their log-sum-exp; queries that see nothing; no queries."""
    monkeypatch.setattr(blocks, "ROWS", 8)
    q, k, v, direction = inputs(30, 2)
    documents, mask = documents_of(document_ids(30)), document_mask(30)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = formula(*leaves, mask)
    grads = torch.autograd.grad(expected, leaves, direction)
    seen = [segments_of(documents, range(30), keys) for keys in (range(12), range(12, 30))]
    parts = [(x[:, :, :12], x[:, :, 12:]) for x in (k.detach(), v.detach())]
    found = [attention_with_lse(q.detach(), *kv, at) for kv, at in zip(zip(*parts, strict=True), seen, strict=True)]
    lse = torch.logaddexp(found[0][1], found[1][1])
    out = sum((o * (own - lse).exp().unsqueeze(-1) for o, own in found), torch.zeros(()))
    assert (found[0][1] == -torch.inf).any() and not found[1][0][:, :, :12].any()
    assert relative(out, expected.detach()) < 1e-14
    back = [
        attention_gradients(direction, q.detach(), *kv, out, lse, at)
        for kv, at in zip(zip(*parts, strict=True), seen, strict=True)
    ]
    assert relative(back[0][0] + back[1][0], grads[0]) < 1e-13
    assert all(relative(torch.cat([back[0][i], back[1][i]], 2), grads[i]) < 1e-13 for i in (1, 2))
    assert blocks.attention(q[:, :, :0], k, v, seen[0][:0]).shape == (2, 4, 0, 16)


def test_one_query_sees_all_keys_and_more_need_segments() -> None:
    q, k, v, _ = inputs(20, 2)
    assert relative(causal_attention(q[:, :, -1:], k, v), formula(q, k, v)[:, :, -1:]) < 1e-14
    assert relative(causal_attention(q, k, v), formula(q, k, v)) < 1e-14
    with pytest.raises(ValueError, match="3 queries of 20 keys need segments"):
        causal_attention(q[:, :, -3:], k, v)
    for keys, values in ((k, v[:, :, :-1]), (k[:, :1].expand(-1, q.shape[1] + 1, -1, -1), v)):
        with pytest.raises(ValueError, match="of keys"):
            causal_attention(q, keys, values)


def fake_varlen(words: str) -> tuple[Callable[..., Any], list[dict[str, Any]]]:
    """A ``varlen_attn`` with the keywords of a torch release, and what it was called with. Each segment is attended to
    on its own, its last query at its last key."""
    calls: list[dict[str, Any]] = []

    def attend(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, aux: Any, **given: Any
    ):
        calls.append({"heads": (query.shape[1], key.shape[1]), "bounds": cu_q.tolist(), "causal": causal, **given})
        assert all(x.is_contiguous() for x in (query, key, value)) and cu_q.dtype == cu_k.dtype == torch.int32
        out, lse = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query))
        bounds = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
        for (first, end), (begin, stop) in bounds:
            q, *kv = (
                query[first:end].transpose(0, 1)[None],
                *(x[begin:stop].transpose(0, 1)[None] for x in (key, value)),
            )
            visible = torch.ones(end - first, stop - begin, dtype=torch.bool)
            mask = visible.tril((stop - begin) - (end - first)) if causal else visible
            out[first:end] = formula(q, *kv, mask)[0].transpose(0, 1)
            scores = q @ kv[0].repeat_interleave(q.shape[1] // kv[0].shape[1], 1).transpose(2, 3) / q.shape[3] ** 0.5
            lse[:, first:end] = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)[0]
        return (out, lse) if aux is not None and aux.lse else out

    def until_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert query.shape[1] == key.shape[1]
        return attend(query, key, value, cu_seq_q, cu_seq_k, is_causal, return_aux, longest=(max_q, max_k))

    def from_2_12(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False,
    ):  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        return attend(query, key, value, cu_seq_q, cu_seq_k, causal, return_aux, longest=(max_q, max_k))

    return {"is_causal": until_2_11, "window_size": from_2_12}[words], calls


def fake_backward(
    grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state, window_size
):
    """A ``_varlen_attn_backward``, from the log-sum-exp of all keys."""
    assert window_size == [-1, 0 if is_causal else -1] and rng_state.dtype == torch.uint64
    each = query.shape[1] // key.shape[1]
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    bounds = zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True)
    for (first, end), (begin, stop) in bounds:
        for h in range(query.shape[1]):
            q, g, o = (x[first:end, h] for x in (query, grad, out))
            k, v = (x[begin:stop, h // each] for x in (key, value))
            weights = (q @ k.T / q.shape[1] ** 0.5 - lse[h, first:end, None]).exp()
            weights = weights.tril((stop - begin) - (end - first)) if is_causal else weights
            dscores = weights * (g @ v.T - (g * o).sum(-1, keepdim=True)) / q.shape[1] ** 0.5
            grads[0][first:end, h] += dscores @ k
            grads[1][begin:stop, h // each] += dscores.T @ q
            grads[2][begin:stop, h // each] += weights.T @ g
    return grads


@pytest.fixture
def on_flash(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    """Takes the way of a GPU on a CPU, with a stand-in for its kernels."""

    def take(words: str) -> list[dict[str, Any]]:
        function, calls = fake_varlen(words)
        monkeypatch.setattr(varlen, "VARLEN", function)
        monkeypatch.setattr(varlen, "BACKWARD", fake_backward)
        monkeypatch.setattr("megaforge.kernels.attention.form_for", lambda query, key, segments: varlen)
        return calls

    return take


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("words", ["is_causal", "window_size"])
def test_documents_are_the_same_as_their_mask(on_flash: Any, words: str, groups: int) -> None:
    calls = on_flash(words)
    *qkv, direction = inputs(12, groups)
    ours, theirs = ([t.clone().requires_grad_() for t in qkv] for _ in range(2))
    segments = document_segments(12)
    assert varlen.takes(qkv[0], qkv[1], segments)
    out, expected = causal_attention(*ours, segments), formula(*theirs, document_mask(12))
    assert relative(out.detach(), expected.detach()) < 1e-14
    found = torch.autograd.grad(out, ours, direction)
    for ours_grad, theirs_grad in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        assert relative(ours_grad, theirs_grad) < 1e-14
    heads = (4, 4 if words == "is_causal" else groups)
    assert calls == [{"heads": heads, "bounds": [0, 5, 12, 18, 24], "longest": (7, 7), "causal": True}]


@pytest.mark.parametrize("groups", [4, 2])
def test_parts_of_sequences_on_flash(on_flash: Any, groups: int) -> None:
    """A rank's chunk of queries after all keys before it, and in two parts with gradients, as in a ring."""
    on_flash("window_size")
    q, k, v, direction = inputs(30, groups)
    documents, mask, rows = documents_of(document_ids(30)), document_mask(30), range(12, 24)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = formula(*leaves, mask)[:, :, 12:24]
    grads = torch.autograd.grad(expected, leaves, direction[:, :, 12:24])
    query, key, value = q.detach()[:, :, 12:24], k.detach(), v.detach()
    seen = segments_of(documents, rows, range(24))
    assert varlen.takes(query, key[:, :, :24], seen)
    assert relative(causal_attention(query, key[:, :, :24], value[:, :, :24], seen), expected.detach()) < 1e-14
    spans = (range(12, 24), range(12))  # its own keys, causal, and earlier ones, of which it sees all
    parts = [(*(x[:, :, s.start : s.stop] for x in (key, value)), segments_of(documents, rows, s)) for s in spans]
    assert all(varlen.takes(query, part[0], part[2]) for part in parts)
    assert not varlen.takes(query, key, torch.tensor([[0, 0, 8, 0, 9, 3]])), "neither causal nor whole"
    found = [attention_with_lse(query, *part) for part in parts]
    lse = torch.logaddexp(found[0][1], found[1][1].double())
    out = sum((o * (own - lse).exp().unsqueeze(-1) for o, own in found), torch.zeros(()))
    assert relative(out, expected.detach()) < 1e-6 and (found[1][1] == -torch.inf).any()
    back = [attention_gradients(direction[:, :, 12:24], query, *p[:2], expected.detach(), lse, p[2]) for p in parts]
    assert relative(back[0][0] + back[1][0], grads[0][:, :, 12:24]) < 1e-6
    for i in (1, 2):
        assert relative(torch.cat([back[1][i], back[0][i]], 2), grads[i][:, :, :24]) < 1e-6


@pytest.mark.parametrize("groups", [4, 2])
def test_the_installed_varlen_takes_the_calls(groups: int) -> None:
    """Shapes alone: its kernels need a GPU."""
    q, k, v = (torch.empty(2, h, 24, 16, device="meta", dtype=torch.bfloat16) for h in (4, groups, groups))
    q.requires_grad_()
    segments = document_segments(24)
    assert form_for(q, k, segments) is varlen and form_for(q.float(), k.float(), segments) is blocks
    out = causal_attention(q, k, v, segments)
    assert out.shape == q.shape and torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    part, lse = attention_with_lse(q, k, v, segments)
    assert part.shape == q.shape and part.dtype == torch.float32 and lse.shape == q.shape[:3]
    grads = attention_gradients(part, q, k, v, part, lse, segments)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape] and grads[0].dtype == torch.float32


def test_what_flash_serves() -> None:
    assert flash_serves(torch.bfloat16, 128, (9, 0)) and flash_serves(torch.float16, 64, (8, 0))
    assert not flash_serves(torch.float32, 64, (9, 0)) and not flash_serves(torch.bfloat16, 64, (7, 5))
    assert not flash_serves(torch.bfloat16, 36, (9, 0)) and not flash_serves(torch.bfloat16, 256, (9, 0))


def test_a_gpu_without_flash_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(native, "print_rank_0", said.append)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(varlen, "takes", lambda *given: True)
    native.say_fallback.cache_clear()
    with FakeTensorMode():
        narrow, wide = (torch.empty(1, 1, 8, 64, device="cuda", dtype=t) for t in (torch.bfloat16, torch.float32))
    assert form_for(narrow, narrow, whole(1, 8)) is varlen and not said
    assert form_for(wide, wide, whole(1, 8)) is blocks and form_for(wide, wide, whole(1, 8)) is blocks
    assert len(said) == 1 and "does not take torch.float32 in heads of 64" in said[0] and "blocks of queries" in said[0]
    native.say_fallback.cache_clear()


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
