"""Which data-parallel ranks can take another number of micro-batches than others (``--balance-batch``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megaforge.errors import UserError

if TYPE_CHECKING:
    from megaforge.config.config import Config


def alike_ranks(ranks: int, ep: int, etp: int) -> int:
    """How many neighbouring dp ranks share experts, and so exchange tokens in each micro-batch: they take as many of
    these. 1: none does.

    Args:
        ranks: that share one sequence, tp x cp.
    """
    return math.lcm(ranks, ep * etp) // ranks


def check_balancing(config: Config, dp: int, etp: int, micro_batches: int) -> list[str]:
    """Checks ``--balance-batch`` against the layout; gives what to tell of it.

    Args:
        micro_batches: of a global batch, on each dp rank where all have as many.

    Raises:
        UserError: every dp rank must take as many as the others.
    """
    parallel = config.parallel
    if not config.resilience.balance_batch:
        return []
    if dp == 1:
        return ["--balance-batch: there is one data-parallel rank, so it changes nothing"]
    if parallel.zero_stage == 2:
        raise UserError(
            "--balance-batch: --zero 2 reduces gradients behind every micro-batch, so that all ranks need as many; use "
            "--zero 1, or leave it out"
        )
    sharers = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    ep = parallel.expert_model_parallel_size
    if alike_ranks(sharers, ep, etp) == dp:
        raise UserError(
            f"--balance-batch: with --ep {ep} all {dp} data-parallel ranks exchange tokens in each micro-batch, and "
            "need as many; use a smaller --ep, or leave it out"
        )
    if micro_batches == 1:
        return [
            "--balance-batch: a rank has one micro-batch a step, so there is none to move; use a smaller "
            "--micro-batch-size or a larger --global-batch-size"
        ]
    return []
