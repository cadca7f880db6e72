"""What the flags of ``--evaluate-at-end`` need beside them. What it needs itself, a directory and a tokenizer, is said
and not refused (:func:`megaforge.tasks.at_end.why_not`), as presets ask for it."""

from __future__ import annotations

from megaforge.config.run_partners import Partner

EVALUATION = (
    Partner(
        ("evaluation.evaluate_at_end_lengths", "evaluation.evaluate_at_end_examples"),
        lambda c: c.evaluation.evaluate_at_end,
        "nothing is asked: add --evaluate-at-end passkey",
    ),
)
