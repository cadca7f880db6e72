"""What the teacher of ``--distill-from`` takes on every rank: its weights, and its forward pass."""

from __future__ import annotations

import dataclasses
import math

from megaforge.planning.costs import neediest_layer
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import StagePart, model_parts, stage_parameters


def teacher_bytes(layout: PlannedLayout) -> int:
    """Bytes of the teacher's weights on a rank; 0 without one."""
    if layout.teacher is None:
        return 0
    parts, ctx = model_parts(layout.teacher, layout.dtype), layout.context()
    whole = StagePart(range(len(parts.blocks)), True, True)
    return sum(
        count * math.prod(item.spec.local_shape(ctx)) * item.element_size
        for item, count in stage_parameters(parts, [whole])
    )


def teacher_pass(layout: PlannedLayout) -> float:
    """Bytes that the teacher's forward pass needs for a while, no more than: what its neediest layer keeps and works
    with when it is trained. Meanwhile the activations of the model are all there."""
    if layout.teacher is None:
        return 0.0
    parts = model_parts(layout.teacher, layout.dtype)
    return neediest_layer(parts, dataclasses.replace(layout.unsplit, recompute="none", offload=False))
