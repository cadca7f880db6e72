"""All rows, and the one that a flag has."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from megaforge.config.megatron.data_rows import DATA_ROWS, DATA_VALUES
from megaforge.config.megatron.model_rows import MODEL_ROWS, MODEL_VALUES
from megaforge.config.megatron.moe_rows import MOE_ROWS, MOE_VALUES
from megaforge.config.megatron.parallel_rows import PARALLEL_ROWS, PARALLEL_VALUES
from megaforge.config.megatron.rows import Outcome, Row
from megaforge.config.megatron.rules import TAKES, TAKES_ANY
from megaforge.config.megatron.run_rows import RUN_ROWS, RUN_VALUES
from megaforge.config.megatron.training_rows import TRAINING_ROWS, TRAINING_VALUES
from megaforge.config.schema import settings

ROWS = (*MODEL_ROWS, *MOE_ROWS, *TRAINING_ROWS, *PARALLEL_ROWS, *DATA_ROWS, *RUN_ROWS)
# Of flags that we have: values that mean one of ours, or that are refused with what to write; in lower case.
VALUES: Mapping[str, Mapping[str, Outcome]] = {
    **MODEL_VALUES,
    **MOE_VALUES,
    **TRAINING_VALUES,
    **PARALLEL_VALUES,
    **DATA_VALUES,
    **RUN_VALUES,
}

# What people write who know another program: by meaning, since nothing of ours is spelled alike.
MEANINGS: Mapping[str, str] = {
    "learning-rate": "--lr",
    "batch-size-per-device": "--micro-batch-size",
    "per-device-train-batch-size": "--micro-batch-size",
    "gradient-accumulation-steps": "--global-batch-size, which says how many sequences a step has in all",
    "max-steps": "--train-iters",
    "num-train-epochs": "--train-epochs",
    "epochs": "--train-epochs",
    "warmup-steps": "--lr-warmup-iters",
    "warmup-ratio": "--lr-warmup-fraction",
    "lr-scheduler-type": "--lr-decay-style",
    "max-grad-norm": "--clip-grad",
    "output-dir": "--save",
    "resume-from-checkpoint": "--load or --resume",
    "save-steps": "--save-interval",
    "eval-steps": "--eval-interval",
    "logging-steps": "--log-interval",
    "gradient-checkpointing": "--recompute full",
    "num-key-value-heads": "--num-query-groups",
    "intermediate-size": "--ffn-hidden-size",
    "num-hidden-layers": "--num-layers",
    "rms-norm-eps": "--norm-epsilon",
    "rope-theta": "--rotary-base",
    "tie-word-embeddings": "--no-untie-embeddings-and-output-weights, the default",
    "num-local-experts": "--num-experts",
    "num-experts-per-tok": "--moe-router-topk",
    "precision": "--bf16 or --fp16",
}


@functools.cache
def _exact() -> Mapping[str, Row]:
    return {row.flag.lower(): row for row in ROWS if not row.flag.endswith("*")}


@functools.cache
def _families() -> tuple[Row, ...]:
    """Rows of many flags, those of the longest name first."""
    return tuple(sorted((row for row in ROWS if row.flag.endswith("*")), key=lambda row: -len(row.flag)))


def row_of(flag: str) -> Row | None:
    """The row of a flag that is none of ours, by its name without dashes in front."""
    name = flag.lower()
    if name in _exact():
        return _exact()[name]
    return next((row for row in _families() if name.startswith(row.flag[:-1].lower())), None)


def value_outcome(flag: str, value: str) -> Outcome | None:
    """What becomes of a value of our own flag; None where it is one of ours, or nothing is known of it."""
    outcome = VALUES.get(flag.removeprefix("--"), {}).get(value.lower())
    if outcome is None:
        return None
    choices = next((one.choices for one in settings().values() if flag in (one.flag, *one.aliases)), None)
    return None if choices is not None and value in choices else outcome


def takes_one_of(flag: str) -> bool:
    """Whether it is a flag of ours that takes one word, of which Megatron-LM may take a list."""
    return flag.removeprefix("--") in VALUES


def known_flags() -> Iterator[str]:
    """Every flag of the tables and rules that has a name of its own."""
    yield from (f"--{row.flag}" for row in ROWS if not row.flag.endswith("*"))
    yield from (*TAKES, *TAKES_ANY)


@functools.cache
def own_flags() -> frozenset[str]:
    """Every spelling of our own flags, those that switch off included."""
    found = {"--config", "--print-config", "--shrink", "--help"}
    for setting in settings().values():
        spellings = (setting.flag, *setting.aliases)
        found.update(spellings)
        if setting.kind is bool and not setting.optional and not setting.sequence:
            found.update("--no-" + spelling.removeprefix("--") for spelling in spellings)
    return frozenset(found)
