"""Host memory that checkpoints in the making and snapshots take."""

from __future__ import annotations

from megaforge.config.config import Config
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import ModelParts, cut_stages
from megaforge.planning.state_bytes import checkpoint_bytes


def host_copies(config: Config, parts: ModelParts, layout: PlannedLayout) -> dict[str, int]:
    """Bytes a rank by the flag that asks for them, on the pipeline rank with most.

    ``--async-save`` keeps a copy of what a rank writes; ``--snapshot-interval`` one more, and in shared memory two
    snapshots while one takes the place of the other; with ``--snapshot-peers`` those of a rank of another machine too.
    ``--spike-rollback`` keeps two copies of all that a rank has.
    """
    stages = cut_stages(parts, layout)
    own = [[stages[stage] for stage in layout.schedule.stages_of(rank)] for rank in range(layout.pp)]
    written = max(checkpoint_bytes(parts, held, layout) for held in own)
    copies = {
        "--async-save": 1 if config.checkpoint.async_save else 0,
        "--snapshot-interval": 3 if config.resilience.snapshot_interval else 0,
        "--snapshot-peers": 2 if config.resilience.snapshot_peers else 0,
    }
    found = {flag: count * written for flag, count in copies.items() if count}
    if config.resilience.spike_rollback:
        found["--spike-rollback"] = 2 * max(checkpoint_bytes(parts, stage, layout, held=True) for stage in own)
    return found
