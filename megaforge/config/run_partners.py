"""What a partner rule is, and those of a run's flags: checkpoints, loop, logs. See :mod:`megaforge.config.partners`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megaforge.config.config import Config
from megaforge.config.micro_batch_config import AUTO


class Partner(NamedTuple):
    """One rule.

    Attributes:
        keys: the flags, as ``section.name`` of settings.
        needs: whether the configuration has what they need.
        text: what is wrong and what to write; the sentence begins with the flag and its value.
        refuse: whether the run is another one than was asked for; otherwise the flag is idle, and rank 0 says so.
    """

    keys: tuple[str, ...]
    needs: Callable[[Config], Any]
    text: str
    refuse: bool = True


RUN_PARTNERS = (
    Partner(
        tuple(f"optimizer.{n}" for n in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")),
        lambda c: c.optimizer.loss_scale is None,
        "--loss-scale fixes the scale: it changes nothing",
        refuse=False,
    ),
    Partner(
        ("optimizer.decoupled_min_lr",),
        lambda c: c.optimizer.decoupled_lr is not None,
        "embedding and head have the rate of the others: add --decoupled-lr X",
    ),
    Partner(
        ("optimizer.start_weight_decay", "optimizer.end_weight_decay"),
        lambda c: c.optimizer.weight_decay_incr_style != "constant",
        "weight decay does not change: add --weight-decay-incr-style linear or cosine",
    ),
    Partner(
        ("optimizer.weight_decay_incr_style",),
        lambda c: c.optimizer.second_stage_at is None and not c.qat.quant_stages,
        "--second-stage-at and --quant-stages set the weight decay too: leave out the one or the other",
    ),
    Partner(
        ("training.manual_gc_interval", "training.manual_gc_eval"),
        lambda c: c.training.manual_gc,
        "collections are automatic: add --manual-gc",
        refuse=False,
    ),
    Partner(
        ("training.skip_train",),
        lambda c: c.training.eval_iters,
        "nothing is evaluated: add --eval-iters N",
    ),
    Partner(
        ("training.skip_train",),
        lambda c: c.checkpoint.load or c.checkpoint.pretrained_checkpoint,
        "there is no model to evaluate: add --load DIR",
    ),
    Partner(
        ("logging.wandb_save_dir", "logging.wandb_entity"),
        lambda c: c.logging.wandb_project,
        "no run is kept there: add --wandb-project NAME",
        refuse=False,
    ),
    Partner(
        ("prometheus.prometheus_address",),
        lambda c: c.prometheus.prometheus_port,
        "nothing is served there: add --prometheus-port N",
    ),
    Partner(
        ("checkpoint.exit_on_missing_checkpoint",),
        lambda c: c.checkpoint.load,
        "nothing is loaded: it changes nothing",
        refuse=False,
    ),
    Partner(("checkpoint.save_retain_interval",), lambda c: c.checkpoint.save, "nothing is saved: add --save DIR"),
    Partner(
        ("checkpoint.keep_best_only",), lambda c: c.checkpoint.keep_best, "no checkpoint is the best: add --keep-best N"
    ),
    Partner(
        ("checkpoint.keep_last",),
        lambda c: not c.checkpoint.keep_best_only,
        "--keep-best-only keeps the newest and the best: leave out the one or the other",
    ),
    Partner(
        ("parallel.machine",),
        lambda c: c.parallel.layout == "auto" or c.resilience.elastic or c.training.micro_batch_size == AUTO,
        "layout and micro-batch are given: add --layout auto, or --micro-batch-size auto",
    ),
    Partner(
        ("resilience.elastic",),
        lambda c: c.training.full_batch_size is not None,
        "another number of ranks would make another batch: add --global-batch-size N",
    ),
    Partner(
        ("resilience.elastic",),
        lambda c: c.parallel.world_size is None,
        "--world-size allows one number of ranks: leave out the one or the other",
    ),
    Partner(
        ("resilience.spike_skip_batches",),
        lambda c: c.resilience.spike_rollback,
        "nothing is left out after a spike: add --spike-rollback 100",
    ),
    Partner(
        ("resilience.spike_window",),
        lambda c: c.resilience.spike_rollback or c.resilience.repeat_suspect_steps,
        "nobody looks for spikes: add --spike-rollback 100 or --repeat-suspect-steps",
    ),
    Partner(
        ("resilience.repeat_suspect_steps",),
        lambda c: c.optimizer.grokfast is None and c.parallel.grad_compression == "none",
        "--grokfast and --grad-compression keep something of each gradient, so a second one is another: leave out the "
        "one or the other",
    ),
    Partner(("checkpoint.async_save",), lambda c: c.checkpoint.save, "nothing is saved: add --save DIR"),
    Partner(
        ("checkpoint.async_save",),
        lambda c: c.parallel.distributed_backend != "mpi",
        "MPI's collectives wait for each other, those of a save and of a step too: use --distributed-backend gloo or "
        "leave it out",
    ),
    Partner(("resilience.snapshot_interval",), lambda c: c.checkpoint.save, "nothing is saved: add --save DIR"),
    Partner(("resilience.audit_trail",), lambda c: c.checkpoint.save, "it is kept with checkpoints: add --save DIR"),
    Partner(
        ("resilience.snapshot_interval",),
        lambda c: c.parallel.distributed_backend != "mpi",
        "MPI's collectives wait for each other, those of a snapshot and of a step too: use --distributed-backend gloo "
        "or leave it out",
    ),
    Partner(
        ("resilience.snapshot_interval",),
        lambda c: not c.checkpoint.save or (c.checkpoint.load and not c.checkpoint.finetune),
        "this run does not go on from snapshots, and the same line again would not: add --load with the directory of "
        "--save",
        refuse=False,
    ),
    Partner(
        ("resilience.snapshot_dir", "resilience.snapshot_peers", "resilience.snapshot_ranks_per_node"),
        lambda c: c.resilience.snapshot_interval,
        "no snapshot is taken: add --snapshot-interval N",
    ),
    Partner(("checkpoint.save_replica",), lambda c: c.checkpoint.save, "nothing is saved: add --save DIR"),
    Partner(("checkpoint.encrypt_checkpoints",), lambda c: c.checkpoint.save, "nothing is saved: add --save DIR"),
    Partner(
        ("checkpoint.encrypt_checkpoints",),
        lambda c: not c.checkpoint.phase6_output,
        "--phase6-output writes the weights in plain all the same",
        refuse=False,
    ),
    Partner(
        ("compliance.enforce_compliance", "compliance.compliance_level", "compliance.min_compliance_score"),
        lambda c: c.checkpoint.save,
        "nothing is saved that could be handed on: it changes nothing without --save",
        refuse=False,
    ),
    Partner(("checkpoint.ckpt_step",), lambda c: c.checkpoint.load, "there is no directory of it: add --load DIR"),
    Partner(
        ("training.eval_test",),
        lambda c: c.training.eval_iters,
        "nothing is evaluated: add --eval-iters N",
    ),
    Partner(
        ("training.eval_test",),
        lambda c: c.data.mock_data or c.data.test_data_path or not c.data.split.strip("'\" ").endswith(",0"),
        "no document is for tests: give --split a third number, or add --test-data-path",
    ),
    Partner(
        ("data.test_data_path",),
        lambda c: c.training.eval_test,
        "nothing is tested: add --eval-test",
        refuse=False,
    ),
    Partner(
        ("data.valid_data_path",),
        lambda c: c.training.eval_iters,
        "nothing is evaluated: add --eval-iters N",
        refuse=False,
    ),
)
