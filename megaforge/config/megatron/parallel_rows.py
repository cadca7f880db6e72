"""Megatron-LM's flags of layout, memory and kernels that are none of ours."""

from __future__ import annotations

from megaforge.config.megatron.rows import ANY, Row, advice, alias, becomes, noop, refuse

_CUTS = "write | in --hybrid-layer-pattern; without it stages are cut by cost"
_OFFLOAD = "write --cpu-offload-activations"
_CONTEXT = "write --context-parallel-size"
_WEIGHTS = "write --zero-stage 2"

PARALLEL_ROWS: tuple[Row, ...] = (
    *alias(0, {"use-distributed-optimizer": "--zero-stage 1", "moe-layer-recompute": "--recompute moe"}),
    *alias(1, {"num-virtual-stages-per-pipeline-rank": "--virtual-pipeline-model-parallel-size {}"}),
    *advice(0, f"sharded weights (ZeRO-3) are not available; {_WEIGHTS}", "use-torch-fsdp2"),
    *advice(
        1,
        _CUTS,
        "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers pipeline-model-parallel-layout",
    ),
    *advice(
        0,
        "leave it out: stages are cut by cost, embedding and loss included",
        "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split",
    ),
    *advice(ANY, _CONTEXT, "hierarchical-context-parallel-sizes hybrid-context-parallel"),
    *advice(1, _WEIGHTS, "tensor-parallel-num-weight-shards expert-tensor-parallel-num-weight-shards"),
    *advice(ANY, _OFFLOAD, "cpu-offloading* fine-grained-activation-offloading"),
    *advice(1, "write --tensor-model-parallel-size", "model-parallel-size"),
    *advice(ANY, "write --recompute full", "checkpoint-activations activations-checkpoint-method"),
    *advice(
        1,
        "data parallelism is what --tp, --pp and --cp leave of the ranks you start; leave this flag out",
        "dp data-parallel-size",
    ),
    *advice(1, "leave it out: gradients are always reduced in buckets", "DDP-impl"),
    *noop(
        0,
        "use-mcore-models use-flash-attn attention-softmax-in-fp32 no-masked-softmax-fusion no-rope-fusion "
        "no-bias-swiglu-fusion no-bias-dropout-fusion no-gradient-accumulation-fusion "
        "cross-entropy-loss-fusion use-fused-weighted-squared-relu enable-cuda-graph external-cuda-graph "
        "te-rng-tracker inference-rng-tracker enable-experimental delay-wgrad-compute no-overlap-p2p-communication "
        "overlap-p2p-communication-warmup-flush use-tp-pp-dp-mapping apply-query-key-layer-scaling "
        "ddp-average-in-collective use-nccl-ub disable-gloo-process-groups",
    ),
    *noop(
        1,
        "local-rank transformer-impl attention-backend cross-entropy-fusion-impl ddp-num-buckets "
        "num-distributed-optimizer-instances megatron-fsdp-grad-comm-dtype megatron-fsdp-main-grads-dtype "
        "empty-unused-memory-level",
    ),
    *noop(
        ANY,
        "cuda-graph-* tp-comm-* no-tp-comm-* disable-tp-comm-* microbatch-group-size-* ddp-pad-* nccl-* fsdp-* "
        "high-priority-*",
    ),
)

_COMMUNICATION = refuse("choose p2p or allgather")
PARALLEL_VALUES = {
    "cp-comm-type": {
        "all_gather": becomes("--cp-comm-type allgather"),
        "a2a": _COMMUNICATION,
        "a2a+p2p": _COMMUNICATION,
    },
}
