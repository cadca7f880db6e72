"""Going on from a checkpoint otherwise than it was trained so far: what is refused, and what is changed on purpose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from megaforge.config.config import Config
from megaforge.config.length_config import LengthConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.config.schema import config_to_dict
from megaforge.errors import UserError
from megaforge.optim import LearningRateSchedule
from megaforge.registry import LR_SCHEDULES
from megaforge.training.lengths import Progress

_OVERRIDE, _KEEP = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"
_LEARNING = {
    "optimizer": (
        *("optimizer", "weight_decay", "sgd_momentum", "adam_beta1", "adam_beta2", "adam_eps"),
        *("clip_grad", "clip_grad_per_group", "clip_grad_value", "qat_latent_limit", "qat_damping"),
        *("lr_plateau_factor", "lr_plateau_patience", "lr_plateau_threshold", "lr_on_spike", "lr_spike_window"),
        *("lr_mult", "wd_mult", "ema_decay"),
        *("qk_clip", "qk_clip_threshold", "qk_clip_alpha"),
        *("second_stage_at", "second_stage_lr_factor", "second_stage_weight_decay_factor"),
        *("decoupled_weight_decay", "grokfast", "grokfast_alpha", "grokfast_lambda", "grokfast_window"),
        *("plateau_boost", "plateau_boost_factor", "plateau_boost_interval", "plateau_boost_trigger"),
        *("plateau_boost_intervals", "muon_momentum", "muon_use_nesterov", "muon_num_ns_steps", "muon_scale_mode"),
        *("muon_coefficient_type", "muon_fp32_matmul_prec", "muon_extra_scale_factor", "muon_tp_mode"),
        *("normuon_beta2", "decoupled_lr", "decoupled_min_lr"),
        *("weight_decay_incr_style", "start_weight_decay", "end_weight_decay"),
    ),
    "model": ("hidden_dropout", "attention_dropout", "mtp_loss_scaling_factor"),
    "training": ("bf16", "fp16", "fp64", "rampup_batch_size", "step_batch_size_schedule", "objective", "loss_terms"),
    "parallel": ("grad_reduce_in_bf16", "grad_compression", "grad_compression_rank"),
    "run_memory": ("agent_memory", "agent_accept_threshold", "agent_memory_capacity"),
    "data": ("eod_mask_loss",),
    "resilience": ("skip_nonfinite_steps", "spike_rollback", "spike_skip_batches", "spike_window"),
    "distill": (
        *("distill_weight", "distill_temperature", "distill_label_weight", "distill_relation_weight"),
        "distill_relation_layer",
    ),
    "regularization": (*("label_smoothing", "contrastive_weight", "contrastive_temperature", "l1_coeff", "l2_coeff"),),
    "qat": (
        *("quant_lambda", "quant_lambda_start_iters", "quant_lambda_end_iters", "quant_lambda_steps"),
        *("quant_lambda_sharpness", "quant_stages", "calibration_interval", "calibration_samples", "calibration_ema"),
        *("quant_clip_interval", "quant_clip_grid"),
    ),
}
# What says which schedule a run has.
_SCHEDULE = (
    *("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_init"),
    *("lr_wsd_decay_iters", "lr_wsd_decay_style", "lr_restart_iters", "lr_restart_mult"),
    *("lr_plateau_factor", "lr_plateau_patience", "lr_plateau_threshold", "decoupled_lr", "decoupled_min_lr"),
)
_IN_LENGTH = (
    *("lr_warmup_epochs", "lr_warmup_samples", "lr_decay_epochs", "lr_decay_samples", "lr_wsd_decay_epochs"),
    *("lr_wsd_decay_samples", "lr_restart_epochs"),
)
# Values that learn the same: of these, the second is as good as the first.
_ALIKE = {"muon_tp_mode": ("distributed", "duplicated")}
_COMPARED = 10_000  # iterations at which two schedules' pasts are compared, besides their own corners


def settle_schedule(
    config: Config, saved: Mapping[str, Any], iteration: int, source: str, progress: Progress | None = None
) -> tuple[Config, LearningRateSchedule, list[str]]:
    """The learning-rate schedule of a run that goes on after ``iteration``.

    A schedule that would have given the same rates so far goes on, and so does a constant rate that was set anew: both
    are what was asked for, and are said. Any other change would bend a curve that is half drawn: it is refused, unless
    ``--override-opt_param-scheduler`` or ``--use-checkpoint-opt_param-scheduler`` says which schedule holds.

    Args:
        saved: the checkpoint's ``meta``.
        source: what messages call the checkpoint.
        progress: what has been read, for a schedule that counts samples.

    Returns:
        The configuration with the schedule that holds, that schedule, and what to tell the user.

    Raises:
        UserError: the schedules differ and nobody chose.
    """
    now = LearningRateSchedule(config.optimizer, config.training.train_iters, config.length, progress)
    if saved["schedule"] == now.digest:
        return config, now, []
    override = f"{_OVERRIDE}: this run's values hold from iteration {iteration + 1} on: "
    former = _section(OptimizerConfig, saved["config"]["optimizer"])
    if config.optimizer.override_opt_param_scheduler and former.lr_decay_style not in LR_SCHEDULES:
        return config, now, [f"{override}--lr-decay-style was {former.lr_decay_style}, which is unknown here"]
    before = _former_schedule(former, saved, progress)
    changes = "; ".join(_differences(before, now)) or "its settings differ"
    if config.optimizer.use_checkpoint_opt_param_scheduler:
        if before.callbacks != now.callbacks:  # they are there already, or are not
            raise UserError(
                f"{_KEEP}: --load {source} was trained with --lr-decay-style {before.style}, which takes another part "
                f"in the run than --lr-decay-style {now.style}; write --lr-decay-style {before.style}"
            )
        told = f"{_KEEP}: the checkpoint's values hold: {changes}"
        return _with_schedule(config, former, before, saved), before, [told]
    if config.optimizer.override_opt_param_scheduler:
        return config, now, [f"{override}{changes}"]
    if _same_past(before, now, iteration):
        return config, now, [f"the learning rate was the same so far and now goes another way: {changes}"]
    warm = max(before.settings.lr_warmup_iters, now.settings.lr_warmup_iters)
    if before.style == now.style and now.is_flat and iteration >= warm:
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
            alike = _ALIKE.get(name, ())
            if was != now and not (was in alike and now in alike):
                changes.append(f"--{name.replace('_', '-')} {was} in the checkpoint, {now} here")
    return [f"it learns otherwise from here on: {'; '.join(changes)}"] if changes else []


_Section = TypeVar("_Section", OptimizerConfig, LengthConfig)


def _section(kind: type[_Section], saved: Mapping[str, Any]) -> _Section:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in saved.items() if name in names})


def _former_schedule(
    former: OptimizerConfig, saved: Mapping[str, Any], progress: Progress | None
) -> LearningRateSchedule:
    """The checkpoint's. One of an older version counted iterations where its lengths were given in samples."""
    iters = saved["config"]["training"]["train_iters"]
    plain = LearningRateSchedule(former, iters)
    if plain.digest == saved["schedule"]:
        return plain
    return LearningRateSchedule(former, iters, _section(LengthConfig, saved["config"].get("length", {})), progress)


def _with_schedule(
    config: Config, former: OptimizerConfig, before: LearningRateSchedule, saved: Mapping[str, Any]
) -> Config:
    """``config`` with the settings that make its schedule ``before``."""
    end = int(before.settings.lr_decay_iters) or None  # the default may be another now
    kept = {name: getattr(former, name) for name in _SCHEDULE}
    lengths = {name: saved["config"].get("length", {}).get(name) for name in _IN_LENGTH}
    if before.settings.unit == "samples":
        lengths["lr_decay_samples"] = end
    else:
        lengths = dict.fromkeys(lengths)
        kept["lr_decay_iters"] = end
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, **kept),
        length=dataclasses.replace(config.length, **lengths),
    )


def _differences(before: LearningRateSchedule, now: LearningRateSchedule) -> list[str]:
    """What differs of two schedules' settings, of those that the one or the other depends on."""
    values = {"--lr-decay-style": (before.style, now.style)}
    in_samples = before.settings.unit == now.settings.unit == "samples"
    for name in (*before.facts, *now.facts):
        flag = f"--{name.replace('_', '-')}" + " (by default --train-iters)" * (name == "lr_decay_iters")
        if in_samples:
            flag = flag.replace("-iters", "-samples")
        if name == "unit":
            flag = "lengths counted in"
        values[flag] = (getattr(before.settings, name), getattr(now.settings, name))
    return [f"{flag} {a} in the checkpoint, {b} here" for flag, (a, b) in values.items() if a != b]


def _same_past(before: LearningRateSchedule, now: LearningRateSchedule, iteration: int) -> bool:
    if not {*before.callbacks} <= {*now.callbacks}:
        return False  # the past was also theirs
    steps = {*range(1, iteration + 1, max(1, iteration // _COMPARED)), iteration, *before.corners, *now.corners}
    # Sums of another order differ in the last bit where the one counts iterations and the other samples.
    return all(math.isclose(before(step), now(step), rel_tol=1e-12) for step in steps if 1 <= step <= iteration)
