"""Megatron-LM's flags of the model that are none of ours."""

from __future__ import annotations

from megaforge.config.megatron.rows import ANY, NOOP, NOT_AVAILABLE, Row, advice, alias, becomes, noop, only, refuse

_SPECS = (
    "megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec",
    "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec",
)
_POSITIONS = "write rope, learned_absolute or none"

MODEL_ROWS: tuple[Row, ...] = (
    *alias(
        1,
        {
            "encoder-num-layers": "--num-layers {}",
            "encoder-seq-length": "--seq-length {}",
            "layernorm-epsilon": "--norm-epsilon {}",
            "padded-vocab-size": "--make-vocab-size-divisible-by {}",
            "init-method-std": "--init-std {}",
            "hybrid-override-pattern": "--hybrid-layer-pattern {}",
        },
    ),
    *alias(
        0,
        {
            "swiglu": "--activation swiglu",
            "squared-relu": "--activation relu2",
            "openai-gelu": "--activation gelu",
            "disable-bias-linear": "--no-add-bias-linear",
            "use-rotary-position-embeddings": "--position-embedding-type rope",
            "no-pad-vocab-size": "--make-vocab-size-divisible-by 1",
        },
    ),
    *noop(
        0,
        "apply-layernorm-1p use-cpu-initialization no-initialization data-parallel-random-init "
        "init-model-with-meta-device is-hybrid-model",
    ),
    Row("no-bias-gelu-fusion", 0, becomes("", "GELU is then by the error function, not by tanh, as in Megatron-LM")),
    only("rope-type", "rope", "there are --position-embedding-type rope and none; leave it out"),
    only("softmax-type", "vanilla", "attention's softmax has no sink here; leave it out, or write vanilla"),
    Row(
        "spec",
        ANY,
        refuse("layers are made from --hybrid-layer-pattern or --layer-schedule; leave it out"),
        dict.fromkeys(_SPECS, NOOP),
    ),
    *advice(
        0,
        "multi-head latent attention is not available; --num-query-groups makes the cache of keys and values small",
        "multi-latent-attention",
    ),
    *advice(
        1,
        "it shapes multi-head latent attention, which is not available; leave it out",
        "q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim",
    ),
    *advice(
        1,
        "attention sees the whole document here; leave it out",
        "window-size window-attn-skip-freq",
    ),
    *advice(0, "gated GELU is not available; write --swiglu", "quick-geglu"),
    *advice(1, "gated GELU is not available; write --swiglu", "glu-linear-offset activation-func-clamp-value"),
    *advice(
        ANY,
        "YaRN is not available; leave it out, or scale rotary positions with --use-rope-scaling",
        "rotary-scaling-factor mscale mscale-all-dim yarn-*",
    ),
    *advice(
        ANY,
        NOT_AVAILABLE,
        "embedding-init-method-std init-method-xavier-uniform no-rope-freq qk-l2-norm qk-clip-* use-mup mup-* "
        "moe-latent-size linear-* experimental-attention-variant dsa-* gdp-* heterogeneous-*",
    ),
    *advice(ANY, "not pretraining of a decoder; leave it out", "decoder-seq-length decoder-num-layers"),
)

# Values of our own flags, as Megatron-LM spells them.
MODEL_VALUES = {
    "normalization": {"rmsnorm": becomes("--normalization rmsnorm"), "layernorm": becomes("--normalization layernorm")},
    "position-embedding-type": {
        name: refuse(f"it is not available; {_POSITIONS}") for name in ("yarn", "mrope", "relative")
    },
    "num-experts": {"0": becomes("--ffn dense")},
}
