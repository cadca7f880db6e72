"""Runs one micro-batch through one pipeline stage of the real model and measures what its activations need."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megaforge.models.hybrid import HybridModel
from megaforge.nn.sequence import SequenceInfo
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.meter import FusedAttention, MetaRun, StorageMeter
from megaforge.planning.stages import StagePart


@dataclass(frozen=True)
class Measured:
    """Bytes of one micro-batch on one stage.

    Attributes:
        kept: alive between forward and backward pass, the input included.
        peak: the most alive at once, forward and backward.
        sent: bytes handed to collectives, by name; empty for real tensors.
    """

    kept: int
    peak: int
    sent: dict[str, int]


def run_stage(model: HybridModel, stage: StagePart, layout: PlannedLayout, *, on_meta: bool = True) -> Measured:
    """Forward and backward pass of one micro-batch through ``stage`` of ``model``.

    Parameters and their gradients do not count; a gradient is freed as soon as it has been accumulated. On the meta
    device (``on_meta``) nothing is computed, and tokens spread evenly over the experts.
    """
    parameters = list(model.parameters())
    hooks = [parameter.register_post_accumulate_grad_hook(_free) for parameter in parameters]
    meter = MetaRun(model.cfg.num_experts, parameters) if on_meta else StorageMeter(parameters)
    try:
        with meter, FusedAttention() if on_meta else nullcontext():
            outputs = _forward(model, stage, layout)
            kept = meter.live - outputs[0].untyped_storage().nbytes()
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    finally:
        for hook in hooks:
            hook.remove()
    return Measured(kept, meter.peak, meter.sent if isinstance(meter, MetaRun) else {})


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _forward(model: HybridModel, stage: StagePart, layout: PlannedLayout) -> Sequence[Tensor]:
    """What leaves the stage and takes part in the backward pass: residual stream and v_first, or the loss."""
    device, dtype = model.ctx.device, layout.dtype
    batch, length = layout.micro_batch_size, layout.tokens // layout.micro_batch_size
    info = SequenceInfo(batch, length, device)
    v_first: Tensor | None = None
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    if stage.first:
        x = model.embedding_norm(model.embedding(tokens))
    else:
        width = model.cfg.hidden_size
        rows = layout.residual_tokens // batch
        x = torch.zeros(rows, batch, width, dtype=dtype, device=device, requires_grad=True)
        if any(block.kind.mixer == "rwkv7" for block in model.layers):  # type: ignore[union-attr]
            v_first = torch.zeros(length, batch, width // layout.tp, dtype=dtype, device=device, requires_grad=True)
    extra = x.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
    for index in stage.blocks:
        x, v_first, routed = model.layers[index](x, v_first, info, None)
        if routed is not None:
            extra = extra + routed.load_balance_sum + routed.z_loss_sum
    if not stage.last:
        return [t for t in (x, v_first, extra) if t is not None and t.requires_grad]
    mask = torch.ones(length, batch, dtype=torch.float32, device=device)
    losses, _ = model.head.loss(model.final_norm(x), tokens)
    return [(losses * mask).sum() + extra]
