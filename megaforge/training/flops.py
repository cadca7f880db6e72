"""How much arithmetic a step is, and how much this machine can do at most."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megaforge.config.model_config import ModelConfig
from megaforge.device import synchronize
from megaforge.models.hybrid import HybridModel
from megaforge.models.pattern import blocks_of
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec, named_specs

_BURST_SECONDS = 0.15
_EDGE = {"cpu": 1024, "cuda": 8192}


def active_matmul_parameters(model: HybridModel) -> float:
    """Elements of the global matrices that one token is multiplied with: of the experts the chosen ones; the
    embedding only where it is also the head, for looking a row up is no product."""
    return sum(spec.numel * _active_share(spec, model.cfg) for spec, _ in named_specs(model))


def _active_share(spec: ParamSpec, cfg: ModelConfig) -> float:
    elementwise = len(spec.shape) < 2 or spec.name.endswith(".r_k")
    looked_up = spec.kind == "embedding" and cfg.untie_embeddings_and_output_weights
    if elementwise or looked_up:
        return 0.0
    return cfg.moe_router_topk / cfg.num_experts if spec.kind == "moe" else 1.0


def model_flops_per_token(model: HybridModel, sequence_length: int) -> float:
    """Floating-point operations of one token's forward and backward pass, recomputation not counted.

    Three times the forward pass (the backward pass does two products for each of its own), which is

    - 2 for every active matrix element (:func:`active_matmul_parameters`);
    - in an attention block 2 * s * heads * head size: scores and weighted values over s/2 earlier tokens on average
      (document boundaries make it less);
    - in an RWKV-7 block 9 N^2 a head of size N: decay (1), removal (2 + 2), insertion (2) and reading (2) of its state
      in the recurrent form (Peng et al., arXiv 2503.14456); the chunked form does more, which does not count.
    """
    cfg = model.cfg
    forward = 2.0 * active_matmul_parameters(model)
    for block in blocks_of(cfg):
        if block.mixer == "attention":
            forward += 2.0 * sequence_length * cfg.num_attention_heads * cfg.head_dim
        else:
            forward += 9.0 * cfg.hidden_size * cfg.rwkv_head_size
    return 3.0 * forward


def measure_matmul_peak(ctx: ParallelContext, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products in ``dtype``, summed over all ranks, which measure at the same time so that
    ranks that share a machine's cores count them once. Collective."""
    edge = _EDGE.get(ctx.device.type, 1024)
    a = torch.full((edge, edge), 0.5, dtype=dtype, device=ctx.device)
    out = a @ a
    synchronize(ctx.device)
    if ctx.world.group is not None:
        dist.barrier(group=ctx.world.group)
    products, started, seconds = 0, time.perf_counter(), 0.0
    while seconds < _BURST_SECONDS:
        torch.mm(a, a, out=out)
        synchronize(ctx.device)
        products += 1
        seconds = time.perf_counter() - started
    peak = torch.tensor(2.0 * edge**3 * products / seconds, dtype=torch.float64, device=ctx.device)
    if ctx.world.group is not None:
        dist.all_reduce(peak, group=ctx.world.group)
    return float(peak.item())
