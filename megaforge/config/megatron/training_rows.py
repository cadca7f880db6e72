"""Megatron-LM's flags of optimizer, schedule and precision that are none of ours."""

from __future__ import annotations

from megaforge.config.megatron.rows import ANY, NOT_AVAILABLE, Row, advice, alias, noop, only, refuse

_FP8 = "products in 8 or 4 bits are not available; leave it out and keep --bf16"
_OFFLOAD = "write --optimizer paged_adam, which keeps all moments in host memory"
_PRECISE = "main weights, gradients and moments are fp32; leave it out"

TRAINING_ROWS: tuple[Row, ...] = (
    *noop(0, "calculate-per-token-loss accumulate-allreduce-grads-in-fp32"),
    *alias(0, {"deterministic-mode": "--deterministic"}),
    *advice(ANY, _FP8, "fp8-* fp4-* first-last-layers-bf16 num-layers-at-start-in-bf16 num-layers-at-end-in-bf16"),
    *advice(0, "the residual stream has the type of the run; leave it out", "fp32-residual-connection"),
    *advice(
        ANY,
        "steps are left out where they harm the run: write --spike-rollback N, or leave the flag out",
        "iterations-to-skip",
    ),
    *advice(0, _PRECISE, "use-precision-aware-optimizer"),
    *(
        only(f"{name}-dtype", "fp32 float32", _PRECISE)
        for name in ("main-grads", "main-params", "exp-avg", "exp-avg-sq")
    ),
    *advice(0, _OFFLOAD, "optimizer-cpu-offload overlap-cpu-optimizer-d2h-h2d use-torch-optimizer-for-cpu-offload"),
    *advice(1, _OFFLOAD, "optimizer-offload-fraction"),
    *advice(1, "write --micro-batch-size (of a rank) or --global-batch-size", "batch-size"),
    *advice(1, "write --lr-warmup-fraction", "warmup"),
    *advice(ANY, NOT_AVAILABLE, "fp16-lm-cross-entropy output-logit-dtype freeze-all-layers"),
    *advice(
        ANY,
        "fill-in-the-middle cuts what a window holds of each document; leave it out",
        "fim-split-sample fim-fragment-rate fim-no-prefix",
    ),
    *advice(
        1,
        "batches have no padding, and documents end with the tokenizer's token; leave it out",
        "fim-pad-token fim-eod-token",
    ),
    *advice(
        0,
        "--global-batch-size must fit the ranks at every size; leave it out",
        "decrease-batch-size-if-needed",
    ),
)

TRAINING_VALUES = {
    "optimizer": {
        "lion": refuse("choose adam, sgd or muon"),
        "soap": refuse("choose adam, sgd or muon"),
    },
}
