"""A copy of a run's state in host memory, to go back to without a checkpoint. It holds what a checkpoint does."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaforge.checkpoint.stateful import tensors_of
from megaforge.device import get_random_state, set_random_state, synchronize, zeros_in_host_memory
from megaforge.errors import UserError
from megaforge.training.checkpointing import stateful_parts

if TYPE_CHECKING:
    from megaforge.parallel.flat_shard import Entry
    from megaforge.training.trainer import Trainer


class StateCopy:
    """This rank's part of the state after :attr:`iteration`: as large as its tensors, which stay allocated.

    Attributes:
        iteration, consumed_samples: as the trainer's then.
    """

    def __init__(self) -> None:
        self.iteration = self.consumed_samples = 0
        self._tensors: dict[str, Tensor] = {}
        self._state: dict[str, Any] = {}
        self._random: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def take(self, trainer: Trainer) -> None:
        """Copies the state as it is now, over what was copied before. Collective.

        Raises:
            UserError: there is no memory for it.
        """
        parts = stateful_parts(trainer)
        self._state = copy.deepcopy({name: part.state() for name, part in parts.items()})
        self._random = {name: state.clone() for name, state in get_random_state(trainer.ctx.device).items()}
        for key, tensor in _tensors(trainer):
            if key not in self._tensors or self._tensors[key].shape != tensor.shape:
                self._tensors[key] = _room_for(tensor)
            self._tensors[key].copy_(tensor.detach(), non_blocking=True)
        synchronize(trainer.ctx.device)
        self.iteration, self.consumed_samples = trainer.iteration, trainer.consumed_samples

    def restore(self, trainer: Trainer) -> None:
        """Brings the state back as it was then. Collective."""
        for name, part in stateful_parts(trainer).items():
            part.load_state(copy.deepcopy(self._state[name]))
        with torch.no_grad():
            for key, tensor in _tensors(trainer):
                tensor.copy_(self._tensors[key])
        set_random_state(trainer.ctx.device, self._random)
        trainer.iteration, trainer.consumed_samples = self.iteration, self.consumed_samples
        trainer.optimizer.after_load()
        trainer.engine.reducer.forget_losses()


def _tensors(trainer: Trainer) -> list[tuple[str, Tensor]]:
    trainer.optimizer.wait_for_parameters()
    entries: list[Entry] = [*trainer.optimizer.weight_entries(), *tensors_of(stateful_parts(trainer))]
    return [(key, tensor) for key, _, tensor in entries]


def _room_for(tensor: Tensor) -> Tensor:
    try:
        return zeros_in_host_memory(tensor)
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"--spike-rollback: no host memory for a copy of {tensor.nbytes:,} bytes; two copies of the run's state "
            "are kept: leave it out, or use more ranks with --zero 1"
        ) from error
