"""The names of a run's numbers, as every sink writes them; ``docs/metrics.md`` shows this table.

The JSONL file has them as they stand, in records of the kinds ``step`` and ``evaluation``; TensorBoard, Weights &
Biases and MLflow put ``train/`` and ``valid/`` before them. A name keeps its meaning; a new number gets a new name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """What a number is.

    Attributes:
        text: its meaning and unit.
        when: which records have it.
        measured: whether it depends on the machine; the others are the same at every layout and in a resumed run.
    """

    text: str
    when: str = "every record"
    measured: bool = False


_INTERVAL = "every `--log-interval` iterations"
_EACH = "`--moe-per-layer-logging`"
_AGENT = "`--objective agent`"
_RLVR = "`--objective rlvr`"
_REWARDED = f"{_AGENT}, {_RLVR}"
_CORE = "stage B, its last step"
_RUN_MEMORY = "`--agent-memory run`"
_QUANTIZATION = "`--log-quantization`, " + _INTERVAL

STEP = {
    "loss": Name("cross-entropy in nats, mean over the global batch's tokens; of another `--objective` its `loss`"),
    "mtp_loss/KIND": Name(
        "cross-entropy in nats of the token N + 1 places on, mean over the labels that count; before its weight",
        "`--mtp-num-layers`, for N from 1",
    ),
    "reward": Name("of an episode, or an answer, mean over the global batch's", _REWARDED),
    "redrawn": Name("times that a group was drawn again, mean", _REWARDED),
    "equal_groups": Name("share of groups whose rewards are all alike, those drawn again included", _REWARDED),
    "answer_tokens": Name("that were written of a sample, mean", _RLVR),
    "cut_answers": Name("share of samples that wrote `--rl-max-new-tokens` without an end", _RLVR),
    "accuracy": Name("share of episodes with the right answer", _AGENT),
    "actions": Name("actions that cost something, mean over episodes", _AGENT),
    "decisions_made": Name("decisions of an episode, mean", _AGENT),
    "memory_summaries": Name("vectors in working memory at an episode's end, mean", _AGENT),
    "memory_entries": Name("chunks in the episodic index at an episode's end, mean", _AGENT),
    "episodes_accepted": Name("share of the round's episodes that were accepted", _RUN_MEMORY),
    "run_memory_entries": Name("chunks in the run's memory", _RUN_MEMORY),
    "run_memory_evicted": Name("chunks that it has given up so far", _RUN_MEMORY),
    "run_memory_bytes": Name("its keys and tokens", _RUN_MEMORY),
    "memory_loss": Name("what the summariser cannot make again of hidden vectors, mean over chunks' tokens", _AGENT),
    "cross_entropy": Name("of texts beside episodes in nats, mean over their labels", "`--rl-ce-weight`"),
    "correlation_loss": Name(
        "correlation objective of fast weights, mean over tokens, summed over matrices", "`--plastic-correlation`"
    ),
    "kl": Name("divergence (k3) of the policy from the one that the run began with", _REWARDED),
    "kl_coefficient": Name("its weight in the step's loss", _REWARDED),
    "entropy": Name("of the policy in nats, mean as `--rl-mean` says", _AGENT),
    "value_loss": Name("half the squared error of foretold returns; not trained with `--rl-algorithm grpo`", _AGENT),
    "policy_ratio": Name(
        "new over old probability of what was done, mean over decisions; 1 on a round's first step", _REWARDED
    ),
    "clipped_decisions": Name("share of decisions whose gradient clipping takes away", _REWARDED),
    "policy_lr_factor": Name("factor on the learning rate for the policy's divergence", "`--rl-kl-limit`"),
    "core_perplexity_before": Name("perplexity of stage A's validation text before stage B", _CORE),
    "core_perplexity_reset": Name("the same after stage B, adapters reset", _CORE),
    "core_perplexity": Name("the same after stage B, with adapters", _CORE),
    "grad_norm": Name("L2 norm of the whole gradient before clipping"),
    "grad_norm/KIND": Name(
        "the same of the parameters of one kind: embedding, head, attention, rwkv, mamba, moe, router, ffn, mtp, "
        "norm, other",
        "the kinds that the model has",
    ),
    "unfiltered_grad_norm": Name("L2 norm of the whole gradient before it was filtered", "`--grokfast`"),
    "clipped": Name(
        "1 where `--clip-grad` or `--clip-grad-per-group` scaled gradients down, else 0; its mean is the clipped share"
    ),
    "clamped": Name("share of the gradient's elements that `--clip-grad-value` limited", "`--clip-grad-value`"),
    "lr": Name("learning rate of the step"),
    "decoupled_lr": Name("that of the embedding and the head", "`--decoupled-lr`"),
    "weight_decay": Name("weight decay of the step", "`--weight-decay-incr-style`"),
    "params_norm": Name("L2 norm of all trained weights behind the step", "`--log-params-norm`"),
    "num_zeros": Name("elements of the step's gradient that are 0", "`--log-num-zeros-in-grad`"),
    "weight_decay_factor": Name("what the stage multiplies weight decay by", "`--second-stage-at`"),
    "lr_boost": Name("factor on the step's learning rate; 1 without a boost", "`--plateau-boost`"),
    "plateau_improvement": Name(
        "relative fall of the mean loss from one interval to the next", "`--plateau-boost`, every interval's last step"
    ),
    "tokens": Name("tokens trained on, from the run's beginning"),
    "consumed_samples": Name("samples trained on, from the run's beginning"),
    "global_batch_size": Name("samples of the step", "`--rampup-batch-size`, `--step-batch-size-schedule`"),
    "orthogonality_penalty": Name("what `--adalora-orthogonality` adds to the loss", "`--peft adalora`"),
    "adapter_ranks": Name("ranks of all adapters together that are not zero", "`--peft adalora`"),
    "trained_share": Name("share of the model's parameters that are trained", "`--peft`, " + _INTERVAL),
    "step_seconds": Name("wall time of the step, the wait for its batch included", measured=True),
    "tokens_per_second": Name("tokens of the step over its time", measured=True),
    "mfu": Name(
        "model FLOPs of the step over its time, as a share of the matrix-product rate measured at start", measured=True
    ),
    "peak_memory_bytes": Name(
        "the most that any rank has allocated on its GPU so far; on a CPU its peak resident set",
        _INTERVAL,
        measured=True,
    ),
    "page_faults": Name(
        "pages of memory that the kernel gave out in a step, mean over the interval, most of any rank: few where "
        "malloc keeps what is freed",
        "CPUs, " + _INTERVAL,
        measured=True,
    ),
    "slowest_rank": Name(
        "own work of the rank that has most of it, over the ranks' median; 1 where all are alike",
        "several ranks, " + _INTERVAL,
        measured=True,
    ),
    "wait_share": Name(
        "share of a step that ranks wait for each other, mean over ranks and the interval",
        "several ranks, " + _INTERVAL,
        measured=True,
    ),
    "reserved_memory_bytes": Name(
        "the most that torch's allocator has taken of any rank's GPU so far: `peak_memory_bytes` and what lay idle",
        "GPUs, " + _INTERVAL,
        measured=True,
    ),
    "memory_share": Name(
        "how full the fullest rank's memory was at its peak: its GPU's, or its part of its machine's; `--memory-limit`",
        _INTERVAL,
        measured=True,
    ),
    "host_memory_share": Name(
        "how full the memory of the fullest of the run's machines is now, other programs' part included",
        _INTERVAL,
        measured=True,
    ),
    "disk_share": Name(
        "how full the fullest disk is that the run writes to, of its bytes or its inodes", _INTERVAL, measured=True
    ),
    "goodput": Name(
        "share of the wall time so far, over all the run's processes, that went into steps that count",
        "`--save`, " + _INTERVAL,
        measured=True,
    ),
    "load_balance_loss": Name(
        "mixture-of-experts balance loss, mean over layers, before its coefficient", "models with experts"
    ),
    "z_loss": Name("router z-loss, mean over layers, before its coefficient", "models with experts"),
    "expert_entropy_bits": Name(
        "entropy of the experts' shares, mean over layers; log2 of their number is even", "models with experts"
    ),
    "expert_max_load": Name(
        "tokens of the busiest expert over its layer's mean, greatest of the layers; 1 is even", "models with experts"
    ),
    "experts_used": Name(
        "experts that a layer's tokens go to, by the entropy of their shares, as a share of all; the least even layer; "
        "1 is even",
        "models with experts",
    ),
    "expert_overflow": Name(
        "share of the assignments to experts that full ones left out, of all layers together",
        "`--moe-expert-capacity-factor`",
    ),
    **{
        f"{name}/KIND": Name("that of one layer that has experts: 3.ffn is the one of the fourth block", when)
        for name, when in (
            *((name, _EACH) for name in ("load_balance_loss", "z_loss")),
            *((name, _EACH) for name in ("expert_entropy_bits", "expert_max_load", "experts_used")),
            ("expert_overflow", _EACH + ", `--moe-expert-capacity-factor`"),
        )
    },
    "mod_loss": Name(
        "cross-entropy in nats of what `--mod-inference` says with the tokens that were chosen, mean over tokens and "
        "blocks, before its coefficient",
        "`--mod-capacity-factor`",
    ),
    "mod_agreement": Name(
        "share of tokens of which `--mod-inference` says what was chosen, mean over blocks", "`--mod-capacity-factor`"
    ),
    "mod_kept": Name(
        "share of tokens that `--mod-inference` would choose, mean over blocks", "`--mod-capacity-factor`"
    ),
    "spike": Name("1 where the loss or the gradient's norm is a spike, else 0", "`--lr-on-spike`"),
    "spike_lr_factor": Name("factor on the learning rate after spikes; part of `lr`", "`--lr-on-spike`"),
    "max_attention_logit": Name("largest attention logit of any head, over the step's batch", "`--qk-clip`"),
    "qk_clipped": Name("1 where it was above `--qk-clip-threshold`, and heads were scaled down, else 0", "`--qk-clip`"),
    "quant_lambda": Name(
        "share of the way from full precision to the quantized product", "`--quant-lambda`, `--quant-stages`"
    ),
    "quant_error": Name("L2 norm of quantized minus latent weights over that of the latent ones", _QUANTIZATION),
    "quant_flips": Name("share of the codes that are others than at the last such record", _QUANTIZATION),
    "quant_saturation": Name("share of the weights beyond the last code by more than half a step", _QUANTIZATION),
    "quant_step": Name("what a code of 1 stands for, mean over the quantized weights", _QUANTIZATION),
    "quant_clip_weights": Name("share of the weights' range that levels reach", "`--quant-clip`"),
    "quant_clip_activations": Name("share of the activations' range that levels reach", "`--quant-clip`"),
    "distill": Name(
        "divergence from the teacher's predictions in nats, mean over the labels; before its weight",
        "`--objective distillation`",
    ),
    "relations": Name(
        "divergence of relations from the teacher's in nats, mean over tokens and heads; before its weight",
        "`--distill-relation-weight`",
    ),
    "label_smoothing": Name(
        "by how many nats the uniform distribution's cross-entropy is beyond the labels', mean over the labels; before "
        "its weight",
        "`--label-smoothing`",
    ),
    "contrastive": Name(
        "InfoNCE of sequences' halves in nats, mean over the sequences; before its weight", "`--contrastive-weight`"
    ),
    "l1_penalty": Name(
        "sum of absolute weights that the penalty is of, as the step found them; before its coefficient", "`--l1-coeff`"
    ),
    "l2_penalty": Name("half the sum of their squares, as the step found them; before its coefficient", "`--l2-coeff`"),
    "loss_scale": Name("factor on the loss", "`--fp16`"),
    "skipped": Name(
        "1 where the gradient was not finite and the update was left out, else 0", "`--fp16`, `--skip-nonfinite-steps`"
    ),
}

OWN_METRIC = "`--evaluation-metrics`"
EVALUATION = {
    "loss": Name("cross-entropy in nats, mean over the evaluated tokens"),
    "perplexity": Name("exp of the loss"),
    "bits_per_byte": Name("cross-entropy in bits over the UTF-8 bytes of the text", "datasets that know their bytes"),
    "accuracy": Name("share of tokens whose most likely prediction was right"),
    "tokens": Name("tokens evaluated"),
    "label_probability": Name("probability of each label, mean over the evaluated tokens", OWN_METRIC),
}

MEASURED = frozenset(name for name, about in STEP.items() if about.measured)


def known(kind: str, name: str) -> bool:
    """Whether the records of ``kind`` may hold ``name``."""
    if kind != "step":
        return name in EVALUATION
    head, slash, _ = name.partition("/")
    return (f"{head}/KIND" if slash else name) in STEP


def table() -> str:
    """Both kinds of record as Markdown."""
    lines = []
    for title, names in (("step", STEP), ("evaluation", EVALUATION)):
        lines += [f"| {title} | meaning | where |", "|---|---|---|"]
        lines += [f"| `{name}` | {about.text} | {about.when} |" for name, about in names.items()] + [""]
    return "\n".join(lines).rstrip()
