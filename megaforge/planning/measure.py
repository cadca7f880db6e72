"""What a part of the model needs for one micro-batch, measured: its own code runs forward and backward on the meta
device, over groups that only count. Nothing here knows what a layer does.

A model has few kinds of block, and a block's mixer and FFN depend on few sizes of a layout, so that a search of
thousands of layouts takes some hundred measurements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import ahead_of, blocks_of
from megaforge.models.hybrid import HybridModel
from megaforge.nn.compressed import CompressedActivations
from megaforge.nn.offload import HostMemory
from megaforge.nn.recompute import recomputed
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.layer_context import LayerContext, make_layer_context
from megaforge.parallel.layers import linears
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.planning.counting_group import Sent, counting_context
from megaforge.planning.meter import MetaRun, StorageMeter, fused_attention, storage_key
from megaforge.planning.stage_run import run_backward, starts_of, without_gradients


class Sizes(NamedTuple):
    """What the cost of a part depends on: fields of a :class:`megaforge.planning.layout.PlannedLayout`. ``recompute``
    is none, selective, or full for the part alone."""

    tp: int
    cp: int
    cp_comm_type: str
    ep: int
    etp: int
    sequence_parallel: bool
    rows: int
    sequence_length: int
    dtype: torch.dtype
    device_type: str
    recompute: str
    offload: bool
    compress: bool
    splits_backward: bool
    wkv_backend: str
    sequence_checkpoint: int | None = None


@dataclass(frozen=True)
class Cost:
    """Bytes that a part, or a pipeline stage, needs for one micro-batch.

    Attributes:
        input: of its input, the residual stream.
        kept: what it alone keeps between its forward and its backward pass, its input included where it keeps it.
        shared: what it keeps and other parts keep too, by name: carried tensors, and those of the micro-batch's
            :class:`PackedSequence`.
        reads: carried tensors that it reads, whether it keeps them or not.
        touched: tensors of the micro-batch's :class:`PackedSequence` that are there once it has run.
        working: the most alive at once besides what is kept (and what is waiting), forward or backward.
        host: what goes to host memory in the forward pass (``--cpu-offload-activations``), and comes back.
        ahead: the most that is on its way to host memory, or back early; part of a stage's ``working``.
        waiting: what is alive between the halves of a split backward pass besides what is kept; 0 without.
        forward, backward: what is sent, by axis.
    """

    input: float
    kept: float
    shared: Mapping[str, float] = field(default_factory=dict)
    reads: Mapping[str, float] = field(default_factory=dict)
    touched: Mapping[str, float] = field(default_factory=dict)
    working: float = 0.0
    ahead: float = 0.0
    waiting: float = 0.0
    host: float = 0.0
    forward: Sent = field(default_factory=dict)
    backward: Sent = field(default_factory=dict)

    def sent(self, axis: str) -> float:
        return self.forward.get(axis, 0.0) + self.backward.get(axis, 0.0)


Shapes = Mapping[str, tuple[int, ...]]
Given = tuple[list[Tensor], dict[str, Tensor]]  # what is differentiated, and carried tensors that are new
Forward = Callable[[Tensor, dict[str, Tensor], PackedSequence], Given]
Build = Callable[[ParallelContext], tuple[nn.Module, Forward]]


def measure_layer(cfg: ModelConfig, index: int, place: int, sizes: Sizes, arriving: Shapes) -> Cost:
    """The cost of layer ``place`` of block ``index`` (0: its mixer, 1: its FFN), norm and residual sum included.

    Args:
        arriving: carried tensors that earlier layers have made, and their shapes.
    """

    def build(ctx: ParallelContext) -> tuple[nn.Module, Forward]:
        layer = dataclasses.replace(_layer_context(cfg, ctx, sizes), recompute=sizes.recompute)
        [block] = HybridModel(layer, range(index, index + 1)).blocks  # in a model, so that converters see it

        def forward(x: Tensor, carried: dict[str, Tensor], info: PackedSequence) -> Given:
            given = (place, x, info, tuple(carried), None, *carried.values())
            update, made, losses = recomputed(sizes.recompute == "full", block.update, *given)
            return [x + update, *(tensor for _, tensor in _tensors(losses))], dict(made)

        return block, forward

    return _measure(cfg, sizes, build, arriving)


def measure_block(cfg: ModelConfig, index: int, sizes: Sizes, arriving: Shapes) -> Cost:
    """The cost of the whole block ``index``; arguments as :func:`measure_layer`'s, and ``recompute`` as the flag."""

    def build(ctx: ParallelContext) -> tuple[nn.Module, Forward]:
        layer = dataclasses.replace(_layer_context(cfg, ctx, sizes), recompute=sizes.recompute)
        [block] = HybridModel(layer, range(index, index + 1)).blocks

        def forward(x: Tensor, carried: dict[str, Tensor], info: PackedSequence) -> Given:
            out, after, losses = block(x, info, carried)
            made = {name: tensor for name, tensor in after.items() if name not in carried}
            return [out, *(tensor for _, tensor in _tensors(losses))], made

        return block, forward

    return _measure(cfg, sizes, build, arriving)


def measure_end(cfg: ModelConfig, sizes: Sizes, *, last: bool) -> Cost:
    """The cost of the embedding, or (``last``) of final norm, head and loss, further predictions
    included."""
    place = len(blocks_of(cfg)) if last else 0

    def build(ctx: ParallelContext) -> tuple[nn.Module, Forward]:
        layer = dataclasses.replace(_layer_context(cfg, ctx, sizes), recompute=sizes.recompute)
        model = HybridModel(layer, range(place, place))

        def forward(x: Tensor, carried: dict[str, Tensor], info: PackedSequence) -> Given:
            tokens = torch.zeros(sizes.rows, sizes.sequence_length, dtype=torch.int64, device=ctx.device)
            mask = torch.ones(tokens.shape, device=ctx.device)
            later = [(tokens, mask)] * len(ahead_of(cfg)) if last else []
            packed, received = info if later else None, {"x": x} if last else {}
            output, sent = model.run_stage(tokens, tokens, mask, packed, later, received=received)
            more = [term.sum for term in output.terms.values()]
            return [output.loss_sum, *more] if last else [sent["x"]], {}

        return model, forward

    return _measure(cfg, sizes, build, {})


def _layer_context(cfg: ModelConfig, ctx: ParallelContext, sizes: Sizes) -> LayerContext:
    return make_layer_context(
        cfg,
        ctx,
        sequence_parallel=sizes.sequence_parallel,
        dtype=sizes.dtype,
        cp_comm_type=sizes.cp_comm_type,
        overlap_tp_comm=not sizes.splits_backward,
        backends={"wkv": sizes.wkv_backend},
        sequence_checkpoint=sizes.sequence_checkpoint,
    )


def _measure(cfg: ModelConfig, sizes: Sizes, build: Build, arriving: Shapes) -> Cost:
    axes = {"tp": sizes.tp, "cp": sizes.cp, "ep": sizes.ep, "etp": sizes.etp}
    on_meta = sizes.device_type == "meta"
    with counting_context(sizes.device_type, sizes.sequence_parallel, **axes) as (ctx, sent):
        module, forward = build(ctx)
        parameters = list(module.parameters())
        if not on_meta:  # whatever lies in memory may be no number
            for parameter in parameters:
                parameter.data.fill_(0.01)
        for _, layer in linears(module):
            layer.op.make_ready(layer.matrix)  # kept from one micro-batch to the next: no activation
        # Leaves as large as the inputs would live as long as the graph, whether the part keeps them or not.
        anchors = {
            name: torch.zeros((), dtype=sizes.dtype, device=ctx.device, requires_grad=True) for name in ("", *arriving)
        }
        known = [*parameters, *anchors.values()]
        meter = MetaRun(known) if on_meta else StorageMeter(known)
        with without_gradients(parameters), meter, fused_attention() if on_meta else nullcontext():
            shards = ContextParallelShard(ctx.cp, sizes.cp_comm_type)
            rows = sizes.sequence_length // sizes.cp // (sizes.tp if sizes.sequence_parallel else 1)
            info = PackedSequence(sizes.rows, sizes.sequence_length, ctx.device, shards=shards)
            x = anchors[""].expand(rows, sizes.rows, cfg.hidden_size).clone()
            carried = {name: anchors[name].expand(shape).clone() for name, shape in arriving.items()}
            saving = HostMemory(parameters)
            coding = CompressedActivations(parameters) if sizes.compress else nullcontext()
            with coding, saving if sizes.offload else nullcontext():
                outputs, made = forward(x, carried, info)
            named = {
                storage_key(tensor): (name, tensor.untyped_storage().nbytes())
                for name, tensor in (*_tensors(vars(info), "packed"), *_tensors(carried), *_tensors(made))
            }
            touched = dict(item for item in named.values() if item[0].startswith("packed"))
            size = x.nbytes
            roots, starts = starts_of([*outputs, *made.values()])
            del x, info, carried, outputs, made
            kept, going = meter.live, dict(sent)
            shared = dict(item for key, item in named.items() if meter.is_alive(key))
            read = _notice_gradients(anchors)
            between = run_backward(
                meter, roots, starts, list(anchors.values()), parameters, split=sizes.splits_backward
            )
    return Cost(
        input=size,
        kept=kept - sum(shared.values()),
        shared=shared,
        reads={name: math.prod(shape) * sizes.dtype.itemsize for name, shape in arriving.items() if name in read},
        touched=touched,
        working=meter.peak - max(kept, between),
        ahead=saving.ahead,
        waiting=max(0, between - kept),
        host=saving.moved,
        forward=going,
        backward={axis: size - going.get(axis, 0.0) for axis, size in sent.items()},
    )


def _notice_gradients(anchors: dict[str, Tensor]) -> set[str]:
    """Will hold the names of those that a gradient has reached."""
    read: set[str] = set()
    for name, anchor in anchors.items():
        anchor.register_hook(lambda _, name=name: read.add(name))
    return read


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in ``value`` (records, dictionaries and sequences of them), with the path to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for place, item in enumerate(value):
            yield from _tensors(item, f"{path}.{place}")
    elif dataclasses.is_dataclass(value):
        yield from _tensors(vars(value), path)
