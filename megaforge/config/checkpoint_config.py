"""Flags of checkpoints: where a run's state goes and comes from, when, and which of them stay."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """Where the run's state goes and comes from."""

    save: str | None = flag(None, "directory of checkpoints", metavar="DIR")
    load: str | None = flag(None, "checkpoint directory to continue from, at any layout", metavar="DIR")
    save_interval: int | None = flag(
        None,
        "iterations between checkpoints; 0: only at the end (default: a tenth of --train-iters, on an evaluation where "
        "--keep-best wants one; and at the latest every 30 minutes)",
        least=0,
    )
    keep_last: int = flag(3, "newest checkpoints to keep; 0: all", least=0)
    keep_best: int = flag(0, "checkpoints with the best validation loss to keep besides", least=0)
    keep_best_only: bool = flag(
        False, "with --keep-best: of older checkpoints keep these alone; the newest stays, for the run to go on from"
    )
    load_optim: bool = flag(
        True, "take the optimizer's moments and the loss scale from --load too; without them both start afresh"
    )
    load_rng: bool = flag(True, "take the random generators' states from --load too")
    reset_data: bool = flag(
        False, "with --load: read the data, which may be others, from their beginning; the iteration goes on"
    )
    finetune: bool = flag(False, "load the weights only and start the run at iteration 0")
    phase6_output: str | None = flag(
        None,
        "at the end of the run, write trained_model.pt and phase5_metadata.json from its last checkpoint there",
        metavar="DIR",
    )
    exit_on_missing_checkpoint: bool = flag(
        True, "end where --load holds no checkpoint; otherwise the run then starts anew, and says so"
    )
    pretrained_checkpoint: str | None = flag(
        None, "checkpoint directory whose weights the run starts from while --load holds nothing", metavar="DIR"
    )
    use_checkpoint_args: bool = flag(
        False, "take the flags of the model section, and the tokenizer where none is named, from the checkpoint"
    )
    ckpt_step: int | None = flag(None, "with --load DIR: its checkpoint of this iteration, not the newest", least=0)
    save_retain_interval: int | None = flag(
        None,
        "keep the checkpoints of iterations divisible by this, and otherwise --keep-last (0 means 1 here)",
        least=1,
    )

    async_save: bool = flag(
        False,
        "write checkpoints while the run goes on: it waits only until a rank's share is copied in host memory, which "
        "takes as much again as its file",
    )

    encrypt_checkpoints: bool = flag(
        False,
        "encrypt checkpoints (AES-256-GCM) by the key in the file that MEGAFORGE_KEY_FILE names, or in MEGAFORGE_KEY "
        "(extra 'encrypt')",
    )

    save_replica: str | None = flag(
        None,
        "copy every checkpoint there too: a path or an fsspec URL, as s3://bucket/run (extra 'replica')",
        metavar="URL",
    )

    def validate(self) -> None:
        every, retained = self.save_interval, self.save_retain_interval
        if every and retained is not None and retained % every:
            raise UserError(
                f"--save-retain-interval {retained}: no checkpoint may be due then; make it a multiple of "
                f"--save-interval {every}"
            )
