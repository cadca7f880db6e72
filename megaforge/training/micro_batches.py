"""``--halve-micro-batch-on-oom``: a step that runs out of memory is made again in smaller pieces."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaforge.checkpoint.checkpoint import layout_of
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.data.loader import Batch
from megaforge.device import release_cached_memory
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.parallel.agree import exchange, from_first_rank
from megaforge.parallel.context import ParallelContext

if TYPE_CHECKING:
    from megaforge.training.batch_sums import BatchSums
    from megaforge.training.engine import Engine
    from megaforge.training.objectives import Objective
    from megaforge.training.trainer import Trainer

FILE = "micro_batch.json"
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that an allocation failed, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


class MicroBatches:
    """Cuts a rank's micro-batches into ``parts``, twice as many each time that memory does not suffice: the same
    samples, the same global batch and the same sums up to their order.

    A rank that runs out of memory leaves its step; the others can only be told where they wait for it anyway. Without
    tp, pp, cp and ep these are the sums of gradients: it takes part in them with what it has, says that its part is
    lost, and all make the step again. Elsewhere it ends, with the smaller size in ``micro_batch.json`` below
    ``--save``, which the next start follows.
    """

    def __init__(self, config: Config, ctx: ParallelContext) -> None:
        self.size, self.parts = config.training.micro_batch_size, 1
        self._asked, self._ctx = config.resilience.halve_micro_batch_on_oom, ctx
        self._in_job = ctx.world.size == 1 or (
            all(axis.size == 1 for axis in (ctx.tp, ctx.pp, ctx.cp, ctx.ep))
            and config.parallel.zero_stage < 2
            and config.parallel.grad_compression == "none"
            and not config.optimizer.qk_clip
        )
        self._file = None if config.checkpoint.save is None else Path(config.checkpoint.save) / FILE
        self._error: str | None = None

    @property
    def now(self) -> int:
        """Samples of a micro-batch as it is run."""
        return self.size // self.parts

    def cut(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches to run."""
        return [piece for batch in batches for piece in _pieces(batch, self.parts)]

    def forward_backward(self, engine: Engine, batches: Sequence[Batch], objective: Objective) -> BatchSums:
        """As :meth:`Engine.forward_backward`, of the cut batches; where memory does not suffice, sums that are
        :attr:`~megaforge.training.batch_sums.BatchSums.lost`.

        Raises:
            UserError: memory does not suffice, and the others cannot be told.
        """
        try:
            return engine.forward_backward(self.cut(batches), objective)
        except (RuntimeError, MemoryError) as error:
            if not self._asked or not is_out_of_memory(error):
                raise
            self._error = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside of the handler: the error's traceback holds the tensors.
        gc.collect()
        release_cached_memory(self._ctx.device)
        if not self._in_job:
            self._check_half()
            self._record(self.now // 2)
            raise UserError(self._restart())
        return engine.lost(objective)

    def halve(self, trainer: Trainer) -> None:
        """Cuts in twice as many pieces from now on. Collective.

        Raises:
            UserError: on every rank: they cannot be smaller.
        """
        told = exchange(self._ctx, self._error)
        self._error = self._error or next((text for text in told if text is not None), None)
        self._check_half()
        self._error, self.parts = None, 2 * self.parts
        gc.collect()
        release_cached_memory(self._ctx.device)
        if self._ctx.is_first_rank:
            self._record(self.now)
        short = [rank for rank, text in enumerate(told) if text is not None]
        reason = next(text for text in told if text is not None)
        trainer.events.tell(
            "out_of_memory", step=trainer.iteration + 1, ranks=short, micro_batch_size=self.now, error=reason
        )
        print_rank_0(
            f"iteration {trainer.iteration + 1}: rank {', '.join(map(str, short))} is out of memory ({reason}): the "
            f"step is made again, with micro-batches of {self.now} from now on"
        )

    def _check_half(self) -> None:
        if self.now % 2:
            raise UserError(
                f"--micro-batch-size {self.size}: memory does not suffice for micro-batches of {self.now} "
                f"({self._error}), and they cannot be halved; --recompute full, --zero 1, more ranks for each sequence "
                "(--tp, --cp) or a shorter --seq-length take less"
            )

    def _restart(self) -> str:
        half = self.now // 2
        how = f"started again it takes {half}" if self._file is not None else f"start it with --micro-batch-size {half}"
        return (
            f"--micro-batch-size {self.now}: memory does not suffice ({self._error}); at this layout the run cannot go "
            f"on by itself: {how}"
        )

    def _record(self, size: int) -> None:
        if self._file is None:
            return
        record = {"micro_batch_size": size, "instead_of": self.size, "layout": layout_of(self._ctx)}
        try:
            with replacing(self._file, f"{self._file}.{os.getpid()}") as temporary:
                temporary.write_text(json.dumps(record) + "\n", encoding="ascii")
        except OSError as error:
            print_rank_0(f"{self._file}: the micro-batch size could not be recorded ({error.strerror})")

    def follow(self) -> None:
        """Takes the size that an earlier attempt of this run, at this layout, has come to. Collective."""
        if not self._asked or self._file is None:
            return
        file, layout = self._file, layout_of(self._ctx)
        told = from_first_rank(self._ctx, lambda: _read(file))
        if told is None or told.get("instead_of") != self.size or told.get("layout") != layout:
            return
        size = told.get("micro_batch_size")
        if isinstance(size, int) and 0 < size < self.size and self.size % size == 0:
            self.parts = self.size // size
            print_rank_0(f"micro-batches of {size}, as {file} says, where --micro-batch-size {self.size} was too large")


def _read(file: Path) -> dict[str, Any] | None:
    try:
        told = parse_json(file.read_bytes()) if file.exists() else None
    except (OSError, ValueError) as error:
        print_rank_0(f"{file} is left aside: {error}")
        return None
    return told if isinstance(told, dict) else None


def _pieces(batch: Batch, parts: int) -> list[Batch]:
    """``batch`` in equal pieces, in order."""
    if parts == 1:
        return [batch]
    rows = len(batch.tokens) // parts

    def cut(value: Any, part: slice) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(one, part) for one in value)
        if isinstance(value, Mapping):
            return {name: cut(one, part) for name, one in value.items()}
        return value[part] if isinstance(value, torch.Tensor) else value

    names = [field.name for field in dataclasses.fields(batch)]
    return [
        dataclasses.replace(batch, **{name: cut(getattr(batch, name), slice(row, row + rows)) for name in names})
        for row in range(0, rows * parts, rows)
    ]
