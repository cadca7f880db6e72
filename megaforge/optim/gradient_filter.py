"""What may be done to a gradient between its reduction and its clipping, whatever the update rule and the layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.errors import UserError
from megaforge.optim.main_parameters import MainParameter
from megaforge.parallel.flat_shard import Entry, optimizer_shard
from megaforge.registry import GRADIENT_FILTERS

# Elements that are filtered together: what a CPU's cache holds, and on a GPU few launches.
_STRETCH = {"cpu": 1 << 16, "cuda": 1 << 24}


class GradientFilter(ABC):
    """Changes the gradients of an update in place, and remembers earlier ones; registered by name for ``--grokfast``.

    It sees the reduced gradient without the loss scale, under ZeRO this rank's part of it. As each element is filtered
    alone, the layout changes nothing. An update that is left out is not seen: its gradient overflowed, or might do so
    once filtered (:meth:`bears`).

    Attributes:
        updates: gradients seen so far.
    """

    def __init__(self, config: OptimizerConfig, parameters: Sequence[MainParameter]) -> None:
        """``parameters``: all that this rank trains."""
        self.config, self.parameters = config, parameters
        self.updates = 0
        self._starts = [0, *accumulate(main.master.numel() for main in parameters)]

    @classmethod
    @abstractmethod
    def rows(cls, config: OptimizerConfig) -> int:
        """How many tensors of a gradient's shape and type are kept of each parameter: saved, resharded, planned for."""

    @classmethod
    @abstractmethod
    def gain(cls, config: OptimizerConfig) -> float:
        """How many times the largest element of all gradients so far any number can be that the filter computes."""

    def bears(self, norm: float) -> bool:
        """Whether filtering a gradient of this norm stays within fp32's range, whatever came before it. The norm is
        the whole model's, so that all ranks agree before any of them has changed what it keeps."""
        # Half the range is left to rounding. As larger ones never enter, what is kept is no larger either.
        return norm <= torch.finfo(torch.float32).max / (2 * max(1.0, self.gain(self.config)))

    @abstractmethod
    def filter(self) -> None:
        """Changes every gradient; :attr:`updates` counts those before this one."""

    def apply(self) -> None:
        """Filters the gradients of one update."""
        with torch.no_grad():
            self.filter()
        self.updates += 1

    @cached_property
    def kept(self) -> Tensor:
        """What is remembered, [rows, elements that this rank updates]; zeros at first."""
        rows = self.rows(self.config)
        if not self.parameters:
            return torch.zeros((rows, 0))
        # Views of parameters would be of their type, which may be narrower.
        first = self.parameters[0].master
        if any(main.master.dtype != first.dtype for main in self.parameters):
            raise ValueError("a gradient filter keeps gradients of one type")
        return torch.zeros((rows, self._starts[-1]), dtype=first.dtype, device=first.device)

    def stretches(self) -> Iterator[tuple[slice, list[tuple[slice, Tensor]]]]:
        """Columns of :attr:`kept` that follow each other, and the gradients there, 1-d: each with its place in them."""
        size = _STRETCH.get(self.kept.device.type, 1 << 24)
        for start in range(0, self._starts[-1], size):
            stop, held = min(start + size, self._starts[-1]), []
            for main, first, end in zip(self.parameters, self._starts, self._starts[1:], strict=False):
                low, high = max(start, first), min(stop, end)
                if low < high:
                    gradient = main.grad.view(-1)[low - first : high - first]
                    held.append((slice(low - start, high - start), gradient))
            yield slice(start, stop), held

    def entries(self) -> list[Entry]:
        """(``gradient_filter.ROW.NAME``, the parameter's declaration, local tensor) of what is kept."""
        return [
            (f"gradient_filter.{number}.{main.spec.name}", optimizer_shard(main.parameter), row[first:end].view(shape))
            for number, row in enumerate(self.kept)
            for main, first, end in zip(self.parameters, self._starts, self._starts[1:], strict=False)
            for shape in [main.master.shape]
        ]

    def state(self) -> dict[str, Any]:
        """What belongs in a checkpoint besides tensors (JSON)."""
        return {"filter": type(self).__name__, "rows": self.rows(self.config), "updates": self.updates}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Takes back what :meth:`state` gave.

        Raises:
            UserError: another filter kept it.
        """
        now = self.state()
        if any(saved[name] != now[name] for name in ("filter", "rows")):
            raise UserError(
                f"--grokfast {self.config.grokfast}: the checkpoint keeps {saved['rows']} tensors of each parameter "
                f"for the filter {saved['filter']}, and this run {now['rows']} for {now['filter']}; write the former "
                "--grokfast and --grokfast-window, or add --no-load-optim to start afresh"
            )
        self.updates = int(saved["updates"])


def filter_class(config: OptimizerConfig) -> type[GradientFilter] | None:
    """The filter of ``--grokfast``, or None."""
    if config.grokfast is None:
        return None
    chosen: type[GradientFilter] = GRADIENT_FILTERS.get(config.grokfast)
    return chosen


def make_filter(config: OptimizerConfig, parameters: Sequence[MainParameter]) -> GradientFilter | None:
    """The filter of ``--grokfast`` for the ``parameters`` that this rank trains, or None."""
    chosen = filter_class(config)
    return None if chosen is None else chosen(config, parameters)


def filter_rows(config: OptimizerConfig) -> int:
    """Tensors of its shape that are kept of each parameter: :meth:`GradientFilter.rows`, 0 without a filter."""
    chosen = filter_class(config)
    return 0 if chosen is None else chosen.rows(config)
