"""Megatron-LM's command lines: its spellings of our flags, what to write for those we do not have, and a word where a
line that runs in both programs means another model or another run here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megaforge.config.config import Config
from megaforge.config.lr_shapes import RateShape
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import kinds_of
from megaforge.errors import UserError
from megaforge.registry import LR_SCHEDULES

# Its spellings of what one of our flags says with a value.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "--swiglu": ("--activation", "swiglu"),
    "--squared-relu": ("--activation", "relu2"),
    "--disable-bias-linear": ("--no-add-bias-linear",),
    "--layernorm-epsilon": ("--norm-epsilon",),
    "--hybrid-override-pattern": ("--hybrid-layer-pattern",),
}
_NO_TABLE, _GROUPED = "--no-position-embedding", "--group-query-attention"

_DP = "data parallelism is what --tp, --pp and --cp leave of the ranks you start; leave this flag out"
# Flags that we do not have, and what says the same here.
_OURS: Mapping[str, str] = {
    "--encoder-num-layers": "--num-layers",
    "--encoder-seq-length": "--seq-length",
    "--openai-gelu": "--activation gelu",
    "--use-rotary-position-embeddings": "--position-embedding-type rope",
    "--init-method-std": "--init-std",
    "--no-pad-vocab-size": "--make-vocab-size-divisible-by 1",
    "--padded-vocab-size": "--make-vocab-size-divisible-by N",
    "--moe-ffn-hidden-size": "--ffn-hidden-size, the inner width of each expert",
    "--moe-layer-freq": "--hybrid-layer-pattern, with E for a mixture of experts and - for a dense FFN",
    "--use-distributed-optimizer": "--zero-stage 1",
    "--data-parallel-sharding-strategy": "--zero-stage 0, 1 or 2",
    "--use-megatron-fsdp": "--zero-stage 2",
    "--use-torch-fsdp2": "--zero-stage 2",
    "--num-virtual-stages-per-pipeline-rank": "--vpp",
    "--pipeline-model-parallel-layout": "| in --hybrid-layer-pattern",
    "--decoder-first-pipeline-num-layers": "| in --hybrid-layer-pattern",
    "--decoder-last-pipeline-num-layers": "| in --hybrid-layer-pattern",
    "--recompute-activations": "--recompute selective",
    "--recompute-granularity": "--recompute full or --recompute selective",
    "--recompute-method": "--recompute full",
    "--recompute-num-layers": "--recompute full",
    "--recompute-modules": "--recompute selective or --recompute moe",
    "--moe-layer-recompute": "--recompute moe",
    "--optimizer-cpu-offload": "--optimizer paged_adam",
    "--optimizer-offload-fraction": "--optimizer paged_adam, which keeps all moments in host memory",
    "--overlap-cpu-optimizer-d2h-h2d": "--optimizer paged_adam, which overlaps its copies with the update",
    "--use-torch-optimizer-for-cpu-offload": "--optimizer paged_adam",
    "--decoupled-lr": "--lr-mult embedding=X head=X, with its share X of --lr",
    "--decoupled-min-lr": "--lr-mult embedding=X head=X, whose X is on --min-lr too",
    "--cpu-offloading-num-layers": "--cpu-offload-activations",
    "--reset-position-ids": "--reset-at-document-boundaries, which does both at once",
    "--reset-attention-mask": "--reset-at-document-boundaries, which does both at once",
    "--dataloader-inter-document-masking": "--reset-at-document-boundaries",
    "--wandb-exp-name": "--run-name",
    "--deterministic-mode": "--deterministic",
    "--skip-train": "tools/evaluate.py",
    "--test-mode": "tools/evaluate.py",
    "--log-progress": "--metrics-file",
    "--yaml-cfg": "--config FILE.yaml",
    "--config-logger-dir": "--print-config",
    "--fake-process-group": "--dry-run",
}
# What is done, or makes no difference, without the flag.
_NEEDLESS = frozenset(
    (
        "apply-layernorm-1p rope-type use-cpu-initialization no-initialization data-parallel-random-init "
        "init-model-with-meta-device is-hybrid-model moe-router-dtype moe-grouped-gemm moe-permute-fusion "
        "moe-router-fusion moe-token-dispatcher-type moe-flex-dispatcher-backend moe-enable-deepep "
        "moe-shared-expert-overlap moe-pad-expert-input-to-capacity overlap-moe-expert-parallel-comm "
        "calculate-per-token-loss accumulate-allreduce-grads-in-fp32 local-rank use-mcore-models transformer-impl "
        "attention-backend use-flash-attn attention-softmax-in-fp32 no-masked-softmax-fusion no-rope-fusion "
        "no-bias-swiglu-fusion no-bias-gelu-fusion no-bias-dropout-fusion no-gradient-accumulation-fusion "
        "cross-entropy-loss-fusion cross-entropy-fusion-impl te-rng-tracker inference-rng-tracker "
        "enable-experimental no-overlap-p2p-communication use-tp-pp-dp-mapping apply-query-key-layer-scaling "
        "ddp-num-buckets ddp-average-in-collective use-nccl-ub disable-gloo-process-groups "
        "empty-unused-memory-level data-cache-path no-mmap-bin-files no-create-attention-mask-in-dataloader "
        "num-dataset-builder-threads dataloader-type trust-remote-code use-gigatoken use-persistent-ckpt-worker "
        "ckpt-format auto-detect-ckpt-format use-dist-ckpt ckpt-fully-parallel-save ckpt-fully-parallel-load "
        "ckpt-assume-constant-structure log-throughput log-validation-ppl-to-tensorboard tensorboard-queue-size "
        "no-check-for-nan-in-loss-and-grad"
    ).split()
)

# What a line without --config leaves unsaid: our flag, our value, what is meant there.
_UNSAID = (
    ("model.activation", "relu2", "--activation gelu"),
    ("model.add_bias_linear", False, "--add-bias-linear"),
    ("model.normalization", "rmsnorm", "--normalization layernorm"),
    ("model.norm_epsilon", 1e-6, "--norm-epsilon 1e-5"),
    ("model.reset_at_document_boundaries", True, "--no-reset-at-document-boundaries"),
    ("optimizer.adam_beta2", 0.95, "--adam-beta2 0.999"),
    ("optimizer.weight_decay", 0.1, "--weight-decay 0.01"),
    ("optimizer.lr_decay_style", "cosine", "--lr-decay-style linear"),
    ("checkpoint.keep_last", 3, "--keep-last 0"),
)
_SIZES = ("model.num_layers", "model.hidden_size", "model.num_attention_heads")
_TIED_OWN_LOGIT = 4.0  # a tied embedding starts at no more than this over the hidden size


def respell(argv: Sequence[str]) -> list[str]:
    """Flags with underscores or Megatron's other names, rewritten to ours.

    Raises:
        UserError: a flag means something else there than it would here.
    """
    out: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = flag.replace("_", "-")
            out += SPELLINGS.get(flag, (flag,))
            if equals:
                out[-1] += "=" + value
        else:
            out.append(word)
    if _NO_TABLE in out:
        if not any(word.startswith("--position-embedding-type") for word in out):
            raise UserError(
                f"{_NO_TABLE}: Megatron-LM takes it beside --position-embedding-type rope, to say that there is no "
                "learned table (here there never is one); write --position-embedding-type rope, or none for no "
                "positions at all"
            )
        out = [word for word in out if word != _NO_TABLE]
    if _GROUPED in out:
        if not any(word.startswith("--num-query-groups") for word in out):
            raise UserError(f"{_GROUPED} without --num-query-groups: write --num-query-groups N (1 in Megatron-LM)")
        out = [word for word in out if word != _GROUPED]
    return out


def advice(flag: str) -> str | None:
    """What to write for a flag of Megatron's that we do not have; None where we know nothing of it."""
    if flag in ("--dp", "--data-parallel-size"):
        return _DP
    if flag in _OURS:
        return f"write {_OURS[flag]}"
    return "leave it out: it is so without the flag, or changes speed only" if flag[2:] in _NEEDLESS else None


def notes(config: Config, origins: Mapping[str, str]) -> tuple[str, ...]:
    """What of this configuration means something else in Megatron-LM, where the command line asked for it."""
    return tuple(_notes(config, origins))


def _notes(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    typed = {key for key, origin in origins.items() if origin.startswith("command line")}
    model, name = config.model, config.name
    if name == "custom" and typed.intersection(_SIZES):
        yield from _unsaid(config, origins)
    if "model.activation" in typed and model.activation == "swiglu" and model.ffn_hidden_size is None:
        there = 64 * (8 * model.hidden_size // 3 // 64)
        yield (
            f"--activation swiglu without --ffn-hidden-size: {model.ffn_size} wide here (4 x hidden size), {there} in "
            f"Megatron-LM; write --ffn-hidden-size {there} for that"
        )
    if "model.activation" in typed and model.activation == "gelu" and not model.add_bias_linear:
        yield "--activation gelu is the tanh form here; Megatron-LM's is the exact one where there are no biases"
    if "model.normalization" in typed and model.normalization == "layernorm" and _in_megatron(model):
        yield "--normalization layernorm also norms the embedding here, as RWKV does; Megatron-LM does not"
    tied = not model.untie_embeddings_and_output_weights
    if "model.init_std" in typed and tied and model.init_std > _TIED_OWN_LOGIT / model.hidden_size:
        yield (
            f"--init-std {model.init_std:g}: the tied embedding starts at {_TIED_OWN_LOGIT / model.hidden_size:g} "
            "(4 / hidden size); --untie-embeddings-and-output-weights gives it the std that you ask for"
        )
    if "model.moe_expert_capacity_factor" in typed and model.moe_expert_capacity_factor is not None:
        yield (
            f"--moe-expert-capacity-factor {model.moe_expert_capacity_factor:g} is a share of each sequence here, in "
            "training only; in Megatron-LM of a rank's micro-batch, and in evaluation too"
        )
    balancing = model.moe_router_load_balancing_type
    if "model.moe_router_load_balancing_type" in typed and balancing == "global_aux_loss":
        yield (
            "--moe-router-load-balancing-type global_aux_loss uses the load of the previous step; Megatron-LM's that "
            "of the micro-batches so far"
        )
    if "training.rampup_batch_size" in typed:
        yield (
            "--rampup-batch-size: the learning rate's schedule counts steps of any size here, also where its lengths "
            "are given in samples; Megatron-LM's counts samples then"
        )
    if config.length.train_samples is not None and "length.train_samples" in typed:
        yield "--train-samples: the last step that begins is whole here; Megatron-LM leaves out what does not fill one"
    if "optimizer.lr_decay_style" in typed and not typed & {"optimizer.lr_wsd_decay_style"}:
        shape: RateShape = LR_SCHEDULES.get(config.optimizer.lr_decay_style)
        if "lr_wsd_decay_style" in shape.reads:
            yield (
                f"--lr-decay-style {config.optimizer.lr_decay_style} decays by 1 - sqrt, over a tenth of the run "
                "unless told; in Megatron-LM --lr-wsd-decay-style is exponential unless told"
            )


def _unsaid(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    """Of a line that gives a model's sizes and no preset: what it gets, and what Megatron-LM would take it for."""
    model = config.model
    chosen = {"model.hybrid_layer_pattern", "model.layer_schedule", "model.ffn"}
    if all(origins[key] == "default" for key in chosen):
        yield (
            f"--num-layers {model.num_layers} --hidden-size {model.hidden_size} without --config or a pattern: RWKV-7 "
            f"and attention blocks with {model.num_experts} experts each; for a GPT as in Megatron-LM write "
            "--layer-schedule attention --ffn dense"
        )
    elif origins["model.ffn"] == "default" and origins["model.hybrid_layer_pattern"] == "default":
        yield f"--ffn moe, as none was given: {model.num_experts} experts a block; for a dense FFN write --ffn dense"
    on_purpose = any(origins[key] != "default" for key in ("model.hybrid_layer_pattern", "model.layer_schedule"))
    if on_purpose and not _in_megatron(model):
        return  # Megatron-LM has no such model
    unsaid = [write for key, ours, write in _UNSAID if origins[key] == "default" and _value(config, key) == ours]
    if unsaid:
        yield (
            f"Megatron-LM's defaults, where this line is silent, would be: {' '.join(unsaid)}; and learned positions "
            "and dropout 0.1, which are not available"
        )


def _in_megatron(model: ModelConfig) -> bool:
    return all(kind.in_megatron for kind in kinds_of(model))


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
