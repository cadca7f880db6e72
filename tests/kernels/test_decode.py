"""A step of a block is what its definition says in double precision, in fp32 and with bf16 weights, on hard values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megaforge.kernels.decode import (
    FFN,
    Angles,
    Attention,
    Block,
    Experts,
    Norm,
    Router,
    TimeMix,
    is_compiled,
    reference,
    step_block,
    step_experts,
    step_head,
)
from megaforge.kernels.decode.reference import Product

pytestmark = pytest.mark.skipif(not is_compiled("cpu"), reason="no compiled code")
HIDDEN, HEADS, SIZE = 40, 3, 17
TYPES = [(torch.float32, 3e-6), (torch.bfloat16, 1.5e-2)]


class Random:
    """Tensors of one layer: matrices in ``dtype``, vectors in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(5)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def product(self, n: int, k: int, *, bias: bool = False, turned: bool = False) -> Product:
        weight = (self.values(n, k) / k**0.5).to(self.dtype)
        weight = weight.t().contiguous().t() if turned else weight
        return weight, self.values(n).to(self.dtype) if bias else None

    def norm(self, count: int, *, bias: bool = False) -> Norm:
        return Norm(1 + 0.2 * self.values(count), self.values(count) if bias else None, 1e-5)

    def time_mix(self, *, first: bool) -> TimeMix:
        wide = HEADS * SIZE
        maps = tuple(
            (self.product(rank, HIDDEN, turned=True), self.product(wide, rank, turned=True))
            for rank in (5, 16, 33, 8)[: 3 if first else 4]
        )
        return TimeMix(
            self.norm(HIDDEN, bias=True),
            tuple(self.values(HIDDEN).sigmoid() for _ in range(6)),
            *(self.product(wide, HIDDEN) for _ in range(3)),
            output=self.product(HIDDEN, wide),
            maps=maps,
            vectors=tuple(self.values(wide) for _ in range(5 if first else 6)),
            head_norm=self.norm(wide, bias=True),
            heads=HEADS,
            head_size=SIZE,
        )

    def attention(self, groups: int, **options: bool) -> Attention:
        heads, width = 4, 10
        return Attention(
            self.norm(HIDDEN),
            self.product((heads + 2 * groups) * width, HIDDEN, bias=True),
            self.product(HIDDEN, heads * width, bias=True),
            self.norm(width, bias=True),
            Norm(),
            self.norm(heads * width),
            heads,
            groups,
            width,
            **options,
        )

    def ffn(self, activation: str, *, mix: bool, norm: bool) -> FFN:
        width, parts = 50, 2 if activation in ("swiglu", "gated_relu2") else 1
        up, down = self.product(parts * width, HIDDEN, bias=not mix), self.product(HIDDEN, width, bias=not mix)
        share = self.values(HIDDEN).sigmoid() if mix else None
        return FFN(self.norm(HIDDEN), share, up, down, self.norm(width) if norm else Norm(), activation)


def assert_close(got: Tensor, want: Tensor, within: float) -> None:
    assert float((got.double() - want.double()).norm()) <= within * float(want.double().norm())


@pytest.mark.parametrize(("dtype", "within"), TYPES)
@pytest.mark.parametrize("first", [True, False])
def test_time_mix_and_channel_mix(dtype: torch.dtype, within: float, first: bool) -> None:
    make = Random(dtype)
    layer, ffn = make.time_mix(first=first), make.ffn("relu2", mix=True, norm=first)
    for count in (1, 2, 5, 8):
        x, v_first = make.values(count, HIDDEN), make.values(count, HEADS * SIZE)
        state = SimpleNamespace(shift=make.values(count, HIDDEN).to(dtype), wkv=make.values(count, HEADS, SIZE, SIZE))
        ffn_state = SimpleNamespace(shift=make.values(count, HIDDEN).to(dtype))
        own, own_ffn = (SimpleNamespace(**vars(each)) for each in (state, ffn_state))
        wide = x.double()
        update, v_wide = reference.time_mix(layer, wide, own, v_first.double())
        wide = wide + update
        wide = wide + reference.ffn(ffn, wide, own_ffn)
        step_block(x, Block(layer, ffn), state, ffn_state, v_first)
        for got, want in ((x, wide), (v_first, v_wide), (state.shift, own.shift), (state.wkv, own.wkv)):
            assert_close(got, want, within)
        assert_close(ffn_state.shift, own_ffn.shift, within)


@pytest.mark.parametrize(("dtype", "within"), TYPES)
@pytest.mark.parametrize(("groups", "interleaved", "pairs"), [(4, False, 5), (2, True, 3), (1, False, 0)])
def test_attention(dtype: torch.dtype, within: float, groups: int, interleaved: bool, pairs: int) -> None:
    make, count, seen = Random(dtype), 3, 6
    layer = make.attention(groups, interleaved=interleaved)
    x, kept = make.values(count, HIDDEN), [make.values(count, groups, 9, 10).to(dtype) for _ in range(2)]
    angles = make.values(count, pairs) if pairs else None
    unused = torch.tensor([0, seen, 2]) if groups == 2 else None
    state = SimpleNamespace(keys=kept[0].clone(), values=kept[1].clone(), length=seen)
    given = [each[:, :, :seen] for each in kept]
    update, keys, values = reference.attention(
        layer, x.double(), *given, None if angles is None else angles.double(), unused
    )
    wide, v_first = x.double() + update, torch.empty(0)
    tables = None if angles is None else Angles(angles.cos(), angles.sin())
    step_block(x, Block(layer, None), state, None, v_first, angles=tables, unused=unused)
    assert_close(x, wide, within)
    assert state.length == seen + 1
    for own, want, before in ((state.keys, keys, kept[0]), (state.values, values, kept[1])):
        assert_close(own[:, :, : seen + 1], want, within)
        assert torch.equal(own[:, :, seen + 1 :], before[:, :, seen + 1 :])


@pytest.mark.parametrize(("dtype", "within"), TYPES)
def test_every_activation_and_the_norm_behind_it(dtype: torch.dtype, within: float) -> None:
    make = Random(dtype)
    layer = make.attention(2)
    for number, activation in enumerate(("relu2", "gated_relu2", "swiglu", "gelu", "gelu_exact")):
        ffn = make.ffn(activation, mix=False, norm=number % 2 == 0)
        x = 3 * make.values(2, HIDDEN)
        keys, values = (make.values(2, 2, 4, 10).to(dtype) for _ in range(2))
        wide = x.double()
        wide = wide + reference.attention(layer, wide, keys[:, :, :1], values[:, :, :1], None, None)[0]
        wide = wide + reference.ffn(ffn, wide)
        step_block(x, Block(layer, ffn), SimpleNamespace(keys=keys, values=values, length=1), None, torch.empty(0))
        assert_close(x, wide, within)


@pytest.mark.parametrize(("dtype", "within"), TYPES)
@pytest.mark.parametrize("shared", [True, False])
def test_experts_behind_their_router(dtype: torch.dtype, within: float, shared: bool) -> None:
    make, count, width = Random(dtype), 8, 20
    mixer, router = (
        make.attention(4),
        Router(make.norm(HIDDEN), make.values(HIDDEN).sigmoid(), (make.values(6, HIDDEN), None)),
    )
    up = torch.stack([make.product(2 * width, HIDDEN)[0] for _ in range(6)])
    down = torch.stack([make.product(HIDDEN, width)[0] for _ in range(6)])
    norm = 1 + 0.1 * make.values(6, width) if shared else None
    own = (make.product(2 * 30, HIDDEN), make.product(HIDDEN, 30), make.norm(30)) if shared else None
    own = None if own is None else (own[0], own[1], Norm(own[2].weight, None, 1e-5))
    layer = Experts(up, down, norm, 1e-5, "swiglu", own)
    x, shift = make.values(count, HIDDEN), make.values(count, HIDDEN).to(dtype)
    keys, values = (make.values(count, 4, 4, 10).to(dtype) for _ in range(2))
    state, other = SimpleNamespace(shift=shift.clone()), SimpleNamespace(shift=shift)
    wide = x.double()
    wide = wide + reference.attention(mixer, wide, keys[:, :, :1], values[:, :, :1], None, None)[0]
    inside = reference.entered(router, wide, other)
    routed = torch.empty(count, HIDDEN, dtype=dtype), torch.empty(count, 6)
    cache = SimpleNamespace(keys=keys, values=values, length=1)
    step_block(x, Block(mixer, router), cache, state, torch.empty(0), routed=routed)
    assert_close(routed[0], inside, within)
    assert_close(routed[1], reference.linear(inside, router.scores), within)
    assert_close(state.shift, other.shift, within)
    chosen = torch.stack([torch.randperm(6, generator=make.generator)[:2] for _ in range(count)]).int()
    chosen[:4] = torch.tensor([1, 5])  # several tokens of one expert, some experts without any
    weights = make.values(count, 2).sigmoid()
    before = x.double()
    step_experts(x, layer, routed[0], chosen, weights)
    assert_close(x, before + reference.experts(layer, routed[0].double(), chosen, weights), within)


def test_the_head_scores_the_rows_it_is_given() -> None:
    make = Random(torch.float32)
    x, norm, (weight, _) = make.values(3, HIDDEN), make.norm(HIDDEN, bias=True), make.product(70, HIDDEN)
    want = reference.linear(norm(x.double()), (weight[:61], None))
    assert_close(step_head(x, norm, weight[:61]), want, 3e-6)


def test_one_thread_or_two() -> None:
    """Of a matrix that is large enough for both; csrc/decode/tests has every part of a block."""
    make = Random(torch.float32)
    x, norm, (weight, _) = make.values(3, HIDDEN), make.norm(HIDDEN), make.product(8000, HIDDEN)
    before, scores = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scores.append(step_head(x, norm, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*scores)


def test_hard_values() -> None:
    """Gates and decays at their ends, one huge score among the keys, a sequence of NaN beside another."""
    make = Random(torch.float32)
    layer = make.time_mix(first=True)
    ends = torch.tensor([-1e4, 1e4, 0.0]).repeat(HEADS * SIZE)[: HEADS * SIZE].contiguous()
    layer = TimeMix(
        **{**vars(layer), "vectors": (ends, ends.flip(0).contiguous(), torch.zeros_like(ends), *layer.vectors[3:])}
    )
    x, state = (
        make.values(2, HIDDEN),
        SimpleNamespace(shift=torch.zeros(2, HIDDEN), wkv=torch.zeros(2, HEADS, SIZE, SIZE)),
    )
    own, v_first = SimpleNamespace(**vars(state)), torch.empty(2, HEADS * SIZE)
    want = x.double() + reference.time_mix(layer, x.double(), own, None)[0]
    step_block(x, Block(layer, None), state, None, v_first)
    assert_close(x, want, 3e-6)
    attention = make.attention(2)
    x = make.values(2, HIDDEN)
    keys, values = (make.values(2, 2, 4, 10) for _ in range(2))
    keys[:, :, 1] *= 1e4
    values[1, :, 0] = float("nan")
    want = x.double() + reference.attention(attention, x.double(), keys[:, :, :2], values[:, :, :2], None, None)[0]
    step_block(x, Block(attention, None), SimpleNamespace(keys=keys, values=values, length=2), None, torch.empty(0))
    assert_close(x[:1], want[:1], 3e-6)
    assert x[1].isnan().all()


def test_wrong_arguments_are_refused() -> None:
    make = Random(torch.float32)
    layer, ffn = make.time_mix(first=True), make.ffn("relu2", mix=True, norm=False)
    state = SimpleNamespace(shift=torch.zeros(1, HIDDEN), wkv=torch.zeros(1, HEADS, SIZE, SIZE))
    v_first = torch.empty(1, HEADS * SIZE)
    with pytest.raises(RuntimeError, match="1 to 8"):
        step_block(torch.zeros(9, HIDDEN), Block(layer, None), state, None, v_first)
    with pytest.raises(RuntimeError, match="too few states"):
        step_block(torch.zeros(1, HIDDEN), Block(layer, ffn), state, None, v_first)
    with pytest.raises(RuntimeError, match="contiguous elements"):
        step_block(torch.zeros(1, HIDDEN), Block(layer, None), state, None, v_first.double())
    cache = SimpleNamespace(keys=torch.zeros(1, 2, 4, 10), values=torch.zeros(1, 2, 4, 10), length=4)
    with pytest.raises(RuntimeError, match="cache is full"):
        step_block(torch.zeros(1, HIDDEN), Block(make.attention(2), None), cache, None, v_first)
