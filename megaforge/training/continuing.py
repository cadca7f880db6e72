"""Going on from a checkpoint otherwise than it was trained so far: what is refused, and what is changed on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megaforge.config.config import Config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.config.schema import config_to_dict
from megaforge.errors import UserError
from megaforge.optim import LearningRateSchedule

_OVERRIDE, _KEEP = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"
_LEARNING = {
    "optimizer": (
        *("optimizer", "weight_decay", "sgd_momentum", "adam_beta1", "adam_beta2", "adam_eps"),
        *("clip_grad", "clip_grad_per_group", "clip_grad_value", "qat_latent_limit", "qat_damping"),
        *("second_stage_at", "second_stage_lr_factor", "second_stage_weight_decay_factor"),
    ),
    "training": ("bf16", "fp16", "fp64", "rampup_batch_size", "objective", "loss_terms"),
    "parallel": ("grad_reduce_in_bf16", "grad_compression"),
    "data": ("eod_mask_loss",),
}
_COMPARED = 1000  # iterations at which two schedules' pasts are compared, besides their own corners


def settle_schedule(
    config: Config, saved: Mapping[str, Any], iteration: int, source: str
) -> tuple[Config, LearningRateSchedule, list[str]]:
    """The learning-rate schedule of a run that goes on after ``iteration``.

    A schedule that would have given the same rates so far goes on, and so does a constant rate that was set anew: both
    are what was asked for, and are said. Any other change would bend a curve that is half drawn: it is refused, unless
    ``--override-opt_param-scheduler`` or ``--use-checkpoint-opt_param-scheduler`` says which schedule holds.

    Args:
        saved: the checkpoint's ``meta``.
        source: what messages call the checkpoint.

    Returns:
        The configuration with the schedule that holds, that schedule, and what to tell the user.

    Raises:
        UserError: the schedules differ and nobody chose.
    """
    now = LearningRateSchedule(config.optimizer, config.training.train_iters)
    if saved["schedule"] == now.digest:
        return config, now, []
    before = _saved_schedule(saved["config"])
    changes = "; ".join(_differences(before, now)) or "its settings differ"
    if config.optimizer.use_checkpoint_opt_param_scheduler:
        kept = dataclasses.replace(
            config.optimizer,
            lr=before.peak,
            min_lr=before.floor,
            lr_decay_style=before.style,
            lr_warmup_iters=before.warmup_iters,
            lr_decay_iters=before.decay_iters or None,
            lr_wsd_decay_iters=before.wsd_decay_iters if before.style == "WSD" else None,
        )
        told = f"{_KEEP}: the checkpoint's values hold: {changes}"
        return dataclasses.replace(config, optimizer=kept), before, [told]
    if config.optimizer.override_opt_param_scheduler:
        return config, now, [f"{_OVERRIDE}: this run's values hold from iteration {iteration + 1} on: {changes}"]
    if _same_past(before, now, iteration):
        return config, now, [f"the learning rate was the same so far and now goes another way: {changes}"]
    if before.style == now.style == "constant" and iteration >= max(before.warmup_iters, now.warmup_iters):
        return config, now, [f"the constant learning rate is set anew from iteration {iteration + 1} on: {changes}"]
    raise UserError(
        f"--load {source}: until iteration {iteration} it was trained with another learning-rate schedule: {changes}; "
        f"write the former values, or add {_KEEP} to keep that schedule, or {_OVERRIDE} to follow this run's from here"
    )


def check_update_rule(state: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> None:
    """Checks that a checkpoint's optimizer state is what this run's update rules keep.

    Args:
        state: of this run's optimizer (:func:`megaforge.training.checkpointing.optimizer_state`).
        saved: the checkpoint's ``meta``.

    Raises:
        UserError: it is not.
    """
    then, now = saved["state"]["optimizer"]["states"], state["states"]
    if then != now:
        settings = saved["config"]["optimizer"]
        raise UserError(
            f"--load {source}: its optimizer state ({', '.join(then) or 'none'}) is that of --optimizer "
            f"{settings['optimizer']}, and this run keeps {', '.join(now) or 'none'}; write the former flags, or add "
            "--no-load-optim to start its state afresh"
        )


def changed_settings(config: Config, global_batch_size: int, saved: Mapping[str, Any]) -> list[str]:
    """What to tell of a run that learns otherwise than so far, apart from its schedule: nothing, or one line.

    Each of these may be changed on the way, but none should change unseen: without ``--global-batch-size``, another
    number of data-parallel ranks makes another batch.

    Args:
        saved: the checkpoint's ``meta``; what an older one does not say is not compared.
    """
    changes, described = [], config_to_dict(config)
    before = saved.get("global_batch_size", saved["config"]["training"].get("global_batch_size"))
    if before is not None and before != global_batch_size:
        changes.append(f"a global batch of {before} sequences in the checkpoint, {global_batch_size} here")
    for section, names in _LEARNING.items():
        for name in names:
            now = described[section][name]
            was = saved["config"].get(section, {}).get(name, now)
            if was != now:
                changes.append(f"--{name.replace('_', '-')} {was} in the checkpoint, {now} here")
    return [f"it learns otherwise from here on: {'; '.join(changes)}"] if changes else []


def _saved_schedule(config: Mapping[str, Any]) -> LearningRateSchedule:
    names = {field.name for field in dataclasses.fields(OptimizerConfig)}
    settings = {name: value for name, value in config["optimizer"].items() if name in names}
    return LearningRateSchedule(OptimizerConfig(**settings), config["training"]["train_iters"])


def _differences(before: LearningRateSchedule, now: LearningRateSchedule) -> list[str]:
    settings = {
        "--lr-decay-style": (before.style, now.style),
        "--lr": (before.peak, now.peak),
        "--min-lr": (before.floor, now.floor),
        "--lr-warmup-iters": (before.warmup_iters, now.warmup_iters),
        "--lr-decay-iters (by default --train-iters)": (before.decay_iters, now.decay_iters),
        "--lr-wsd-decay-iters": (before.wsd_decay_iters, now.wsd_decay_iters),
    }
    if before.style == now.style == "constant":
        settings = {flag: values for flag, values in settings.items() if flag in ("--lr", "--lr-warmup-iters")}
    if "WSD" not in (before.style, now.style):
        settings.pop("--lr-wsd-decay-iters", None)
    return [f"{flag} {a} in the checkpoint, {b} here" for flag, (a, b) in settings.items() if a != b]


def _same_past(before: LearningRateSchedule, now: LearningRateSchedule, iteration: int) -> bool:
    corners = {s.warmup_iters + d for s in (before, now) for d in (0, 1)}
    corners |= {s.decay_iters - back + d for s in (before, now) for back in (0, s.wsd_decay_iters) for d in (0, 1)}
    steps = {*range(1, iteration + 1, max(1, iteration // _COMPARED)), iteration, *corners}
    return all(before(step) == now(step) for step in steps if 1 <= step <= iteration)
