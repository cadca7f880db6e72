"""Ranks of adapters by gradients (``--lora-rank-steps``): before a run its base makes some steps of the same data, and
each adapter gets the fewest ranks that hold most of its matrix's summed gradient, by its singular values.

Where a run goes on from a checkpoint, the ranks are those that it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.config.checkpoint_source import newest_meta
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.config.run_config import LoggingConfig
from megaforge.models.prepared_run import PreparedRun
from megaforge.parallel.agree import exchange, from_first_rank
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec, main_grad_of, spec_of
from megaforge.peft.targets import Target, chosen
from megaforge.training.callbacks import Callback
from megaforge.training.trainer import Trainer

Build = Callable[[PreparedRun, ParallelContext], Trainer]


def with_chosen_ranks(run: PreparedRun, ctx: ParallelContext, build: Build) -> PreparedRun:
    """``run`` with ``--lora-rank-pattern`` filled in, where it asks for that. Collective."""
    config = run.config
    if not config.model.lora_rank_steps:
        return run
    saved = from_first_rank(ctx, lambda: _saved_pattern(config))
    pattern = _measured(run, ctx, build) if saved is None else saved
    model = dataclasses.replace(config.model, lora_rank_pattern=tuple(pattern))
    return dataclasses.replace(run, config=dataclasses.replace(config, model=model))


def _saved_pattern(config: Config) -> list[str] | None:
    found = None if config.checkpoint.load is None else newest_meta(Path(config.checkpoint.load))
    return None if found is None else list(found[1]["config"]["model"]["lora_rank_pattern"])


def _measured(run: PreparedRun, ctx: ParallelContext, build: Build) -> list[str]:
    """``PATTERN=RANK`` of every adapter of the model; what the line itself gives comes last, and holds."""
    config, model = run.config, run.config.model
    print_rank_0(f"--lora-rank-steps {model.lora_rank_steps}: the base's gradients choose the ranks")
    trainer = build(dataclasses.replace(run, config=_of_base(config)), ctx)
    sums = GradientSums()
    trainer.add(sums)
    trainer.train()
    ranks: dict[str, int] = {}
    for chunk in trainer.model.chunks:
        for target in chosen(chunk, "--peft-targets", model.peft_targets):
            gradient = _whole(sums.sums[id(target.layer.weight)], target.spec, ctx)
            gradient = gradient.transpose(-1, -2) if target.layer.transposed else gradient
            ranks[target.name] = min(model.lora_rank, _rank(gradient, target, model.lora_rank_energy))
    everywhere: dict[str, int] = {}
    for part in exchange(ctx, ranks):  # ranks of ep have other experts of one stack, whose adapters are as large
        everywhere |= {name: max(rank, everywhere.get(name, 0)) for name, rank in part.items()}
    total, most = sum(everywhere.values()), model.lora_rank * len(everywhere)
    lowest, highest = min(everywhere.values()), max(everywhere.values())
    print_rank_0(
        f"{len(everywhere)} adapters of rank {lowest} to {highest}, together {total} of {most}, hold "
        f"{model.lora_rank_energy:.0%} of their gradients where --lora-rank {model.lora_rank} lets them"
    )
    return [*(f"{name}={rank}" for name, rank in sorted(everywhere.items())), *model.lora_rank_pattern]


def _of_base(config: Config) -> Config:
    """Some steps of the base that change nothing: at a rate that is lost in rounding, without what a run leaves."""
    steps = config.model.lora_rank_steps
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, peft=None, lora_rank_steps=0, peft_from=None),
        training=dataclasses.replace(
            config.training, train_iters=steps, eval_iters=0, early_stopping_patience=0, callbacks=(),
        ),
        optimizer=dataclasses.replace(
            config.optimizer, optimizer="sgd", lr=1e-30, min_lr=0.0, lr_decay_style="constant", weight_decay=0.0,
            lr_warmup_iters=0, lr_warmup_fraction=0.0, ema_decay=0.0, grokfast=None, plateau_boost=False,
        ),
        parallel=dataclasses.replace(config.parallel, zero_stage=0),
        checkpoint=dataclasses.replace(config.checkpoint, save=None, load=None, save_interval=None, keep_best=0),
        logging=LoggingConfig(log_interval=steps + 1),
    )  # fmt: skip


class GradientSums(Callback):
    """Adds up the gradients of all steps.

    Attributes:
        sums: of each parameter's shard, by its id.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def on_gradients(self, trainer: Trainer) -> None:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and spec_of(parameter).role == "matrix":
                grad = main_grad_of(parameter) / trainer.scaler.scale
                self.sums[id(parameter)] = self.sums[id(parameter)] + grad if id(parameter) in self.sums else grad


def _whole(local: Tensor, spec: ParamSpec, ctx: ParallelContext) -> Tensor:
    """All of a matrix, or of this rank's experts. Collective over the axis that it is split over."""
    if spec.shard_dim is None or (axis := ctx.axis(spec.shard_axis)).size == 1:
        return local
    unsplit = dataclasses.replace(spec, shard_dim=None, parts=())
    whole = local.new_zeros(unsplit.local_shape(ctx))
    for piece in spec.pieces(ctx):
        box = [slice(a, b) for a, b in piece.global_box]
        if spec.expert_dim is not None:
            box[spec.expert_dim] = slice(None)
        whole[tuple(box)] = piece.local_view(local)
    dist.all_reduce(whole, group=axis.group)
    return whole


def _rank(gradient: Tensor, target: Target, energy: float) -> int:
    """The fewest singular values of the rows of ``target`` that hold so much of the squared norm; of a stack the most
    that any expert needs."""
    start, stop = target.rows
    squares = torch.linalg.svdvals(gradient[..., start:stop, :].double()).square()
    return max(enough(one, energy) for one in squares.reshape(-1, squares.shape[-1]))


def enough(squares: Tensor, energy: float) -> int:
    """How many of the descending ``squares`` have a sum of ``energy`` of all; 1 where all are zero."""
    total = squares.cumsum(0)
    return 1 if not float(total[-1]) else min(len(total), int((total < energy * total[-1]).sum()) + 1)
