"""What the flags of further losses need beside them."""

from __future__ import annotations

from megaforge.config.run_partners import Partner

REGULARIZATION = (
    Partner(
        ("regularization.contrastive_temperature",),
        lambda c: c.regularization.contrastive_weight,
        "sequences are not contrasted: add --contrastive-weight 0.1",
    ),
    Partner(
        ("regularization.contrastive_weight",),
        lambda c: c.training.micro_batch_size > 1,
        "a micro-batch has one sequence, which nothing is contrasted with: use --micro-batch-size 2 or more",
    ),
)
