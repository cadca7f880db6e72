"""Flags of a dry run: the real job's code at any number of ranks, without memory, arithmetic or peers."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class DryRunConfig:
    """A run that only checks and measures itself."""

    dry_run: bool = flag(False, "check layout, sharding, data assignment and memory of the job, print them, and exit")
    dry_run_world_size: int | None = flag(
        None,
        "ranks of the job that is tried (default: those that were started, or the fewest that the layout fills)",
        least=1,
        most=1 << 20,
    )
    dry_run_ranks: str = flag(
        "all",
        "which ranks to build: all (one for each set of ranks with the same shapes), stage (one a pipeline rank), or "
        "the number of one rank",
        metavar="all|stage|R",
    )

    def validate(self) -> None:
        if self.dry_run_ranks not in ("all", "stage") and not self.dry_run_ranks.isdigit():
            raise UserError(f"--dry-run-ranks {self.dry_run_ranks}: give all, stage or the number of a rank")
