"""An agent's episodes, from step to step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megaforge.reasoning.agent.experience import Record
from megaforge.reasoning.control import PolicyControl

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class AgentControl(PolicyControl):
    """See :class:`megaforge.reasoning.control.PolicyControl`."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._dtype = torch.promote_types(trainer.engine.model.chunks[0].dtype, torch.float32)

    def kept_of(self, state: Any) -> Record:
        return Record.of(state, self._dtype)
