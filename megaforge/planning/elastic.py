"""``--elastic MIN:MAX``: a run goes on with another number of ranks than its layout is written for.

The global batches stay the same, so what is learned does too; the checkpoint moves to the other layout as it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.models.prepared_run import check_run
from megaforge.planning.advice import fullest_rank
from megaforge.planning.auto_layout import AutoLayout, Chosen, Decision
from megaforge.planning.gpus import Gpu
from megaforge.planning.machine import Stand


class ElasticLayout(AutoLayout):
    """The layout as written where it is valid for the ranks at hand and, by the plan, stays within ``--memory-limit``;
    otherwise the one that ``--layout auto`` chooses for them.

    Attributes:
        why: the line that says what was chosen; None where the layout is as written.
    """

    def __init__(self, origins: Mapping[str, str] | None = None) -> None:
        super().__init__(frozenset(), origins)

    def _decide(self, config: Config, stands: list[Stand]) -> Decision:
        flag = f"--elastic {config.resilience.elastic}"
        refusal = _refusal(config, len(stands), self._device(config, stands)[0])
        if refusal is None:
            return {"values": {}, "notes": [], "why": None}
        try:
            chosen = super()._decide(config, stands)
        except UserError as error:
            raise UserError(f"{flag}: {refusal}. {error}") from error
        said = f"{flag}: the layout as written is not for these {len(stands)} ranks: {refusal}"
        why = str(chosen["why"]).replace("--layout auto", flag, 1)
        return {"values": chosen["values"], "notes": [*chosen["notes"], said], "why": why}

    def _take(self, config: Config, decision: Decision) -> Chosen:
        return (config, []) if decision["why"] is None else super()._take(config, decision)


def _refusal(config: Config, world_size: int, device: Gpu) -> str | None:
    """Why ``world_size`` ranks on ``device`` cannot have the layout of ``config``, or None."""
    try:
        check_run(config, world_size)
    except UserError as error:
        return str(error)
    needed, limit = fullest_rank(config, world_size).total, config.parallel.memory_limit
    if needed <= limit * device.memory:
        return None
    return (
        f"its fullest rank needs {needed / 1e9:.3g} GB by the plan, more than {limit:.0%} of {device.memory / 1e9:.3g}"
    )
