"""Flags of what a run survives, and of how it tells what went wrong."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run survives, and how it tells what went wrong."""

    # Ranks that hang or are slow
    hang_timeout_minutes: float | None = flag(
        None,
        "minutes without progress of any rank after which every rank tells what it waits for, and the run ends; 0: "
        "never (default: half of --distributed-timeout-minutes; never for one rank alone)",
        least=0,
    )
    straggler_factor: float = flag(
        1.5, "a rank whose own work takes so many times the ranks' median, over a --log-interval, is told of", above=1
    )
    balance_batch: bool = flag(
        False,
        "data-parallel ranks that are slower take fewer micro-batches of the same global batch, measured every "
        "--log-interval",
    )

    # Snapshots in memory
    snapshot_interval: int | None = flag(
        None,
        "iterations between snapshots of the run's state in the machine's shared memory, which a run that is started "
        "again goes on from where no checkpoint is newer; they take twice a checkpoint's share of the machine",
        least=1,
    )
    snapshot_dir: str | None = flag(
        None, "directory of snapshots, on each machine its own (default: megaforge-UID in /dev/shm)", metavar="DIR"
    )
    snapshot_peers: bool = flag(
        False, "copy each machine's snapshots to the next one too, so that the loss of one with its memory is survived"
    )
    snapshot_ranks_per_node: int | None = flag(
        None, "ranks that share a machine's memory, where they are not those of one host name", least=1
    )

    # Steps that are skipped or made again
    skip_nonfinite_steps: int = flag(
        0,
        "steps in a row that may be left out because their gradient is not finite, before the run ends (those that a "
        "lower loss scale answers are not counted)",
        least=0,
    )
    spike_rollback: int = flag(
        0,
        "steps from one copy of the run's state in host memory to the next, of which two are kept: after a spike of "
        "the loss or the gradient's norm the run goes back to one at least half as many steps old, and leaves out "
        "the batches since; 0: never",
        least=0,
    )
    spike_skip_batches: int = flag(0, "--spike-rollback: batches behind the spike's own to leave out too", least=0)
    spike_window: int = flag(
        100,
        "--spike-rollback, --repeat-suspect-steps: steps that tell what is usual",
        least=8,
        most=1 << 16,
    )
    repeat_suspect_steps: bool = flag(
        False,
        "compute a gradient that is not finite, or spikes, again before it is used: where it has other bits then, some "
        "device is broken, and the run ends",
    )

    halve_micro_batch_on_oom: bool = flag(
        False,
        "make a step that runs out of memory again with micro-batches half as large, and go on with these: the global "
        "batch and the result stay the same",
    )
    data_retries: int = flag(
        4, "times that a sample which cannot be read is tried again, after 0.5, 1, 2 ... seconds", least=0, most=12
    )

    # Ranks that come and go
    elastic: str | None = flag(
        None,
        "numbers of ranks, the least and the greatest, that the run may go on with; where the layout as written is not "
        "one of theirs, another is chosen, and the global batches stay the same",
        metavar="MIN:MAX",
    )
    requeue_exit_code: int = flag(
        0,
        "status of a run that was asked to end, by a signal or by time, before it was complete; 85, say, where "
        "slurm.conf has RequeueExit=85 (ranks started by srun, mpirun or python)",
        least=0,
        most=125,
    )
    exit_lead_minutes: float | None = flag(
        None,
        "inside a SLURM job: minutes before the job's end at which the run saves and ends; 0: it does not (default: a "
        "tenth of the time that is left at the start, at most 15)",
        least=0,
    )

    # What is put on record
    audit_trail: bool = flag(
        False,
        "append every operation to audit.jsonl in --save, each record with the hash of the one before it; signed by "
        "the key in the file that MEGAFORGE_AUDIT_KEY_FILE names, or in MEGAFORGE_AUDIT_KEY, if there is one (extra "
        "'encrypt')",
    )

    def validate(self) -> None:
        _ = self.elastic_ranks

    @property
    def elastic_ranks(self) -> tuple[int, int] | None:
        """The least and the greatest number of ranks that ``--elastic`` allows; None without it.

        Raises:
            UserError: it is not two numbers, or they are in the wrong order.
        """
        if self.elastic is None:
            return None
        least, _, most = self.elastic.partition(":")
        if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
            raise UserError(
                f"--elastic {self.elastic}: expected two numbers of ranks with a colon between them, the smaller one "
                "first, such as --elastic 8:32"
            )
        return int(least), int(most)

    def hang_seconds(self, distributed_timeout_minutes: float, world_size: int) -> float:
        """Seconds without progress after which a run of ``world_size`` ranks ends; 0: never."""
        if self.hang_timeout_minutes is not None:
            return 60 * self.hang_timeout_minutes
        return 30 * distributed_timeout_minutes if world_size > 1 else 0.0
