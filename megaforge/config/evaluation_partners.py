"""What the flags of ``--evaluate-at-end``, ``--evaluation-metrics`` and ``--generate-prompts`` need beside them.

What the first needs itself, a directory and a tokenizer, is said and not refused
(:func:`megaforge.tasks.at_end.why_not`), as presets ask for it."""

from __future__ import annotations

from megaforge.config.run_partners import Partner

EVALUATION = (
    Partner(
        ("evaluation.evaluate_at_end_lengths", "evaluation.evaluate_at_end_examples"),
        lambda c: c.evaluation.evaluate_at_end,
        "nothing is asked: add --evaluate-at-end passkey",
    ),
    Partner(
        ("evaluation.evaluation_metrics",),
        lambda c: c.training.eval_iters,
        "nothing is evaluated: add --eval-iters N",
    ),
    Partner(
        ("generation.generate_tokens",),
        lambda c: c.generation.generate_prompts,
        "nothing is continued: add --generate-prompts TEXT",
    ),
    Partner(
        ("generation.generate_prompts",),
        lambda c: c.training.eval_iters,
        "texts are written at evaluations, and there is none: add --eval-iters N",
    ),
    Partner(
        ("generation.generate_prompts",),
        lambda c: c.parallel.pipeline_model_parallel_size == c.parallel.context_parallel_size == 1,
        "a rank needs all layers, and whole sequences, to write while it trains: use --pp 1 --cp 1, or "
        "tools/generate.py on the checkpoints",
    ),
)
