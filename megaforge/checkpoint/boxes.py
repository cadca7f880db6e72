"""Rectangular pieces of tensors: do they overlap, do they cover a tensor exactly?

Loaders that skip this check leave the old memory where no saved piece lies, and nobody notices.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from megaforge.parallel.param_spec import Box


def box_of(offsets: Sequence[int], sizes: Sequence[int]) -> Box:
    """The box that starts at ``offsets`` and measures ``sizes``."""
    return tuple((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def volume(box: Box) -> int:
    """Number of elements of ``box``; a 0-d box has one."""
    return math.prod(stop - start for start, stop in box)


def intersect(one: Box, other: Box) -> Box | None:
    """What both boxes share, or None."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def find_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Indices of two boxes that share an element, or None.

    A sweep along the dimension with the most distinct starts: near linear for the grids that sharding makes, where
    comparing all pairs would take minutes at a thousand ranks.
    """
    filled = [index for index, box in enumerate(boxes) if volume(box)]
    if len(filled) < 2:
        return None
    if not boxes[filled[0]]:
        return filled[0], filled[1]
    sweep = max(range(len(boxes[filled[0]])), key=lambda dim: len({boxes[index][dim][0] for index in filled}))
    open_boxes: list[tuple[int, int]] = []  # (where it ends along the sweep, index): a heap
    for index in sorted(filled, key=lambda index: boxes[index][sweep][0]):
        start, stop = boxes[index][sweep]
        while open_boxes and open_boxes[0][0] <= start:
            heapq.heappop(open_boxes)
        for _, other in open_boxes:
            if intersect(boxes[index], boxes[other]):
                return other, index
        heapq.heappush(open_boxes, (stop, index))
    return None


def coverage_error(target: Box, boxes: Sequence[Box]) -> str | None:
    """Why ``boxes`` do not cover every element of ``target`` exactly once, or None when they do."""
    for box in boxes:
        if len(box) != len(target):
            return f"the piece {box} has {len(box)} dimensions, not {len(target)}"
        if any(a < c or b > d or b < a for (a, b), (c, d) in zip(box, target, strict=True)):
            return f"the piece {box} leaves {target}"
    overlap = find_overlap(boxes)
    if overlap is not None:
        return f"the pieces {boxes[overlap[0]]} and {boxes[overlap[1]]} overlap"
    covered, wanted = sum(map(volume, boxes)), volume(target)
    if covered != wanted:
        return f"{wanted - covered} of {wanted} elements are in no piece"
    return None
