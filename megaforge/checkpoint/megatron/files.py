"""A checkpoint of Megatron-LM as named tensors, whatever files it is in.

A tensor's name is its path in Megatron's model with global numbers of layers and experts:
``decoder.layers.3.mlp.experts.5.linear_fc1.weight``. Names that Transformer Engine's fused layers give to norms stand
for the norms: ``self_attention.linear_qkv.layer_norm_weight`` is ``input_layernorm.weight``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.checkpoint.boxes import box_of, intersect
from megaforge.checkpoint.sources import TensorInfo
from megaforge.errors import UserError
from megaforge.parallel.param_spec import Box

LATEST = "latest_checkpointed_iteration.txt"
SHOWN = 5
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


class Piece(NamedTuple):
    """A part of a tensor, where it is stored.

    Attributes:
        box: which part.
        entry: what holds it, as its reader understands it.
        at: its place along the leading dimensions of the stored tensor, which the part does not have.
        rows: (first, end) of its rows there; None: all.
    """

    box: Box
    entry: Any
    at: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None


class Stored(NamedTuple):
    """A tensor: its type and shape, and the parts that together are it."""

    info: TensorInfo
    pieces: tuple[Piece, ...]


class MegatronFiles(ABC):
    """
    Attributes:
        path: the directory of one iteration.
        iteration: at which it was saved.
        args: Megatron-LM's arguments, by name.
        tensors: of the model.
    """

    path: Path
    iteration: int
    args: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @abstractmethod
    def load(self, entry: Any) -> Tensor:
        """The stored tensor that a :class:`Piece` names."""

    def read(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            UserError: a part of it cannot be read, or is of another shape than the checkpoint says.
        """
        info, pieces = self.tensors[name]
        result: Tensor | None = None
        for box, entry, at, rows in pieces:
            part = self.load(entry)[at]
            part = part if rows is None else part[rows[0] : rows[1]]
            if tuple(part.shape) != tuple(b - a for a, b in box):
                raise UserError(f"{self.path}: a part of {name} has the shape {tuple(part.shape)}, not that of {box}")
            if len(pieces) == 1:
                return part
            result = torch.empty(info.shape, dtype=info.dtype) if result is None else result
            result[tuple(slice(a, b) for a, b in box)] = part
        assert result is not None
        return result

    def check_whole(self) -> None:
        """That the parts of each tensor cover it once.

        Raises:
            UserError: naming tensors with missing parts.
        """
        broken = [name for name, stored in self.tensors.items() if not _covered(stored)]
        if broken:
            raise UserError(f"{self.path}: parts are missing of {listed(broken)}")


def _covered(stored: Stored) -> bool:
    shape = stored.info.shape
    whole, boxes = box_of([0] * len(shape), shape), [piece.box for piece in stored.pieces]
    inside = all(intersect(box, whole) == box for box in boxes)
    overlap = any(intersect(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    return inside and not overlap and sum(_size(box) for box in boxes) == torch.Size(shape).numel()


def _size(box: Box) -> int:
    return torch.Size(b - a for a, b in box).numel()


def listed(names: list[str]) -> str:
    """The first five of ``names``, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def plain_name(name: str) -> str:
    """A name without the ways in which Transformer Engine's layers differ."""
    for fused, norm in _NORMS.items():
        name = name.replace(fused, norm)
    return re.sub(r"mlp\.experts\.(linear_fc\d\.(?:weight|bias))(\d+)$", r"mlp.experts.\2.\1", name)


def arguments_of(path: Path, args: Any) -> dict[str, Any]:
    """What a checkpoint says under ``args``.

    Raises:
        UserError: it says nothing.
    """
    state = getattr(args, "state", None)
    if not isinstance(state, dict) or "num_layers" not in state:
        raise UserError(
            f"{path}: it does not hold Megatron-LM's arguments (args), which say what model it is of; checkpoints of "
            "Megatron-LM's training scripts do"
        )
    return state
