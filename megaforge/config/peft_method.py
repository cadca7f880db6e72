"""What a value of ``--peft`` stands for. Needs no torch: the configuration is checked before torch is there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaforge.config.config import Config


@dataclass(frozen=True)
class PeftMethod:
    """A method of fine-tuning, registered by its name, in any file that ``--extensions`` names::

        PEFT_METHODS.register("mine", PeftMethod(my_converter, settings=("lora_rank",)))

    Attributes:
        converter: a :class:`megaforge.models.converters.Converter`, or ``module:attribute`` of one, imported when a
            model is built.
        settings: names of the model's flags that it reads: they do nothing beside another method.
        low_rank: whether it puts adapters beside matrices, A and B, that merge and have files of ``peft``.
        peft_type: what ``peft`` calls its files (:mod:`megaforge.checkpoint.peft_files`), or None.
        replaces_weights: whether it takes weights out of the model, which then need no memory to be built in.
        needs: what a run has to have, and what to tell its user who does not have it.
    """

    converter: str | Callable[..., None]
    settings: tuple[str, ...] = ()
    low_rank: bool = False
    peft_type: str | None = None
    replaces_weights: bool = False
    needs: tuple[tuple[Callable[[Config], Any], str], ...] = ()

    def found(self) -> Callable[..., None]:
        """The converter, imported."""
        if not isinstance(self.converter, str):
            return self.converter
        module, _, attribute = self.converter.partition(":")
        converter: Callable[..., None] = getattr(importlib.import_module(module), attribute)
        return converter
