"""``--digest-interval``: what two runs are compared by, written down while they train."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.monitor.compare_digests import FILE
from megaforge.optim.digests import Digest, added_up, digests, hashed_rows
from megaforge.parallel.agree import from_first_rank
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class Digests(Callback):
    """Of each step that is due: of every weight after it, of every gradient (summed over the global batch, not
    clipped), and of the residual stream behind each block, over all tokens of the batch."""

    place = Place.BEFORE

    def __init__(self, every: int, file: Path, sequence_parallel: bool) -> None:
        """``sequence_parallel``: ranks of tp have parts of the residual stream, not copies."""
        self.every, self.file, self._sequence_parallel = every, file, sequence_parallel
        self._hooks: list[RemovableHandle] = []
        self._activations: dict[int, tuple[Tensor, Tensor]] = {}  # by block: hashes and squares
        self._gradients: dict[str, Digest] = {}

    @classmethod
    def of(cls, config: Config) -> Digests | None:
        """What the flags ask for."""
        flags = config.logging
        if not flags.digest_interval:
            return None
        file = flags.digest_file or str(Path(config.checkpoint.save or ".") / FILE)
        return cls(flags.digest_interval, Path(file), config.parallel.sequence_parallel)

    def on_step_start(self, trainer: Trainer) -> None:
        self._stop_watching()
        if (trainer.iteration + 1) % self.every:
            return
        self._activations = {}
        for chunk in trainer.model.chunks:
            for index, block in zip(chunk.stage_layers, chunk.blocks, strict=True):
                self._hooks.append(block.register_forward_hook(self._hook(index)))

    def _hook(self, index: int) -> Any:
        def add(module: nn.Module, inputs: Any, output: Any) -> None:
            rows = output[0].detach()
            squares, bits = rows.square().sum(dtype=torch.float64), hashed_rows(rows)
            before = self._activations.get(index, (torch.zeros_like(bits), torch.zeros_like(squares)))
            self._activations[index] = before[0] + bits, before[1] + squares

        return add

    def on_gradients(self, trainer: Trainer) -> None:
        if not self._hooks:
            return
        self._stop_watching()
        self._gradients = digests(trainer.optimizer.main, trainer.ctx, lambda one: one.grad)

    def _stop_watching(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.iteration % self.every:
            return
        ctx = trainer.ctx
        counts = self._sequence_parallel or ctx.tp.rank == 0
        own = {f"layers.{index}": (int(bits), float(squares)) for index, (bits, squares) in self._activations.items()}
        record = {
            "iteration": metrics.iteration,
            "loss": metrics.loss,
            "activations": _as_json(added_up(own if counts else {}, ctx)),
            "gradients": _as_json(self._gradients),
            "weights": _as_json(digests(trainer.optimizer.main, ctx, lambda one: one.master)),
        }
        from_first_rank(ctx, lambda: _append(self.file, record))


def _as_json(found: Mapping[str, Digest]) -> dict[str, list[object]]:
    return {name: [f"{digest.bits:016x}", digest.norm] for name, digest in sorted(found.items())}


def _append(file: Path, record: Mapping[str, object]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"--digest-file {file}: it cannot be written ({error.strerror})") from error
