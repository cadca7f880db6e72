"""A model cut into pipeline stages: which blocks go where, what each rank builds, and what travels between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of, kinds_of, pipeline_cuts
from megaforge.config.run_config import ParallelConfig
from megaforge.models.ahead import embedding_is_shared
from megaforge.models.flops import ahead_flops, matmul_elements
from megaforge.models.hybrid import HybridModel
from megaforge.models.pipeline_shape import PipelinePlan, check_stages, pipeline_shape
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import LayerContext, make_layer_context
from megaforge.parallel.param_spec import declare, named_specs, spec_of
from megaforge.parallel.pipeline.executor import PipelineExecutor
from megaforge.parallel.pipeline.partition import partition_layers
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.parallel.pipeline.stage_tensors import StageTensor, StageTensors
from megaforge.parallel.pipeline.tied import tied_ranks


def plan_pipeline(cfg: ModelConfig, parallel: ParallelConfig, micro_batches: int, sequence_length: int) -> PipelinePlan:
    """The plan that the flags ask for. Needs no process group and no memory.

    Raises:
        UserError: more stages than blocks, cuts in the pattern that make another number of stages, or a schedule that
            is not defined for these numbers.
    """
    pp = parallel.pipeline_model_parallel_size
    name, vpp = pipeline_shape(cfg, parallel)
    schedule = build_schedule(name, pp=pp, vpp=vpp, microbatches=micro_batches)
    return PipelinePlan(name, pp, vpp, tuple(stage_layers(cfg, pp * vpp, sequence_length)), schedule)


def stage_layers(cfg: ModelConfig, num_stages: int, sequence_length: int) -> list[range]:
    """The blocks of every stage: as the ``|`` of the layer pattern cut it, or balanced by :func:`block_costs`. One
    stage is the whole model, whatever the pattern's cuts.

    Raises:
        UserError: see :func:`megaforge.models.pipeline_shape.check_stages`.
    """
    check_stages(cfg, num_stages)
    if num_stages == 1:
        return [range(len(blocks_of(cfg)))]
    return partition_layers(block_costs(cfg, sequence_length), num_stages, pipeline_cuts(cfg))


@lru_cache(maxsize=8)
def block_costs(cfg: ModelConfig, sequence_length: int) -> tuple[float, ...]:
    """Forward FLOPs of one token in each block: RWKV-7, attention over ``sequence_length`` tokens, the chosen experts
    or the dense FFN. The last one's include the output head, and what makes further predictions; looking up an
    embedding costs no arithmetic."""
    model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta")))
    costs = []
    for kind, block in zip(blocks_of(cfg), model.blocks, strict=True):
        matrices = matmul_elements((spec for spec, _ in named_specs(block)), cfg)
        costs.append(2.0 * matrices + kind.flops(cfg, sequence_length))
    costs[-1] += 2.0 * cfg.padded_vocab_size() * cfg.hidden_size + ahead_flops(model, sequence_length)
    return tuple(costs)


class ModelChunks(nn.Module):
    """The stages of one pipeline rank, ``chunks`` in the order of the model."""

    def __init__(self, cfg: ModelConfig, chunks: Sequence[HybridModel]) -> None:
        super().__init__()
        self.cfg = cfg
        self.stages = nn.ModuleList(chunks)

    @property
    def chunks(self) -> list[HybridModel]:
        return [chunk for chunk in self.stages if isinstance(chunk, HybridModel)]


def build_model(layer: LayerContext, plan: PipelinePlan) -> HybridModel | ModelChunks:
    """This rank's part of the model, not yet initialised: the whole :class:`HybridModel` where there is one stage.

    Raises:
        UserError: see :class:`HybridModel`.
    """
    chunks: list[HybridModel] = []
    for stage in plan.schedule.stages_of(layer.ctx.pp.rank):
        # In a V the first rank has the last stage too, which reads the embedding itself.
        shared = chunks[0].embedding.weight if chunks and chunks[0].is_first else None
        chunks.append(HybridModel(layer, plan.layers[stage], shared))
    model = chunks[0] if plan.num_stages == 1 else ModelChunks(layer.cfg, chunks)
    tied = tied_weight(model, plan)
    if tied is not None:
        spec = spec_of(tied)
        if not spec.is_tied_copy:
            declare(tied, replace(spec, tied_to="head.weight"))
    return model


def tied_weight(model: HybridModel | ModelChunks, plan: PipelinePlan) -> nn.Parameter | None:
    """This rank's copy of a matrix that the first and the last pipeline rank both have; None without such a copy."""
    first, last = tied_ranks(plan.schedule)
    if first == last or not embedding_is_shared(model.cfg):
        return None
    if model.chunks[0].is_first:
        return model.chunks[0].embedding.weight
    return model.chunks[-1].embedding_copy if model.chunks[-1].is_last else None


def make_stage_tensors(
    model: HybridModel | ModelChunks, plan: PipelinePlan, batch: int, length: int, dtype: torch.dtype
) -> StageTensors:
    """What travels between stages for micro-batches of ``batch`` sequences of ``length`` tokens: the residual stream,
    and what layers carry (RWKV-7's v_first), as far as a later stage reads it."""
    if plan.num_stages == 1:
        return {}
    cfg, chunk = model.cfg, model.chunks[0]
    ctx = chunk.ctx
    length //= ctx.cp.size
    rows = length // ctx.tp.size if chunk.region.sequence_parallel else length
    payload = {"x": StageTensor((rows, batch, cfg.hidden_size), dtype)}
    for kind in kinds_of(cfg):
        places = [index for index, block in enumerate(blocks_of(cfg)) if kind in block.layers]
        holders = [stage for stage, layers in enumerate(plan.layers) if any(place in layers for place in places)]
        for name, shape in kind.carried(cfg, length, batch, ctx.tp.size).items():
            if holders and holders[-1] > holders[0]:
                payload[name] = StageTensor(shape, dtype, carried=True, made_by=holders[0], read_until=holders[-1])
    return payload


def stage_executors(
    model: HybridModel | ModelChunks,
    plan: PipelinePlan,
    before_weight_gradients: Callable[[int, bool], None] | None = None,
) -> Callable[[int, torch.Size], PipelineExecutor]:
    """Gives the executor of this rank's stages for so many micro-batches of a shape [b, s]. The newest few are kept, as
    most batches are like those before."""
    chunk = model.chunks[0]

    @lru_cache(maxsize=8)
    def executor(count: int, shape: torch.Size) -> PipelineExecutor:
        (batch, length), schedule = shape, plan.with_micro_batches(count)
        tensors = make_stage_tensors(model, plan, batch, length, chunk.dtype)
        device, hook = chunk.ctx.device, before_weight_gradients
        return PipelineExecutor(
            schedule, chunk.ctx.pp, model.chunks, tensors, device=device, before_weight_gradients=hook
        )

    return executor
