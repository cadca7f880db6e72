"""RWKV-7's time-mix against its equations written out token by token in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.nn.rwkv7 import RWKV7State, RWKV7TimeMix, lora_ranks
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters, named_specs
from tests.nn.support import CTX, assert_agrees, assert_close, filled, layer_context, random

N, HEADS = 8, 3
SIZE = N * HEADS
CFG = ModelConfig(
    hidden_size=SIZE,
    rwkv_head_size=N,
    rwkv_decay_rank=4,
    rwkv_iclr_rank=5,
    rwkv_value_rank=6,
    rwkv_gate_rank=7,
)


def time_mix(layer_index: int, dtype: torch.dtype = torch.float64, num_layers: int = 3) -> RWKV7TimeMix:
    context = layer_context(CFG, dtype, index=layer_index, count=num_layers, first=not layer_index)
    return filled(RWKV7TimeMix(context), "m")


def oracle(x: Tensor, w: dict[str, Tensor], v_first: Tensor | None, start: list[set[int]]) -> tuple[Tensor, Tensor]:
    """RWKV-LM's x070 time-mix for [s, b, h], one sequence, token and head at a time.

    ``start[b]`` are the positions at which a document of sequence ``b`` begins.
    """
    w = {name.removeprefix("m."): value for name, value in w.items()}
    outputs, first_values = [], []
    for batch in range(x.shape[1]):
        previous, states = torch.zeros(SIZE, dtype=x.dtype), [torch.zeros(N, N, dtype=x.dtype)] * HEADS
        out, values = [], []
        for t in range(x.shape[0]):
            if t in start[batch]:
                previous, states = torch.zeros_like(previous), [torch.zeros(N, N, dtype=x.dtype)] * HEADS
            now = x[t, batch]
            mixed = {letter: now + (previous - now) * w[f"x_{letter}"] for letter in "rwkvag"}
            r, k, v = (w[f"{n}.weight"] @ mixed[n[0]] for n in ("receptance", "key", "value"))
            decay = torch.exp(
                -math.exp(-0.5) * torch.sigmoid(w["w0"] + torch.tanh(mixed["w"] @ w["w1.weight"]) @ w["w2.weight"])
            )
            values.append(v)
            if v_first is not None:
                v = v + (v_first[t, batch] - v) * torch.sigmoid(w["v0"] + mixed["v"] @ w["v1.weight"] @ w["v2.weight"])
            a = torch.sigmoid(w["a0"] + mixed["a"] @ w["a1.weight"] @ w["a2.weight"])
            gate = torch.sigmoid(mixed["g"] @ w["g1.weight"]) @ w["g2.weight"]
            kk, k = k * w["k_k"], k * (1 + (a - 1) * w["k_a"])
            heads = []
            for h in range(HEADS):
                own = slice(h * N, (h + 1) * N)
                kh = kk[own] / kk[own].norm()
                s = states[h] @ (torch.diag(decay[own]) - torch.outer(kh, kh * a[own])) + torch.outer(v[own], k[own])
                states = [*states[:h], s, *states[h + 1 :]]
                y = s @ r[own]
                y = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + 64e-5)
                y = y * w["ln_x.weight"][own] + w["ln_x.bias"][own]
                heads.append(y + (r[own] * k[own] * w["r_k"][h]).sum() * v[own])
            out.append(w["output.weight"] @ (torch.cat(heads) * gate))
            previous = now
        outputs.append(torch.stack(out))
        first_values.append(torch.stack(values))
    return torch.stack(outputs, 1), torch.stack(first_values, 1)


def boundaries(length: int, starts: list[set[int]]) -> PackedSequence:
    start = torch.tensor([[t in own for t in range(length)] for own in starts])
    return PackedSequence(len(starts), length, torch.device("cpu"), start)


@pytest.mark.parametrize("layer_index", [0, 2])
@pytest.mark.parametrize("starts", [[set(), set()], [{3, 4, 33}, {1, 20}]])
def test_layer_matches_the_equations_with_all_gradients(layer_index: int, starts: list[set[int]]) -> None:
    layer, info = time_mix(layer_index), boundaries(37, starts)
    v_first = random(37, 2, SIZE, seed=1) if layer_index else None
    carried = {} if v_first is None else {"v_first": v_first}
    assert_agrees(
        layer,
        lambda x: layer(x, info, carried).update,
        lambda x, w: oracle(x, w, v_first, starts)[0],
        random(37, 2, SIZE),
    )


def test_v_first_carries_values_and_gradients_upward() -> None:
    first, second, info = time_mix(0), time_mix(1), boundaries(9, [set()])
    x = random(9, 1, SIZE).requires_grad_()
    out, made, _ = first(x, info)
    v_first = made["v_first"]
    weights = {spec.name: p for spec, p in named_specs(first)}
    assert_close(v_first, oracle(x, weights, None, [set()])[1], 1e-12, "v_first")
    assert not second(out, info, made).carried
    above = random(9, 1, SIZE, seed=2).requires_grad_()
    v_first = v_first.detach().requires_grad_()
    expected = v_first.detach().clone().requires_grad_()
    second(above, info, {"v_first": v_first}).update.square().sum().backward()
    weights = {spec.name: p for spec, p in named_specs(second)}
    oracle(above, weights, expected, [set()])[0].square().sum().backward()
    assert_close(v_first.grad, expected.grad, 1e-11, "gradient of v_first")
    with pytest.raises(ValueError, match="v_first is missing"):
        second(above, info)


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [12]])
@pytest.mark.parametrize("layer_index", [0, 1])
def test_generation_equals_the_parallel_form(pieces: list[int], layer_index: int) -> None:
    layer = time_mix(layer_index)
    x, v_first = random(12, 2, SIZE), random(12, 2, SIZE, seed=1) if layer_index else None
    whole = layer(x, PackedSequence(2, 12, x.device), {} if v_first is None else {"v_first": v_first}).update
    state, out, at = RWKV7State(), [], 0
    for length in pieces:
        part = slice(at, at + length)
        info = PackedSequence(2, length, x.device, offset=at)
        carried = {} if v_first is None else {"v_first": v_first[part]}
        out.append(layer(x[part], info, carried, state).update)
        at += length
    assert_close(torch.cat(out), whole, 1e-12, "output")


def test_packed_documents_equal_separate_ones() -> None:
    layer, x, v_first = time_mix(1), random(50, 1, SIZE), random(50, 1, SIZE, seed=1)
    packed = layer(x, boundaries(50, [{7, 8, 40}]), {"v_first": v_first}).update
    for start, stop in ((0, 7), (7, 8), (8, 40), (40, 50)):
        info = PackedSequence(1, stop - start, x.device)
        alone = layer(x[start:stop], info, {"v_first": v_first[start:stop]}).update
        assert_close(packed[start:stop], alone, 1e-12, f"document {start}")


def test_bf16_stays_close_to_fp64_and_keeps_vectors_wide() -> None:
    wide, narrow = time_mix(1), time_mix(1, torch.bfloat16)
    x, v_first, info = random(40, 2, SIZE), random(40, 2, SIZE, seed=1), PackedSequence(2, 40, torch.device("cpu"))
    state = RWKV7State()
    out = narrow(x.bfloat16(), info, {"v_first": v_first.bfloat16()}, state).update
    assert out.dtype == torch.bfloat16 and narrow.w0.dtype == torch.float32 and narrow.w1.weight.dtype == torch.bfloat16
    assert state.wkv is not None and state.wkv.dtype == torch.float32
    assert_close(out, wide(x, info, {"v_first": v_first}).update, 3e-2, "output")


def test_initial_values_are_the_published_ones() -> None:
    layers, c = 4, 128
    cfg = dataclasses.replace(ModelConfig(), hidden_size=c)
    i = torch.arange(c, dtype=torch.float64)
    u = ((i % 64) - 31.5) / 31.5
    zigzag, linear = u * u.abs(), i / (c - 1) - 0.5
    for index in (0, 2):
        layer = RWKV7TimeMix(layer_context(cfg, index=index, count=layers, first=not index))
        name_parameters(layer, "m")
        initialize_parameters(layer, CTX, seed=1)
        down, up = 1 - index / layers, index / (layers - 1)
        expected = {
            "x_r": 1 - (i / c) ** (0.2 * down),
            "x_g": 1 - (i / c) ** (0.2 * down),
            "x_w": 1 - (i / c) ** (0.9 * down),
            "x_a": 1 - (i / c) ** (0.9 * down),
            "x_k": 1 - (i / c) ** (0.7 * down),
            "x_v": 1 - (i / c) ** (0.7 * down),
            "w0": -6 + 6 * (i / (c - 1)) ** (1 + up**0.3) + 0.5 + 2.5 * zigzag,
            "a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
            "k_k": 0.71 - 0.1 * linear,
            "k_a": torch.full_like(i, 1.02),
            "r_k": torch.full((2, 64), -0.04, dtype=torch.float64),
            "ln_x.weight": torch.full_like(i, ((1 + index) / layers) ** 0.7),
            "ln_x.bias": torch.zeros_like(i),
            "output.weight": torch.zeros(c, c, dtype=torch.float64),
        }
        expected |= {f"{letter}1.weight": torch.zeros(c, 32, dtype=torch.float64) for letter in "wa"}
        if index:
            expected["v0"] = 0.73 - 0.4 * linear
        values = {spec.name.removeprefix("m."): p.detach() for spec, p in named_specs(layer)}
        assert ("v1.weight" in values) == bool(index)
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value, rtol=1e-12, atol=1e-12, msg=name)
        eye = torch.eye(c, dtype=torch.float64)
        for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0)):
            weight = values[f"{name}.weight"]
            torch.testing.assert_close(weight @ weight.T, gain**2 * eye, rtol=1e-9, atol=1e-9)
        for letter in "wag":
            factor = values[f"{letter}2.weight"]
            torch.testing.assert_close(factor @ factor.T, 0.01 * torch.eye(factor.shape[0], dtype=torch.float64))


def test_optimizer_groups_are_the_published_ones() -> None:
    specs = {spec.name.removeprefix("m."): spec for spec, _ in named_specs(time_mix(1))}
    assert {n for n, s in specs.items() if s.weight_decay} == {
        f"{n}.weight" for n in ("receptance", "key", "value", "output")
    }
    assert {n for n, s in specs.items() if s.lr_mult != 1} == {"w0"} and specs["w0"].lr_mult == 2


@pytest.mark.parametrize(
    ("size", "ranks"),
    [(512, (64, 64, 32, 128)), (768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (3072, (128, 128, 96, 288)),
     (6144, (192, 192, 128, 384)), (12288, (288, 288, 192, 544))],
)  # fmt: skip
def test_ranks_follow_the_published_rule(size: int, ranks: tuple[int, ...]) -> None:
    assert dataclasses.astuple(lora_ranks(ModelConfig(hidden_size=size))) == ranks


def test_normal_init_has_the_scale_of_the_orthogonal_one() -> None:
    scales = []
    for init in ("orthogonal", "normal"):
        cfg = dataclasses.replace(ModelConfig(), hidden_size=256, rwkv_init=init, init_std_scale=0.8)
        layer = RWKV7TimeMix(layer_context(cfg, torch.float32, index=1, count=4, first=False))
        name_parameters(layer, "m")
        initialize_parameters(layer, CTX, seed=1)
        scales.append(
            [p.square().mean().sqrt().item() for p in (layer.receptance.weight, layer.key.weight, layer.g2.weight)]
        )
    assert scales[0][0] == pytest.approx(0.8 / 16, rel=1e-3)
    assert scales[1] == pytest.approx(scales[0], rel=0.03)
