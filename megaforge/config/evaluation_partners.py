"""What ``--evaluate-at-end`` needs beside it."""

from __future__ import annotations

from megaforge.config.run_partners import Partner

EVALUATION = (
    Partner(
        ("evaluation.evaluate_at_end",),
        lambda c: c.checkpoint.save,
        "the model is asked as it was saved: add --save DIR",
    ),
    Partner(
        ("evaluation.evaluate_at_end",),
        lambda c: c.data.tokenizer_model or c.data.vocab_file,
        "tasks are texts: add --tokenizer-model FILE",
    ),
    Partner(
        ("evaluation.evaluate_at_end_lengths", "evaluation.evaluate_at_end_examples"),
        lambda c: c.evaluation.evaluate_at_end,
        "nothing is asked: add --evaluate-at-end passkey",
    ),
)
