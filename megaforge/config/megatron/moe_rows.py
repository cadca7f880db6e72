"""Megatron-LM's flags of mixture-of-experts layers that are none of ours."""

from __future__ import annotations

from megaforge.config.megatron.rows import NOT_AVAILABLE, Row, advice, becomes, noop, only, refuse

_LOSSES = "choose aux_loss, seq_aux_loss, global_aux_loss or none"

MOE_ROWS: tuple[Row, ...] = (
    *noop(
        0,
        "moe-grouped-gemm moe-permute-fusion moe-router-fusion moe-enable-deepep moe-shared-expert-overlap "
        "moe-pad-expert-input-to-capacity overlap-moe-expert-parallel-comm",
    ),
    *noop(1, "moe-token-dispatcher-type moe-flex-dispatcher-backend"),
    only(
        "moe-router-dtype", "fp32", "the router computes in fp32 at the least, and in fp64 with --fp64 only; write fp32"
    ),
    *advice(
        0,
        "experts cannot be forced to even loads; leave it out, or give --moe-expert-capacity-factor 1",
        "moe-router-force-load-balancing",
    ),
    *advice(
        0,
        NOT_AVAILABLE,
        "moe-shared-expert-gate moe-use-upcycling moe-apply-probs-on-input",
    ),
    *advice(1, NOT_AVAILABLE, "moe-input-jitter-eps"),
)

MOE_VALUES = {
    "moe-router-load-balancing-type": {
        "aux_loss": becomes("--moe-router-load-balancing-type seq_aux_loss"),
        "sinkhorn": refuse(_LOSSES),
        "quantile_balancing": refuse(_LOSSES),
    },
    "moe-router-score-function": {"sqrtsoftplus": refuse("choose softmax or sigmoid")},
}
