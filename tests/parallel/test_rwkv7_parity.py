"""RWKV-7's time-mix at every tensor-parallel layout against one rank: output, loss and every gradient."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.nn.rwkv7 import RWKV7State, RWKV7TimeMix
from megaforge.parallel import mappings
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters, named_specs
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_layers import gather_full

LENGTH, BATCH, HEADS, N = 40, 2, 4, 8
SIZE = HEADS * N
CFG = ModelConfig(
    hidden_size=SIZE, rwkv_head_size=N, rwkv_decay_rank=4, rwkv_iclr_rank=5, rwkv_value_rank=6, rwkv_gate_rank=7
)


class TwoLayers(nn.Module):
    """Two residual time-mixes: v_first is made by one and mixed in by the other."""

    def __init__(self, ctx: ParallelContext, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        layer = make_layer_context(CFG, ctx, sequence_parallel=sequence_parallel, dtype=dtype)
        self.region = layer.region
        self.layers = nn.ModuleList(RWKV7TimeMix(replace(layer, index=i, count=2, first=not i)) for i in range(2))
        name_parameters(self)
        initialize_parameters(self, ctx, seed=3)
        perturb(self, ctx)

    def forward(self, x: Tensor, info: PackedSequence) -> Tensor:
        carried: dict[str, Tensor] = {}
        for layer in self.layers:
            out, made, _ = layer(x, info, carried)
            x, carried = x + out, {**carried, **made}
        return x


def run_layers(tp: int, sequence_parallel: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss, gradient of the input and of every parameter, as global tensors."""
    ctx = ParallelContext.create(tp=tp)
    model = TwoLayers(ctx, sequence_parallel, dtype)
    reducer = GradientReducer(model, ctx)
    reducer.zero_grad()
    generator = torch.Generator().manual_seed(11)
    x, direction = (torch.randn(LENGTH, BATCH, SIZE, generator=generator, dtype=torch.float64).to(dtype) for _ in "xd")
    x.requires_grad_()
    start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    start[0, [5, 33]] = True
    info = PackedSequence(BATCH, LENGTH, x.device, start)
    share = x
    if model.region.sequence_parallel:
        share, direction = x.chunk(tp)[ctx.tp.rank], direction.chunk(tp)[ctx.tp.rank]
    loss = (model(share, info) * direction).double().sum()
    loss.backward()
    reducer.finish_grad_sync()
    dx = x.grad
    if model.region.sequence_parallel:
        loss = mappings.reduce_from_tensor_parallel(loss, ctx.tp)
        dx = mappings.reduce_from_tensor_parallel(dx, ctx.tp)
    grads = {spec.name: gather_full(spec, p.main_grad, ctx) for spec, p in named_specs(model)}
    return {"loss": loss.detach(), "dx": dx, **grads}


@functools.cache
def one_rank() -> dict[str, Tensor]:
    return run_layers(1, False, torch.float64)


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "dtype", "tolerance"),
    [(2, False, torch.float64, 1e-12), (4, True, torch.float64, 1e-12), (4, True, torch.float32, 1e-5)],
)
def test_every_gradient_agrees_with_one_rank(
    ranks: RankPool, tp: int, sequence_parallel: bool, dtype: torch.dtype, tolerance: float
) -> None:
    expected = one_rank()
    for rank, got in enumerate(ranks.run(tp, run_layers, tp, sequence_parallel, dtype)):
        assert got.keys() == expected.keys()
        for name, reference in expected.items():
            assert reference.norm() > 0, f"{name} is zero"
            error = ((got[name].double() - reference).norm() / reference.norm()).item()
            assert error <= tolerance, f"rank {rank}, {name}: relative difference {error:.2e}"


def generate(tp: int) -> tuple[Tensor, Tensor]:
    """The first layer in parallel form and token by token."""
    ctx = ParallelContext.create(tp=tp)
    layer = TwoLayers(ctx, False, torch.float64).layers[0]
    x = torch.randn(6, BATCH, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x, PackedSequence(BATCH, 6, x.device)).update
        state = RWKV7State()
        infos = [PackedSequence(BATCH, 1, x.device, offset=t) for t in range(6)]
        steps = [layer(x[t : t + 1], info, {}, state).update for t, info in enumerate(infos)]
    return whole, torch.cat(steps)


def test_generation_with_sharded_states(ranks: RankPool) -> None:
    for whole, steps in ranks.run(2, generate, 2):
        torch.testing.assert_close(steps, whole, rtol=1e-11, atol=1e-11)
