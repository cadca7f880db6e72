"""What every layer is built from, in one object in place of an argument for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megaforge.config.model_config import ModelConfig
from megaforge.config.run_config import TrainingConfig
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.init_rules import InitRule
from megaforge.parallel.param_spec import ParamSpec, make_parameter
from megaforge.parallel.region import TensorParallelRegion


@dataclass(frozen=True)
class LayerContext:
    """The model's numbers, the layout, and where in the model the layer stands.

    Attributes:
        region: between the residual stream and the tensor-parallel part of a sublayer.
        shard: the part of each sequence that this rank holds.
        dtype: of matrices and activations; what is declared ``keep_fp32`` stays in fp32 where this is a 16-bit type.
        recompute: as ``--recompute``.
        span: tokens of a recurrence between two states that are kept, as ``--sequence-checkpoint``; None: the layer
            keeps what it likes.
        backends: by the name of an operation, the implementation that was asked for: ``{"wkv": "auto"}``.
        index, count: the block, from 0, and how many the model has. Initial values depend on them.
        first: whether no earlier block has such a mixer.
        token_shift: whether a block's FFN sees each token mixed with the one before it, as RWKV's mixers want it.
        token_share: share of the tokens that the layer sees.
        without_memory: parameters lie on the device meta, until :func:`megaforge.parallel.param_spec.give_memory`.
    """

    cfg: ModelConfig
    ctx: ParallelContext
    region: TensorParallelRegion
    shard: ContextParallelShard
    dtype: torch.dtype = torch.float32
    recompute: str = "none"
    span: int | None = None
    backends: Mapping[str, str] = field(default_factory=dict)
    index: int = 0
    count: int = 1
    first: bool = True
    token_shift: bool = False
    without_memory: bool = False
    token_share: float = 1.0

    def parameter(self, shape: tuple[int, ...], init: InitRule, **declared: Any) -> nn.Parameter:
        """An uninitialised parameter of global ``shape``; ``declared``: what else :class:`ParamSpec` says of it. Its
        name will be its path in the model (:func:`megaforge.parallel.param_spec.name_parameters`)."""
        place = torch.device("meta") if self.without_memory else None
        declared = {"token_share": self.token_share, **declared}
        return make_parameter(ParamSpec("", shape, init, **declared), self.ctx, self.dtype, place)


def make_layer_context(
    cfg: ModelConfig,
    ctx: ParallelContext,
    *,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    cp_comm_type: str = "allgather",
    overlap_tp_comm: bool = True,
    recompute: str = "none",
    backends: Mapping[str, str] | None = None,
    sequence_checkpoint: int | None = None,
) -> LayerContext:
    """The context of a model's layers from what the flags say."""
    region = TensorParallelRegion(ctx, sequence_parallel, overlap=overlap_tp_comm)
    shard = ContextParallelShard(ctx.cp, cp_comm_type)
    return LayerContext(cfg, ctx, region, shard, dtype, recompute, sequence_checkpoint, backends or {})


def compute_dtype(training: TrainingConfig) -> torch.dtype:
    """The type the model computes in, from ``--bf16``, ``--fp16`` and ``--fp64``."""
    if training.bf16:
        return torch.bfloat16
    if training.fp16:
        return torch.float16
    return torch.float64 if training.fp64 else torch.float32
