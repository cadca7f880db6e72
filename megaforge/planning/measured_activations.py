"""``tools/plan.py activations``: predicted activation bytes beside those that a CPU really keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megaforge.config.cli import parse_config
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.planning.costs import stage_cost
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.plan_request import parse_activations
from megaforge.planning.stage_run import run_stage
from megaforge.planning.stages import StagePart, model_parts
from megaforge.planning.table import table

_TEST = ("--config", "cdrmix-test", "--vocab-size", "500", "--seq-length", "128", "--micro-batch-size", "1")
_TINY = ("--config", "cdrmix-tiny", "--vocab-size", "2048")
CASES = {
    "hybrid MoE": _TEST,
    "hybrid MoE, bf16": (*_TEST, "--bf16"),
    "hybrid MoE, micro-batch 2": (*_TEST, "--micro-batch-size", "2"),
    "dense RWKV-7": (*_TEST, "--layer-schedule", "rwkv", "--ffn", "dense"),
    "dense Mamba-2": (
        *(*_TEST, "--hybrid-layer-pattern", "M-M-M--", "--mamba-head-dim", "32", "--mamba-state-dim", "32"),
        *("--mamba-num-groups", "4"),
    ),
    "hybrid MoE, Mixture of Depths": (*_TEST, "--mod-capacity-factor", "0.75"),
    "dense attention, SwiGLU, grouped queries": (
        *(*_TEST, "--layer-schedule", "attention", "--ffn", "dense", "--activation", "swiglu"),
        *("--num-query-groups", "2"),
    ),
    "MoE SwiGLU, LayerNorm, untied": (
        *(*_TEST, "--activation", "swiglu", "--normalization", "layernorm"),
        "--untie-embeddings-and-output-weights",
    ),
    "hybrid MoE, two modules of further tokens": (*_TEST, "--mtp-num-layers", "2"),
    "dense, three heads of further tokens": (
        *(*_TEST, "--ffn", "dense", "--mtp-mode", "parallel", "--mtp-num-layers", "3"),
    ),
    "cdrmix-tiny": _TINY,
    "cdrmix-tiny, --recompute selective": (*_TINY, "--recompute", "selective"),
    "cdrmix-tiny, --recompute selective --compress-activations": (
        *_TINY,
        "--recompute",
        "selective",
        "--compress-activations",
    ),
    "cdrmix-tiny, --sequence-checkpoint 64": (*_TINY, "--sequence-checkpoint", "64"),
    "cdrmix-tiny, --recompute moe": (*_TINY, "--recompute", "moe"),
    "cdrmix-tiny, --recompute full": (*_TINY, "--recompute", "full"),
}


@dataclass(frozen=True)
class Comparison:
    """Bytes between the forward and the backward pass of one micro-batch: predicted, and of the distinct storages that
    were alive."""

    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted / self.measured - 1


@cache
def compare(arguments: tuple[str, ...]) -> Comparison:
    """Runs one micro-batch of the model that the flags describe, with random tokens, in this process."""
    config = parse_config(arguments).config
    layout: PlannedLayout = dataclasses.replace(layout_of(config, 1), device_type="cpu")
    ctx = ParallelContext.single()
    again, span = layout.recompute, layout.sequence_checkpoint
    layer = make_layer_context(config.model, ctx, dtype=layout.dtype, recompute=again, sequence_checkpoint=span)
    model = HybridModel(layer)
    initialize_parameters(model, ctx, config.training.seed)
    parts = model_parts(config.model, layout.dtype)
    predicted = stage_cost(parts, layout, StagePart(range(len(parts.blocks)), True, True)).kept
    return Comparison(predicted, run_stage(model, layout, on_meta=False).kept)


def comparison_rows() -> list[tuple[str, ...]]:
    """Heading and one row a case."""
    rows: list[tuple[str, ...]] = [("model", "predicted bytes", "kept bytes", "error")]
    for label, arguments in CASES.items():
        found = compare(arguments)
        error = "0.00%" if abs(found.error) < 5e-5 else f"{found.error:+.2%}"
        rows.append((label, f"{found.predicted:,.0f}", f"{found.measured:,.0f}", error))
    return rows


def run(arguments: Sequence[str], prog: str = "plan.py activations") -> None:
    """Prints the comparison of every case.

    Raises:
        UserError: it takes no arguments.
    """
    parse_activations(arguments, prog)
    print(table(comparison_rows()))
