"""Batches that grow: Megatron-LM's schedule counts samples then, of which an iteration is a full batch."""

from __future__ import annotations

from typing import Any

from megaforge.config.batch_schedule import parse_steps
from megaforge.config.schema import settings
from megaforge.errors import UserError

_LENGTHS = ("lr_warmup", "lr_decay", "lr_wsd_decay")


def count_samples(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Lengths of the learning rate's schedule in iterations become samples, in place: each times the last batch size,
    as ``get_optimizer_param_scheduler`` there has it. Lengths in samples and epochs stay."""
    try:
        steps = parse_steps(values.get("training.step_batch_size_schedule") or ())
    except UserError:
        return  # as the checks of all values will say
    full = steps[-1][1] if steps else values.get("training.global_batch_size")
    grows = steps or values.get("training.rampup_batch_size")
    if not grows or full is None or any(values.get(f"length.{name}_epochs") is not None for name in _LENGTHS):
        return
    ends = ("optimizer.lr_decay_iters", "length.lr_decay_samples", "length.train_samples")
    if all(values.get(key) is None for key in ends):
        values["optimizer.lr_decay_iters"] = values.get("training.train_iters")
    for name in _LENGTHS:
        key, ours = f"optimizer.{name}_iters", f"length.{name}_samples"
        count = values.get(key)
        if count and values.get(ours) is None:
            del values[key]
            values[ours] = count * full
            origins[ours] = f"{settings()[key].flag} {count} x {full} sequences, as in Megatron-LM"
            origins[key] = "default"
