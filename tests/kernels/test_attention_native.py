"""The compiled attention for CPUs against the plain fp64 formula, on every instruction set of this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megaforge.kernels.attention import causal_attention, form_for, native
from megaforge.kernels.attention.reference import causal_attention_reference as formula
from megaforge.kernels.attention.segments import documents_of, segments_of, whole
from megaforge.kernels.native import why_missing

pytestmark = pytest.mark.skipif("cpu" not in native.COMPILED, reason=f"not built: {why_missing('attention', 'cpu')}")
TYPES = (torch.float32, torch.bfloat16)
# Relative errors of the output, and of the gradients.
MOST = {torch.float32: (1e-6, 3e-6), torch.bfloat16: (3e-3, 6e-3)}


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", request.param)
    try:
        causal_attention(*(torch.ones(1, 1, 1, 1) for _ in range(3)))
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param


def inputs(heads: int, groups: int, length: int, width: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """Queries, keys, values and a direction, laid out as attention layers have them."""
    generator = torch.Generator().manual_seed(length + width)
    counts = (heads, groups, groups, heads)
    return [torch.randn(length, batch, n, width, generator=generator).to(dtype).permute(1, 2, 0, 3) for n in counts]


def ids_of(lengths: tuple[int, ...], batch: int = 2) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(batch, -1)


def mask_of(ids: Tensor) -> Tensor:
    return (ids[:, :, None] == ids[:, None, :]).tril()[:, None]


def error(got: Tensor, want: Tensor) -> float:
    """Relative, but no smaller than to a tenth in each place: what should vanish does so up to rounding."""
    return float((got.double() - want).norm() / want.norm().clamp(min=0.1 * want.numel() ** 0.5))


def results(given: list[Tensor], segments: Tensor) -> list[Tensor]:
    *qkv, direction = given
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = causal_attention(*leaves, segments=segments)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def exact(given: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    *qkv, direction = given
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    out = formula(*leaves, mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction.double())]


def assert_near(got: list[Tensor], want: list[Tensor], dtype: torch.dtype, factor: float = 1.0) -> None:
    found = [error(x, y) for x, y in zip(got, want, strict=True)]
    assert found[0] <= MOST[dtype][0] * factor and max(found[1:]) <= MOST[dtype][1] * factor, found
    assert all(x.dtype == dtype for x in got)


@pytest.mark.parametrize("dtype", TYPES)
def test_documents_groups_and_widths(isa: str, dtype: torch.dtype) -> None:
    for heads, groups, width, lengths in (
        (4, 2, 64, (1, 16, 17, 48, 35)),
        (2, 1, 128, (570, 30)),
        (3, 3, 20, (1, 1, 50)),
    ):
        given, ids = inputs(heads, groups, sum(lengths), width, dtype), ids_of(lengths)
        places = range(sum(lengths))
        got = results(given, segments_of(documents_of(ids), places, places))
        assert_near(got, exact(given, mask_of(ids)), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_hard_rows(dtype: torch.dtype) -> None:
    """Alike keys share evenly, of large logits one has all, a token alone gives its value, zeros give the mean."""
    given = inputs(2, 2, 70, 64, dtype)
    given[1] = given[1][:, :, :1].expand_as(given[1])
    assert_near(results(given, whole(2, 70)), exact(given, None), dtype, 2.0)
    given = inputs(2, 2, 70, 64, dtype)
    given[0], given[1] = given[0] * 8, given[1] * 8  # logits of hundreds, whose last bits count
    for got, want in zip(results(given, whole(2, 70)), exact(given, None), strict=True):
        assert got.isfinite().all() and error(got, want) < (2e-4 if dtype == torch.float32 else 5e-2)
    one = inputs(2, 1, 1, 64, dtype)
    got = results(one, whole(2, 1))
    assert torch.equal(got[0], one[2].expand_as(got[0])) and got[1].abs().max() < 1e-5 and got[2].abs().max() < 1e-5
    zeros = [torch.zeros_like(x) for x in given[:2]] + given[2:]
    assert error(results(zeros, whole(2, 70))[0], exact(zeros, None)[0]) <= MOST[dtype][0]
    for scale in (1e-30, 1e30):
        given = inputs(1, 1, 20, 16, dtype)
        given[2] = given[2] * scale
        got, want = results(given, whole(2, 20))[0].double() / scale, exact(given, None)[0] / scale
        assert error(got, want) <= MOST[dtype][0]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_nan_stays_in_its_document(dtype: torch.dtype) -> None:
    given, ids = inputs(2, 1, 60, 64, dtype), ids_of((20, 40))
    places = range(60)
    segments = segments_of(documents_of(ids), places, places)
    clean = results(given, segments)
    given[1][0, 0, 25, 3] = torch.nan
    got = results(given, segments)
    assert got[0][0, :, 25:].isnan().all() and got[2][0, :, 20:].isnan().any()
    for x, y in zip(got, clean, strict=True):
        assert torch.equal(x[0, :, :20], y[0, :, :20]) and torch.equal(x[1], y[1])


@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_bits_at_any_number_of_threads_and_packed_as_alone(dtype: torch.dtype) -> None:
    lengths = (130, 1, 75, 300)
    given, ids, places = inputs(4, 2, 506, 64, dtype), ids_of(lengths), range(506)
    one, found, shared = inputs(1, 1, 700, 64, dtype, batch=1), {}, list[list[Tensor]]()
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found[number] = results(given, segments_of(documents_of(ids), places, places))
            for _ in range(4 if number > 1 else 1):  # one unit of work, whose parts threads add up in turn
                shared.append(results(one, whole(1, 700)))
    finally:
        torch.set_num_threads(threads)
    pairs = [(found[1], found[2]), (found[1], found[5]), *((shared[0], other) for other in shared[1:])]
    assert all(torch.equal(x, y) for first, other in pairs for x, y in zip(first, other, strict=True))
    begin = 0
    for length in lengths:
        part = [x[:, :, begin : begin + length] for x in given]
        for x, y in zip(results(part, whole(2, length)), found[1], strict=True):
            assert torch.equal(x, y[:, :, begin : begin + length])
        begin += length


@pytest.mark.parametrize("dtype", TYPES)
def test_queries_that_continue_are_the_same_bits(dtype: torch.dtype) -> None:
    given, documents = inputs(2, 1, 333, 64, dtype), documents_of(torch.zeros(2, 333, dtype=torch.long))
    expected = causal_attention(*given[:3])
    for cut in (8, 300):
        rows, keys = range(333 - cut, 333), range(333)
        segments = segments_of(documents, rows, keys)
        got = causal_attention(given[0][:, :, -cut:], given[1], given[2], segments=segments)
        assert form_for(given[0][:, :, -cut:], given[1], segments) is native
        assert torch.equal(got, expected[:, :, -cut:])


@pytest.mark.parametrize("dtype", TYPES)
def test_parts_of_the_keys_are_put_together_by_their_log_sums(dtype: torch.dtype) -> None:
    given, ids = inputs(4, 2, 96, 64, dtype), ids_of((40, 20, 36))
    documents, half = documents_of(ids), (range(48), range(48, 96))
    query, key, value, direction = given
    mask = mask_of(ids)
    want = exact(given, mask)
    scores = query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) / 8
    sums = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    parts = [
        native.attention_with_lse(
            query[:, :, 48:], *(x[:, :, keys.start : keys.stop] for x in (key, value)),
            segments_of(documents, half[1], keys),
        )
        for keys in half
    ]  # fmt: skip
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum((part * (own - lse).exp().unsqueeze(-1) for part, own in parts), torch.zeros(()))
    assert (lse - sums[:, :, 48:]).abs().max() < 1e-4 and parts[0][1].isinf().any()
    assert error(out, want[0][:, :, 48:]) <= MOST[dtype][0]
    gradients = [
        native.attention_gradients(
            direction[:, :, 48:], query[:, :, 48:], *(x[:, :, keys.start : keys.stop] for x in (key, value)),
            out.to(dtype), lse, segments_of(documents, half[1], keys),
        )
        for keys in half
    ]  # fmt: skip
    assert error(gradients[0][0] + gradients[1][0], want[1][:, :, 48:]) <= MOST[dtype][1]
    for i in (1, 2):  # no later queries than these see the second half
        assert error(gradients[1][i], want[i + 1][:, :, 48:]) <= MOST[dtype][1]


def test_little_and_nothing() -> None:
    empty = torch.empty(2, 4, 0, 64).requires_grad_()
    out = causal_attention(empty, empty, empty)
    assert out.shape == empty.shape and torch.autograd.grad(out.sum(), empty)[0].shape == empty.shape
    q = torch.randn(1, 2, 5, 64)
    alone = torch.tensor([[0, 1, 2, 3, 2, 0]])
    out, lse = native.attention_with_lse(q, q, q, alone)
    assert not out[:, :, [0, 3, 4]].any() and (lse[:, :, [0, 3, 4]] == -torch.inf).all() and out[:, :, 1:3].all()


def test_segments_that_cannot_be() -> None:
    q = torch.randn(1, 2, 8, 64)
    for rows, why in (
        ([[0, 0, 9, 0, 8, 0]], "queries 0 to 9"),
        ([[1, 0, 8, 0, 8, 0]], "sequence 1"),
        ([[0, 0, 8, 4, 5, 0]], "keys 4 to 9"),
        ([[0, 0, 5, 0, 4, 0], [0, 4, 4, 4, 4, 0]], "share queries"),
        ([[0, 0, 4, 0, 5, 0], [0, 4, 4, 4, 4, 0]], "share keys"),
    ):
        with pytest.raises(RuntimeError, match=why):
            causal_attention(q, q, q, segments=torch.tensor(rows))
    with pytest.raises(RuntimeError, match="int64"):
        causal_attention(q, q, q, segments=torch.zeros(1, 6))
    with pytest.raises(RuntimeError, match="different types"):
        causal_attention(q, q.bfloat16(), q, segments=whole(1, 8))


MEMORY = """
import resource, sys, torch
from megaforge.kernels.attention import causal_attention
from megaforge.kernels.attention.segments import segments_of, documents_of
length = 32768
ids = (torch.arange(length) // 700)[None]
q, k, v = (torch.randn(1, h, length, 16, requires_grad=True) for h in (2, 1, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
segments = segments_of(documents_of(ids), range(length), range(length))
causal_attention(q, k, v, segments=segments).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_at_32768_tokens_is_not_that_of_their_pairs() -> None:
    """A mask would have 1 GiB, scores more; inputs and results have 4 MiB each."""
    grown = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 100
