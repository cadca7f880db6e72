"""How many sequences a rank computes at once."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag

AUTO = 0  # in place of a number: --micro-batch-size auto


@dataclass(frozen=True)
class MicroBatchConfig:
    """What :class:`megaforge.config.run_config.TrainingConfig` has of micro-batches."""

    micro_batch_size: int = flag(
        1,
        "sequences a rank computes at once; auto: as many as fit into --memory-limit, by the planner",
        least=1,
        most=1 << 20,
        words={"auto": AUTO},
    )
