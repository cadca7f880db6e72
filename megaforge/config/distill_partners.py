"""What the flags of distillation need beside them."""

from __future__ import annotations

from megaforge.config.run_partners import Partner

_ONLY = "a teacher runs whole beside each rank's share of the model"

DISTILLATION = (
    Partner(
        ("training.objective",),
        lambda c: c.training.objective != "distillation" or c.distill.distill_from,
        "there is no teacher: add --distill-from DIR",
    ),
    Partner(
        ("distill.distill_from",),
        lambda c: c.training.objective == "distillation",
        "nothing is learnt from it: add --objective distillation",
    ),
    Partner(
        ("distill.distill_from",),
        lambda c: c.parallel.pipeline_model_parallel_size == 1,
        f"{_ONLY}, which --pp cuts: use --pp 1 (--tp, --sp, --cp, --ep, --etp, --zero and replicas work)",
    ),
    Partner(
        tuple(f"distill.distill_{name}" for name in ("weight", "temperature", "label_weight", "relation_weight")),
        lambda c: c.distill.distill_from,
        "there is no teacher: add --objective distillation --distill-from DIR",
    ),
    Partner(
        ("distill.distill_relation_layer",),
        lambda c: c.distill.distill_relation_weight,
        "no relation is compared: add --distill-relation-weight 1",
    ),
    Partner(
        ("distill.distill_relation_weight",),
        lambda c: c.parallel.context_parallel_size == 1,
        "relations are of whole sequences, which --cp cuts: use --cp 1 (--tp, --sp, --ep, --zero and replicas work)",
    ),
    Partner(
        ("distill.distill_relation_weight",),
        lambda c: c.parallel.recompute != "full",
        "a block that is computed again has no projections to compare: use --recompute selective, moe or none",
    ),
)
