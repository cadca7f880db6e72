"""Runs one micro-batch through one pipeline stage of the real model and measures what its activations need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megaforge.config.pattern import ahead_of
from megaforge.models.hybrid import HybridModel
from megaforge.nn.compressed import CompressedActivations
from megaforge.nn.losses import LossTerm, total_loss
from megaforge.nn.offload import HostMemory
from megaforge.parallel.layers import linears
from megaforge.parallel.pipeline.split_backward import backward_input
from megaforge.parallel.pipeline.stage_tensors import StageTensors
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.meter import MetaRun, StorageMeter, fused_attention


@dataclass(frozen=True)
class Measured:
    """Bytes of one micro-batch on one stage.

    Attributes:
        kept: alive between forward and backward pass, the input included.
        between: alive between the halves of a backward pass that the schedule splits; 0 where it does not.
        peak: the most alive at once, forward and backward, buffers of host memory included.
        host: what went to host memory (``--cpu-offload-activations``).
    """

    kept: int
    between: int
    peak: int
    host: int = 0


def run_stage(
    chunk: HybridModel,
    layout: PlannedLayout,
    payload: StageTensors | None = None,
    *,
    known: Sequence[Tensor] = (),
    on_meta: bool = True,
) -> Measured:
    """Forward and backward pass of one micro-batch through ``chunk``, the whole model or one stage of it.

    What leaves the stage is let go of once it would have been sent, as the pipeline's executor does. Parameters and
    their gradients do not count. On the meta device (``on_meta``) nothing is computed, and tokens spread evenly over
    the experts.

    Args:
        chunk: its gradients are freed as soon as they are accumulated, unless a gradient reducer has taken them in.
        payload: what travels between stages (:func:`megaforge.models.stages.make_stage_tensors`).
        known: further tensors that do not count: buffers of gradients.
    """
    parameters = list(chunk.parameters())
    standing = [*parameters, *known]
    meter = MetaRun(standing) if on_meta else StorageMeter(standing)
    split = layout.pp > 1 and layout.schedule.splits_backward
    for _, layer in linears(chunk):
        layer.op.make_ready(layer.matrix)  # kept from one micro-batch to the next: no activation
    with without_gradients(() if known else parameters), meter, fused_attention() if on_meta else nullcontext():
        inputs = _arrived(chunk, payload or {})
        saving = HostMemory(chunk.parameters())
        coding = CompressedActivations(chunk.parameters()) if layout.compress else nullcontext()
        with coding, saving if layout.offload else nullcontext():
            roots, starts = _forward(chunk, layout, payload or {}, inputs)
        kept = meter.live
        between = run_backward(meter, roots, starts, inputs, parameters, split=split)
    return Measured(kept, between, meter.peak + saving.ahead, saving.moved)


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Frees the gradient of each of ``parameters`` as soon as it is accumulated."""
    hooks = [p.register_post_accumulate_grad_hook(_free) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _free(parameter: Tensor) -> None:
    parameter.grad = None


Roots = tuple[list[GradientEdge], list[Callable[[], Tensor]]]


def starts_of(outputs: Iterable[Tensor]) -> Roots:
    """Where the backward pass starts, and what makes the gradients that arrive there."""
    differentiable = [tensor for tensor in outputs if tensor.requires_grad]
    return [get_gradient_edge(tensor) for tensor in differentiable], [_ones_like(tensor) for tensor in differentiable]


def _ones_like(tensor: Tensor) -> Callable[[], Tensor]:
    shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
    return lambda: torch.ones(shape, dtype=dtype, device=device)


def run_backward(
    meter: StorageMeter,
    roots: list[GradientEdge],
    makers: Sequence[Callable[[], Tensor]],
    inputs: list[Tensor],
    parameters: Sequence[Tensor],
    *,
    split: bool,
) -> int:
    """The backward pass; bytes alive between its halves where it is ``split``, as the executor runs them apart, else 0.
    ``inputs`` and ``roots`` are let go of between the halves."""
    if not split:
        torch.autograd.backward(roots, [make() for make in makers])
        return 0
    starts = [make() for make in makers]
    found, deferred = backward_input(roots, starts, inputs, parameters)
    del found, starts
    inputs.clear()
    roots.clear()
    between = meter.live
    deferred.run()
    return between


def _forward(chunk: HybridModel, layout: PlannedLayout, payload: StageTensors, inputs: list[Tensor]) -> Roots:
    """The roots of what the next stage gets, and of this stage's share of the loss."""
    device = chunk.ctx.device
    tokens = torch.zeros(layout.rows, layout.sequence_length, dtype=torch.int64, device=device)
    mask = torch.ones(tokens.shape, dtype=torch.float32, device=device)
    received = dict(zip(_arriving(chunk, payload), inputs, strict=True))
    later = [(tokens, mask)] * len(ahead_of(chunk.cfg))
    output, made = chunk.run_stage(tokens, tokens, mask, None, later, received=received)
    sent = {name: tensor for name, tensor in made.items() if tensor is not received.get(name) and name in payload}
    leaving = [] if chunk.is_last else list(sent.values())
    own = {"loss": LossTerm(output.loss_sum, "labels")} if chunk.is_last else {}
    counts = dict.fromkeys((term.denominator for term in output.terms.values()), 1.0)
    loss = total_loss(own | output.terms, {"labels": 1.0, **counts})
    return starts_of(leaving if loss is None else [*leaving, loss])


def _arriving(chunk: HybridModel, payload: StageTensors) -> list[str]:
    """What the stage before sends: the residual stream, and what its layers read and do not make. Nothing to the first
    stage."""
    if chunk.is_first:
        return []
    blocks = [block.kind for block in chunk.blocks]
    read = {name for block in blocks for kind in block.layers for name in kind.carried(chunk.cfg, 1, 1, 1)}
    made = {name for block in blocks if block.first for name in block.mixer.carried(chunk.cfg, 1, 1, 1)}
    return [name for name, item in payload.items() if not item.carried or name in read - made]


def _arrived(chunk: HybridModel, payload: StageTensors) -> list[Tensor]:
    arriving = [payload[name] for name in _arriving(chunk, payload)]
    return [torch.zeros(t.shape, dtype=t.dtype, device=chunk.ctx.device, requires_grad=True) for t in arriving]
