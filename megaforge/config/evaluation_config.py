"""Flags of what a model is asked once its training is complete, and of what its evaluations report."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.registry import EVALUATION_METRICS


@dataclass(frozen=True)
class EvaluationConfig:
    """Tasks at the end of a run, and further metrics of its own evaluations (docs/evaluation.md)."""

    evaluate_at_end: tuple[str, ...] = flag(
        (),
        "once the run is complete and saved, what to ask the model: tasks or their files, as tools/evaluate.py --tasks "
        "takes them; evaluation.json in --save keeps what came out",
        metavar="NAME|FILE.yaml",
    )
    evaluate_at_end_lengths: tuple[int, ...] = flag(
        (),
        "with --evaluate-at-end: tokens of examples that are made (default: --seq-length)",
        least=1,
        metavar="TOKENS",
    )
    evaluate_at_end_examples: int = flag(50, "with --evaluate-at-end: examples of each task and length", least=1)

    evaluation_metrics: tuple[str, ...] = flag(
        (),
        "what evaluations report beside loss, perplexity and accuracy, by name",
        choices=EVALUATION_METRICS,
        metavar="NAME",
    )

    def validate(self) -> None:
        """Tasks and files are looked at when the run is prepared."""
