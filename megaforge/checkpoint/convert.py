"""Checkpoints from one form into another without a run: any layout, and one safetensors file with global names.

Nothing is computed and nothing is held but one piece of a tensor at a time, so values stay the same bits and a laptop
converts what a thousand ranks wrote.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.planner import WriteItem

from megaforge.checkpoint.boxes import box_of
from megaforge.checkpoint.checkpoint import layout_of
from megaforge.checkpoint.directory import commit, discard_temporary, list_steps
from megaforge.checkpoint.encryption import Key, Seal
from megaforge.checkpoint.hashed_file import FileRecord
from megaforge.checkpoint.planner import ShardSavePlanner
from megaforge.checkpoint.safetensors_file import Slot, file_order, write_safetensors
from megaforge.checkpoint.shards import Shard
from megaforge.checkpoint.sources import TensorSource
from megaforge.checkpoint.stateful import state_prefixes
from megaforge.checkpoint.storage import CheckpointHead, CheckpointWriter
from megaforge.config.config import Config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.config.run_config import ParallelConfig, default_expert_tensor_parallel_size
from megaforge.config.schema import config_from_dict, suggestion
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.models.parameter_count import declared_parameters
from megaforge.models.pipeline_shape import PipelinePlan
from megaforge.models.prepared_run import check_run
from megaforge.models.stages import build_model
from megaforge.optim.optimizer import rule_of
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import Box, ParamSpec, named_specs
from megaforge.registry import UPDATE_RULES

OPTIMIZER_PREFIX = "optimizer."  # keys of optimizer state: optimizer.STATE.NAME
_NO_PARAMETER = ""  # what the tensors of a run's other parts belong to; rank 0 writes them
_SHOWN = 5
_PIECE = 1 << 28  # bytes of a tensor that are read and written at once: memory holds no more, however large a stack is


def write_file(source: TensorSource, file: str | Path, *, optimizer: bool = False) -> FileRecord:
    """Writes ``source`` as one safetensors file of whole tensors by global name.

    Its metadata are strings: ``step``, ``metric`` (JSON) and ``meta`` (JSON: the configuration under ``config``, and
    what else the checkpoint says).

    Args:
        optimizer: optimizer state too, as ``optimizer.STATE.NAME``, and all else that continuing the run needs;
            otherwise the weights alone, from which ``--finetune`` starts.

    Returns:
        Length and hash of the file.

    Raises:
        UserError: ``file`` exists, or cannot be written (and then does not exist).
    """
    keys = [key for key in source.tensors if optimizer or not key.startswith(state_prefixes(source.meta))]
    meta = {key: value for key, value in source.meta.items() if optimizer or key != "state"}
    metadata = {"step": str(source.step), "metric": json.dumps(source.metric), "meta": json.dumps(meta)}
    return publish_file(file, [Slot(key, *source.tensors[key]) for key in keys], source.read, metadata)


def publish_file(
    file: str | Path, slots: Iterable[Slot], read: Callable[[str], torch.Tensor], metadata: Mapping[str, str]
) -> FileRecord:
    """Writes a safetensors file whole or not at all; ``read`` gives the tensor of a slot by its name.

    Raises:
        UserError: ``file`` exists, or cannot be written (and then does not exist).
    """
    file = Path(file)
    if file.exists():
        raise UserError(f"--save {file}: it exists; remove it, or name another file")
    ordered = sorted(slots, key=file_order)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            record = write_safetensors(temporary, ordered, (read(slot.name) for slot in ordered), metadata)
    except OSError as error:
        raise UserError(f"--save {file}: it was not written ({error.strerror})") from error
    return record


def write_directory(
    source: TensorSource,
    directory: str | Path,
    parallel: ParallelConfig | None = None,
    dp: int | None = None,
    key: Key | None = None,
) -> Path:
    """Writes ``source`` as a checkpoint below ``directory``, in the files that ranks of the layout would write.

    Args:
        parallel: the layout, of which tp, cp, pp, vpp, ep and etp count; by default one rank.
        dp: data-parallel size; by default the smallest that the experts' layout allows.
        key: encrypts it.

    Returns:
        The checkpoint, which any layout loads.

    Raises:
        UserError: the tensors are not those of the model that ``source`` names, the model does not divide over the
            layout, or ``directory`` holds checkpoints or cannot be written.
    """
    directory = Path(directory)
    parallel, world_size = _fill_in(parallel or ParallelConfig(), dp)
    if directory.is_dir() and list_steps(directory):
        raise UserError(f"--save {directory}: it holds checkpoints; name another directory")
    config = _config_at(source, parallel, world_size)
    plan = check_run(config, world_size).plan
    keys = _keys_of_parameters(source, config)
    planners = _plan_ranks(source, config, plan, world_size, keys)
    layout = layout_of(_context(0, world_size, parallel), plan.num_stages // parallel.pipeline_model_parallel_size)
    seal = None if key is None else Seal.new(key, secrets.token_hex(16))
    head = CheckpointHead(source.step, layout, source.meta, source.metric, seal)
    writers = [CheckpointWriter(directory, head, rank) for rank in range(world_size)]
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    try:
        writers[0].prepare_global_plan(plans)
        results = [
            writer.write_data(plan, planner).value()
            for writer, planner, plan in zip(writers, planners, plans, strict=True)
        ]
        writers[0].finish(metadata, results)
        assert writers[0].manifest is not None
        return commit(directory, writers[0].manifest)
    except OSError as error:
        raise UserError(f"--save {directory}: the checkpoint was not written ({error.strerror})") from error
    finally:
        discard_temporary(directory, source.step)


class _CopyPlanner(ShardSavePlanner):
    """Plans a rank's file from declarations alone and reads each piece when it is written."""

    def __init__(self, source: TensorSource, shards: dict[str, Shard], *, first: bool) -> None:
        super().__init__()
        self.source = source
        self.set_up_planner(shards, is_coordinator=first)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        return self.source.read(write_item.index.fqn, box_of(chunk.offsets, chunk.sizes))


def _plan_ranks(
    source: TensorSource, config: Config, plan: PipelinePlan, world_size: int, keys: dict[str, list[str]]
) -> list[_CopyPlanner]:
    """A planner a rank, of the pieces that the rank would hold; they have shapes and no memory."""
    specs: dict[int, dict[str, ParamSpec]] = {}
    planners = []
    for rank in range(world_size):
        ctx = _context(rank, world_size, config.parallel)
        if ctx.pp.rank not in specs:
            specs[ctx.pp.rank] = {
                spec.name: spec for spec, _ in named_specs(build_model(make_layer_context(config.model, ctx), plan))
            }
        shards = {}
        for name, spec in specs[ctx.pp.rank].items():
            for key in keys[name]:
                kept = _declared(key, spec, config.optimizer)
                dtype = source.tensors[key].dtype
                boxes = [box for piece in kept.pieces(ctx) for box in _cut(piece.global_box, dtype.itemsize)]
                shards[key] = _shard(boxes, kept.shape, dtype)
        for key in keys[_NO_PARAMETER] if rank == 0 else ():
            info = source.tensors[key]
            shards[key] = _shard([tuple((0, size) for size in info.shape)], info.shape, info.dtype)
        planners.append(_CopyPlanner(source, shards, first=rank == 0))
    return planners


def _declared(key: str, spec: ParamSpec, optimizer: OptimizerConfig) -> ParamSpec:
    """The declaration of a parameter's weight or state: what its update rule keeps may have a shape of its own."""
    if not key.startswith(OPTIMIZER_PREFIX) or optimizer.optimizer not in UPDATE_RULES:
        return spec
    state = key.removeprefix(OPTIMIZER_PREFIX).partition(".")[0]
    return rule_of(optimizer, spec).state_spec(optimizer, state, spec)


def _cut(box: Box, itemsize: int) -> Iterator[Box]:
    """``box`` in slices of at most ``_PIECE`` bytes, or of one row."""
    if not box:
        yield box
        return
    (first, end), *rest = box
    rows = max(1, _PIECE // max(1, itemsize * math.prod(stop - start for start, stop in rest)))
    for start in range(first, end, rows):
        yield ((start, min(start + rows, end)), *rest)


def _shard(boxes: Iterable[tuple[tuple[int, int], ...]], shape: tuple[int, ...], dtype: torch.dtype) -> Shard:
    pieces = [
        ([start for start, _ in box], torch.empty([stop - start for start, stop in box], dtype=dtype, device="meta"))
        for box in boxes
    ]
    return Shard(shape, pieces)


def _context(rank: int, world_size: int, parallel: ParallelConfig) -> ParallelContext:
    return ParallelContext.of_rank(
        rank,
        world_size,
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.context_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
        device="meta",
    )


def _fill_in(parallel: ParallelConfig, dp: int | None) -> tuple[ParallelConfig, int]:
    """The layout with the experts' tensor parallelism that was left open, and its number of ranks."""
    tp, ep, etp = (
        parallel.tensor_model_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    inner = tp * parallel.context_parallel_size
    if dp is None:
        dp = math.lcm(inner, ep * (etp or tp)) // inner
    if etp is None and ep > 1:
        parallel = dataclasses.replace(
            parallel, expert_tensor_parallel_size=default_expert_tensor_parallel_size(tp, ep, inner * dp)
        )
    return parallel, parallel.pipeline_model_parallel_size * inner * dp


def _config_at(source: TensorSource, parallel: ParallelConfig, world_size: int) -> Config:
    """The configuration that ``source`` was trained with, at another layout."""
    saved: Any = source.meta.get("config")
    if saved is None:
        raise UserError(f"--load {source.path}: it does not say which model it is of")
    config = config_from_dict(saved, source=str(source.path))
    pattern = config.model.hybrid_layer_pattern
    uncut = None if pattern is None else pattern.replace("|", "")  # cuts are of the layout that wrote it
    model = dataclasses.replace(config.model, hybrid_layer_pattern=uncut)
    # As many micro-batches as pipeline ranks: every schedule is defined for them.
    batch = world_size // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    training = dataclasses.replace(
        config.training,
        micro_batch_size=1,
        global_batch_size=batch,
        rampup_batch_size=(),
        step_batch_size_schedule=(),
        device="cpu",
        eval_global_batch_size=None,
    )
    return dataclasses.replace(config, model=model, parallel=parallel, training=training)


def _keys_of_parameters(source: TensorSource, config: Config) -> dict[str, list[str]]:
    """For every parameter of the model the keys of its weight and state in ``source``; the rest under _NO_PARAMETER.

    Raises:
        UserError: a tensor is missing, of another shape, or belongs to no parameter.
    """
    specs = declared_parameters(config.model)
    keys: dict[str, list[str]] = defaultdict(list)
    for key, info in source.tensors.items():
        name = key.removeprefix(OPTIMIZER_PREFIX).partition(".")[2] if key.startswith(OPTIMIZER_PREFIX) else key
        if name == key and key.startswith(state_prefixes(source.meta)):
            keys[_NO_PARAMETER].append(key)
            continue
        if name not in specs:
            raise UserError(
                f"--load {source.path}: the model has no parameter {name} (tensor {key})" + suggestion(name, specs)
            )
        shape, rule = _declared(key, specs[name], config.optimizer).shape, config.optimizer.optimizer
        if info.shape != shape:
            if name != key and rule not in UPDATE_RULES:  # its file is gone, and nobody knows what it keeps
                keys[_NO_PARAMETER].append(key)
                continue
            whose = "the model" if name == key else f"--optimizer {rule}"
            raise UserError(f"--load {source.path}: {key} has the shape {info.shape}, {whose}'s is {shape}")
        keys[name].append(key)
    missing = sorted(name for name in specs if name not in keys[name])
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        listed = ", ".join(missing[:_SHOWN])
        raise UserError(f"--load {source.path}: {len(missing)} weights of the model are missing: {listed}{more}")
    return keys
