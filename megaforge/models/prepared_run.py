"""Whether a run is valid: one answer for training, plans, dry runs and tools. Needs no torch: it is asked first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pkgutil import resolve_name

from megaforge.config.check_layout import Layout, check_layout
from megaforge.config.config import Config
from megaforge.data.tokenizer import Tokenizer
from megaforge.models.pipeline_shape import PipelinePlan, check_pipeline


@dataclass(frozen=True)
class PreparedRun:
    """A valid run, before any process group; :func:`check_run` makes it.

    Attributes:
        config: its configuration, vocabulary size included.
        layout: what follows from the configuration and the number of ranks.
        tokenizer: of ``--tokenizer-model``, or None.
        notes: what is legal but may surprise; rank 0 prints each once.
    """

    config: Config
    layout: Layout
    tokenizer: Tokenizer | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def plan(self) -> PipelinePlan:
        """Which blocks go to which pipeline stage, and the schedule. Made when first asked for, with torch."""
        config, plan_pipeline = self.config, resolve_name("megaforge.models.stages:plan_pipeline")
        plan: PipelinePlan = plan_pipeline(
            config.model, config.parallel, self.layout.micro_batches, config.data.seq_length
        )
        return plan


def check_run(
    config: Config, world_size: int, tokenizer: Tokenizer | None = None, notes: Iterable[str] = ()
) -> PreparedRun:
    """Checks that ``config``, whose vocabulary size is known, can run on ``world_size`` ranks.

    Args:
        tokenizer: the run's.
        notes: what is to be said besides what the layout's checks note.

    Raises:
        UserError: naming the flag, its value and one that would work.
    """
    layout = check_layout(config, world_size)
    config.model.padded_vocab_size()
    check_pipeline(config.model, config.parallel, layout, config.training.eval_global_batch_size)
    return PreparedRun(config, layout, tokenizer, (*notes, *layout.notes))
