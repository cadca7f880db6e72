"""Published weights as a source of our tensors: each parameter is put together from their tensors when it is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaforge.checkpoint.architectures.base import Part
from megaforge.checkpoint.boxes import box_of, intersect
from megaforge.checkpoint.sources import TensorInfo, TensorSource
from megaforge.errors import UserError
from megaforge.parallel.param_spec import Box, ParamSpec

_SHOWN = 5


class PartSource(TensorSource):
    """The parameters ``specs``, of which ``parts`` says from which tensors they are; rows of none (the vocabulary's
    padding) are zero. Nothing stays in memory."""

    def __init__(
        self,
        path: Path,
        meta: dict[str, Any],
        specs: Mapping[str, ParamSpec],
        parts: Iterable[Part],
        tensor: Callable[[Part], Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            tensor: reads one of theirs, in any floating-point type.
            dtype: what the parameters become.
        """
        self.path, self.step, self.metric, self.meta = path, 0, None, meta
        self.tensors = {name: TensorInfo(dtype, spec.shape) for name, spec in specs.items()}
        self._tensor, self._parts = tensor, defaultdict[str, list[Part]](list)
        for part in parts:
            self._parts[part.ours].append(part)

    def read(self, key: str, box: Box | None = None) -> Tensor:
        info = self.tensors[key]
        box = box_of([0] * len(info.shape), info.shape) if box is None else box
        result = torch.zeros([end - start for start, end in box], dtype=info.dtype)
        for part in self._parts[key]:
            common = intersect(part.box, box)
            if common is None:
                continue
            value = part.to_ours(self._tensor(part))
            result[_slices(common, box)] = value[_slices(common, part.box)].to(info.dtype)
        return result


def _slices(box: Box, within: Box) -> tuple[slice, ...]:
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, within, strict=True))


def check_parts(
    parts: Iterable[Part], there: Mapping[str, tuple[int, ...]], where: str, unread: tuple[str, ...] = ()
) -> None:
    """Whether the tensors ``there``, by name and shape, are those of ``parts``.

    Args:
        where: what messages call the file.
        unread: ends of names that may be there beside them.

    Raises:
        UserError: some are missing, of other shapes, or parts of a model that we do not have; with the first five.
    """
    wanted = {part.theirs: part for part in parts}
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(f"{where}: {_listed(missing, 'weight')} missing")
    odd = [
        f"{name} has the shape {there[name]}, which should be {part.shape}"
        for name, part in wanted.items()
        if not part.fits(there[name])
    ]
    if odd:
        more = f" ({len(odd) - _SHOWN} more do not fit)" if len(odd) > _SHOWN else ""
        raise UserError(f"{where}: {'; '.join(odd[:_SHOWN])}{more}")
    unknown = [name for name in there if name not in wanted and not name.endswith(unread)]
    if unknown:
        raise UserError(f"{where}: {_listed(unknown, 'tensor')} of a part of the model that we do not have")


def _listed(names: list[str], noun: str) -> str:
    shown = ", ".join(names[:_SHOWN])
    if len(names) == 1:
        return f"the {noun} {shown} is"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {noun}s ({shown}{more}) are"
