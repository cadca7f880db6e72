"""Flags without their partner: each row of the table is reached, refused or said, and quiet beside its partner."""

from __future__ import annotations

import re

import pytest

from megaforge.config.cli import parse_config
from megaforge.config.partners import PARTNERS
from megaforge.config.peft_method import PeftMethod
from megaforge.config.peft_partners import method_partners
from megaforge.config.quant_partners import of_model
from megaforge.config.schema import settings
from megaforge.errors import UserError
from megaforge.registry import PEFT_METHODS

EVALUATED = ("--eval-iters", "1", "--eval-interval", "2")
IN_EPOCHS = ("--eval-iters", "1", "--eval-interval-epochs", "0.1")
DENSE = ("--ffn", "dense")
TAUGHT = ("--objective", "distillation", "--distill-from", "d")
ALONE = ("--quantize-weights", "int4", "--quantize-activations", "none")
ATTENTION, RWKV = ("--layer-schedule", "attention"), ("--layer-schedule", "rwkv")

GROWING = ("--weight-decay-incr-style", "linear", "--start-weight-decay", "0", "--end-weight-decay", "0.1")

SELECTIVE = ("--recompute", "selective")
PLAYS, TASK = ("--objective", "agent"), ("--data-path", "tasks://kv_chunks", "--tokenizer-model", "64")
TASK = (*TASK, "--global-batch-size", "16")
EPISODES = (*PLAYS, "--agent-heads", *TASK)
WRITES = ("--objective", "rlvr", *TASK)
ADAPTED = ("--peft", "lora", "--lora-dropout", "0")

REFUSED = [
    (("--machine", "h100-80g"), (), "add --layout auto"),
    (("--stream-round", "9"), (), "add --data-order streamed"),
    (("--json-key", "body"), ("--data-path", "a"), "use --data-path stream:FILES"),
    (("--stream-on-error", "skip"), (), "use --data-path stream:FILES"),
    (("--data-cache-size", "9"), (), "add --data-cache-dir DIR"),
    (("--fim-rate", "0.3"), (), "add --fim-data"),
    (("--fim-domain-rates", "code:1"), (), "add --fim-data"),
    (("--span-mask-length", "5"), (), "add --span-mask-rate"),
    (("--mask-token", "3"), (), "--token-dropout 0.1"),
    (("--compress-activations",), (), "add --recompute selective"),
    (("--compress-activations",), (*SELECTIVE, "--cpu-offload-activations"), "leave out the one or the other"),
    (("--compress-activations",), (*SELECTIVE, "--mtp-mode", "parallel", "--mtp-num-layers", "2"), "sequential"),
    (("--compress-activations",), (*SELECTIVE, "--micro-batch-size", "64"), "63 or less"),
    (("--micro-batch-size", "auto"), (), "add --global-batch-size N"),
    (("--micro-batch-size", "auto"), ("--global-batch-size", "8", "--layout", "auto"), "leave it out"),
    (("--sequence-checkpoint", "64"), (*SELECTIVE, "--compress-activations"), "leave out the one or the other"),
    (("--zero-quantized-gather",), ("--quantize-weights", "ternary"), "add --zero 1"),
    (("--objective", "distillation"), (), "--distill-from DIR"),
    (("--distill-from", "d"), (), "--objective distillation"),
    (("--distill-from", "d"), ("--objective", "next_token"), "--objective distillation"),
    (("--distill-temperature", "2"), (), "--distill-from DIR"),
    (("--distill-relation-layer", "2"), (), "--distill-relation-weight 1"),
    (("--distill-relation-weight", "2"), (*TAUGHT, "--cp", "2"), "use --cp 1"),
    (("--distill-relation-weight", "2"), (*TAUGHT, "--recompute", "full"), "--recompute selective"),
    (("--contrastive-temperature", "2"), (), "add --contrastive-weight 0.1"),
    (("--contrastive-weight", "2"), ("--micro-batch-size", "1"), "use --micro-batch-size 2 or more"),
    (("--rl-clip", "0.1"), (), "add --objective agent"),
    (("--agent-heads",), (), "add --objective agent"),
    (("--core-eval-iters", "3"), (), "in the section stage_b or in --stage-b-flags"),
    (("--agent-memory", "run"), (), "add --objective agent"),
    (("--agent-memory-capacity", "9"), EPISODES, "add --agent-memory run"),
    (("--memory-dim", "64"), (), "add --agent-heads"),
    ((*PLAYS, *TASK), (), "add --agent-heads"),
    ((*PLAYS, "--agent-heads"), ("--global-batch-size", "16"), "--data-path tasks://kv_chunks"),
    (EPISODES, ("--hidden-dropout", "0.1"), "--hidden-dropout 0"),
    (("--agent-window", "2048"), EPISODES, "a shorter --agent-window"),
    (EPISODES, ("--peft", "bitfit"), "use --peft lora, qlora or plastic"),
    ((*EPISODES, "--rl-group-size", "5"), (), "multiple of --rl-group-size"),
    (EPISODES, ("--global-batch-size", "16", "--rampup-batch-size", "8", "8", "64"), "where the batch grows"),
    (EPISODES, ("--no-reset-at-document-boundaries",), "leave out --no-reset-at-document-boundaries"),
    (("--halve-micro-batch-on-oom",), EPISODES, "a smaller --micro-batch-size"),
    (("--rl-gamma", "0.9"), EPISODES, "add --rl-algorithm ppo"),
    (("--no-rl-scale-advantages",), (*EPISODES, "--rl-algorithm", "ppo"), "add --rl-algorithm grpo"),
    (("--rl-kl-horizon", "9"), EPISODES, "add --rl-kl-target"),
    (("--rl-max-new-tokens", "9"), (), "add --objective rlvr"),
    (("--rl-task-chunks", "2"), (*WRITES, "--rl-kl", "0", "--data-path", "questions://f"), "tasks://kv_chunks"),
    (("--rl-memory-tokens", "9"), (*WRITES, *ADAPTED), "add --rl-chunk-tokens 64"),
    (("--objective", "rlvr"), ("--global-batch-size", "16", "--rl-kl", "0"), "--data-path tasks://kv_chunks"),
    (("--agent-chunks", "2"), (*WRITES, *ADAPTED), "add --objective agent"),
    (("--rl-algorithm", "ppo"), (*WRITES, *ADAPTED), "use --rl-algorithm grpo"),
    (("--rl-kl-limit", "1"), (*WRITES, "--rl-kl", "0"), "add --rl-kl 0.02, or --peft lora"),
    (("--context-parallel-size", "2"), (*WRITES, *ADAPTED), "use --cp 1"),
    (("--mtp-num-layers", "1"), (*WRITES, "--rl-kl", "0"), "use --mtp-num-layers 0"),
    (("--rl-reward", "number"), (), "add --objective agent"),
    (("--rl-format", "x"), EPISODES, "add --rl-reward exact format=0.1"),
    (("--rl-reward", "format"), EPISODES, "add --rl-format"),
    (("--answer-field", "gold"), (), "give --data-path questions://FILE.jsonl"),
    (("--rl-ce-weight", "0.1"), EPISODES, "add --peft lora or plastic"),
    (("--rl-ce-samples", "2"), EPISODES, "add --rl-ce-weight"),
    (("--rl-ce-samples", "99"), (*EPISODES, "--peft", "plastic", "--rl-ce-weight", "1"), "at most --rl-group-size"),
    (("--evaluate-at-end-lengths", "64"), (), "add --evaluate-at-end passkey"),
    (("--evaluate-at-end-examples", "9"), (), "add --evaluate-at-end passkey"),
    (("--evaluation-metrics", "label_probability"), (), "add --eval-iters N"),
    (("--generate-tokens", "9"), (), "add --generate-prompts TEXT"),
    (("--generate-prompts", "Once"), (), "add --eval-iters N"),
    (("--generate-prompts", "Once"), (*EVALUATED, "--cp", "2"), "use --pp 1 --cp 1"),
    (("--lora-rank", "4"), (), "add --peft lora"),
    (("--peft", "state"), ("--cp", "2"), "use --cp 1"),
    (("--peft", "prefix"), ("--cp", "2"), "use --cp 1"),
    (("--peft", "p_tuning_v2"), ("--attention-dropout", "0.1"), "use --attention-dropout 0"),
    (("--lora-rank-steps", "2"), ("--pretrained-checkpoint", "d"), "add --peft lora"),
    (("--lora-rank-steps", "2"), ("--peft", "lora"), "add --pretrained-checkpoint DIR"),
    (("--lora-rank-energy", "0.5"), ("--peft", "lora"), "add --lora-rank-steps N"),
    (("--peft-from", "d"), ("--peft", "lora"), "add --pretrained-checkpoint DIR"),
    (("--prefix-length", "8"), (), "add --peft prefix or p_tuning_v2"),
    (("--prefix-hidden-size", "8"), ("--peft", "p_tuning_v2"), "add --peft prefix"),
    (("--qlora-block-size", "32"), ("--peft", "lora"), "add --peft qlora"),
    (("--adalora-interval", "10"), ("--peft", "lora"), "add --peft adalora"),
    (("--use-rslora",), ("--peft", "adalora"), "add --peft lora or qlora"),
    (("--peft-targets", "moe"), (), "add --peft lora"),
    (("--plastic-rank", "4"), (), "add --peft plastic"),
    (("--peft", "plastic"), ("--compile",), "leave --compile out"),
    (("--train-on-prompts",), (), "--data-path chat://FILE.jsonl"),
    (("--prometheus-address", "0.0.0.0"), (), "add --prometheus-port N"),
    (("--qk-clip-alpha", "0.4"), (), "add --qk-clip"),
    (("--qk-clip",), ("--qk-layernorm",), "leave one of the two out"),
    (("--rope-scaling-factor", "4"), (), "add --use-rope-scaling"),
    (("--mtp-mode", "parallel"), (), "add --mtp-num-layers N"),
    (("--mtp-mode", "parallel"), ("--mtp-num-layers", "0"), "add --mtp-num-layers N"),
    (("--apply-wd-to-qk-layernorm",), (), "add --qk-layernorm"),
    (("--mod-every", "3"), (), "add --mod-capacity-factor"),
    (("--ema-evaluate",), ("--eval-iters", "1"), "add --ema-decay"),
    (("--ema-evaluate",), ("--ema-decay", "0.9"), "--eval-iters N"),
    (("--save-interval", "2"), (), "--save DIR"),
    (("--save-interval", "0"), (), "--save DIR"),
    (("--save-interval-epochs", "0.5"), (), "--save DIR"),
    (("--keep-last", "9"), (), "--save DIR"),
    (("--save-retain-interval", "9"), (), "--save DIR"),
    (("--async-save",), (), "--save DIR"),
    (("--audit-trail",), (), "add --save DIR"),
    (("--snapshot-interval", "5"), (), "--save DIR"),
    (("--snapshot-interval", "5"), ("--save", "r", "--load", "r", "--distributed-backend", "mpi"), "backend gloo"),
    (("--snapshot-peers",), ("--save", "r", "--load", "r"), "--snapshot-interval N"),
    (("--encrypt-checkpoints",), (), "--save DIR"),
    (("--save-replica", "memory://x"), (), "--save DIR"),
    (("--keep-best-only",), ("--save", "r"), "add --keep-best N"),
    (("--keep-last", "9"), ("--save", "r", *EVALUATED, "--keep-best", "1", "--keep-best-only"), "leave out the one"),
    (("--async-save",), ("--save", "r", "--distributed-backend", "mpi"), "--distributed-backend gloo"),
    (("--ckpt-step", "9"), (), "--load DIR"),
    (("--elastic", "2:4"), (), "add --global-batch-size N"),
    (("--elastic", "2:4"), ("--global-batch-size", "8", "--world-size", "4"), "leave out the one or the other"),
    (("--decoupled-min-lr", "0"), (), "add --decoupled-lr X"),
    (("--start-weight-decay", "0"), (), "add --weight-decay-incr-style linear or cosine"),
    (GROWING, ("--second-stage-at", "0.5"), "--second-stage-at and"),
    (("--skip-train",), ("--load", "r"), "--eval-iters N"),
    (("--eval-test",), ("--split", "8,1,1"), "--eval-iters N"),
    (("--eval-test",), ("--eval-iters", "1"), "--test-data-path"),
    (("--skip-train",), ("--eval-iters", "1"), "--load DIR"),
    (("--keep-best", "1"), EVALUATED, "--save DIR"),
    (("--keep-best", "1"), ("--save", "r"), "--eval-iters N"),
    (("--keep-best", "1"), ("--save", "r", "--eval-iters", "1"), "--eval-interval N"),
    (("--keep-best", "1"), ("--save", "r", *EVALUATED, "--save-interval", "3"), "multiple of --eval-interval"),
    (("--keep-best", "1"), ("--save", "r", *EVALUATED, "--save-interval", "0"), "multiple of --eval-interval"),
    (("--keep-best", "1"), ("--save", "r", *EVALUATED, "--save-interval-epochs", "1"), "multiple of --eval-interval"),
    (("--keep-best", "1"), ("--save", "r", *IN_EPOCHS, "--save-interval-epochs", "0.25"), "multiple of --eval"),
    (("--keep-best", "1"), ("--save", "r", *IN_EPOCHS, "--save-interval", "5"), "both in epochs"),
    (("--eval-interval", "2"), (), "--eval-iters N"),
    (("--eval-interval-epochs", "2"), (), "--eval-iters N"),
    (("--eval-global-batch-size", "2"), (), "--eval-iters N"),
    (("--phase6-output", "d"), (), "--save DIR"),
    (("--digest-interval", "2"), (), "--digest-file FILE"),
    (("--digest-file", "f"), (), "--digest-interval N"),
    (("--early-stopping-patience", "2"), ("--eval-iters", "1"), "--eval-interval N"),
    (("--finetune",), (), "--load DIR"),
    (("--lr-wsd-decay-iters", "5"), (), "--lr-decay-style WSD"),
    (("--lr-wsd-decay-style", "linear"), (), "--lr-decay-style WSD"),
    (("--lr-wsd-decay-samples", "5"), (), "--lr-decay-style WSD"),
    (("--lr-restart-epochs", "5"), (), "--lr-decay-style cosine-restarts"),
    (("--lr-restart-iters", "5"), (), "--lr-decay-style cosine-restarts"),
    (("--lr-restart-mult", "2"), (), "--lr-decay-style cosine-restarts"),
    (("--lr-plateau-patience", "5000"), (), "--lr-decay-style plateau"),
    (("--lr-decay-style", "plateau"), ("--eval-iters", "1"), "--eval-interval N"),
    (("--lr-spike-window", "50"), (), "--lr-on-spike"),
    (("--spike-window", "50"), (), "--spike-rollback 100"),
    (("--spike-skip-batches", "5"), (), "--spike-rollback 100"),
    (("--repeat-suspect-steps",), ("--grokfast", "ema"), "--grokfast"),
    (("--lr-warmup-init", "1e-6"), (), "--lr-warmup-fraction"),
    (("--lr-warmup-iters", "500"), ("--train-iters", "500"), "warm-up"),
    (("--lr-warmup-iters", "1000"), ("--train-iters", "2000", "--lr-decay-iters", "500"), "warm-up"),
    (("--no-decoupled-weight-decay",), ("--optimizer", "sgd"), "--optimizer adam"),
    (("--muon-scale-mode", "unit_rms_norm"), (), "add --optimizer muon or normuon"),
    (("--no-muon-use-nesterov",), ("--optimizer", "sgd"), "add --optimizer muon or normuon"),
    (("--normuon-beta2", "0.9"), ("--optimizer", "muon"), "add --optimizer normuon"),
    (("--muon-momentum", "0"), (), "add --optimizer muon or normuon"),
    (("--normuon-beta2", "0"), ("--optimizer", "muon"), "add --optimizer normuon"),
    (("--grokfast-lambda", "0"), (), "--grokfast ema"),
    (("--grokfast-alpha", "0"), (), "--grokfast ema"),
    (("--qk-clip-alpha", "0"), (), "add --qk-clip"),
    (("--second-stage-lr-factor", "0"), (), "--second-stage-at 0.5"),
    (("--lr-plateau-patience", "0"), (), "--lr-decay-style plateau"),
    (("--grokfast-lambda", "3"), (), "--grokfast ema"),
    (("--grokfast-alpha", "0.9"), ("--grokfast", "ma"), "--grokfast ema"),
    (("--grokfast-window", "9"), ("--grokfast", "ema"), "--grokfast ma"),
    (("--plateau-boost-factor", "3"), (), "add --plateau-boost"),
    (("--plateau-boost-interval", "3"), (), "add --plateau-boost"),
    (("--grad-compression-rank", "8"), (), "--grad-compression powersgd"),
    (("--dry-run-world-size", "8"), (), "--dry-run"),
    (("--dry-run-ranks", "stage"), (), "--dry-run"),
    (("--optimizer", "qat_adam"), (), "--converters with a quantizer"),
    (("--quant-noise", "0.1"), (), "--quantize-weights ternary"),
    (("--quant-group-size", "64"), ("--quantize-weights", "int4"), "--quant-granularity group"),
    (("--bitnet-layers", "ffn"), (), "--quantize-weights ternary"),
    (("--log-quantization",), (), "--quantize-weights ternary"),
    (("--quant-lambda", "linear"), ("--quantize-weights", "int4"), "--quant-lambda-end-iters N"),
    (("--quant-lambda-end-iters", "9"), ("--quantize-weights", "int4"), "--quant-lambda linear"),
    (("--quant-lambda-steps", "9"), ("--quantize-weights", "int4"), "--quant-lambda step"),
    (("--quant-lambda-sharpness", "9"), ("--quantize-weights", "int4"), "--quant-lambda sigmoid"),
    (("--quant-stages", "0:int4"), ("--quantize-weights", "int4", "--second-stage-at", "0.5"), "--second-stage-at"),
    (("--hadamard", "64"), (), "--quantize-activations int8"),
    (("--calibration-samples", "9"), ("--quantize-weights", "int4"), "add --online-calibration"),
    (("--quant-clip", "weights"), ("--eval-iters", "1"), "--quantize-weights ternary"),
    (("--quant-clip", "both"), (*ALONE, "--eval-iters", "1"), "--quant-clip weights"),
    (("--quant-clip", "both"), ("--quantize-weights", "int4"), "--eval-iters N"),
    (("--quant-clip-interval", "9"), ("--quantize-weights", "int4"), "--quant-clip weights, activations or both"),
    (("--qat-latent-limit", "2"), (), "--optimizer qat_adam or qat_sgd"),
    (("--qat-damping", "1"), ("--optimizer", "sgd"), "--optimizer qat_adam or qat_sgd"),
    (("--second-stage-lr-factor", "0.5"), (), "--second-stage-at 0.5"),
    (("--second-stage-weight-decay-factor", "0.5"), (), "--second-stage-at 0.5"),
    (("--moe-router-bias-update-rate", "0.1"), (), "--moe-router-enable-expert-bias"),
]
SAID = [
    (("--encrypt-checkpoints",), ("--save", "r", "--phase6-output", "d"), "weights in plain all the same"),
    (("--enforce-compliance",), (), "changes nothing without --save"),
    (("--compliance-level", "basic"), (), "changes nothing without --save"),
    (("--min-compliance-score", "0.5"), (), "changes nothing without --save"),
    (("--num-experts", "4"), DENSE, "--ffn moe"),
    (("--moe-router-score-function", "sigmoid"), DENSE, "--ffn moe"),
    (("--cp-comm-type", "p2p"), (), "--cp 1"),
    (("--no-load-optim",), (), "--load"),
    (("--mtp-loss-scaling-factor", "0.1"), (), "no --mtp-num-layers"),
    (("--no-exit-on-missing-checkpoint",), (), "nothing is loaded"),
    (("--reset-data",), ("--load", "r", "--finetune"), "--finetune"),
    (("--exit-interval", "2"), (), "--save"),
    (("--exit-interval-epochs", "2"), (), "--save"),
    (("--exit-duration-in-mins", "2"), (), "--save"),
    (("--early-stopping-metric", "accuracy"), EVALUATED, "--keep-best"),
    (("--min-lr", "1e-5"), ("--lr-decay-style", "constant"), "constant"),
    (("--lr-decay-iters", "9"), ("--lr-decay-style", "constant"), "constant"),
    (("--lr-decay-epochs", "9"), ("--lr-decay-style", "constant"), "constant"),
    (("--hysteresis", "4"), ("--bf16",), "--fp16"),
    (("--sgd-momentum", "0"), (), "--optimizer sgd"),
    (("--sgd-momentum", "0.5"), ("--optimizer", "muon"), "--optimizer sgd"),
    (("--adam-beta2", "0.9"), ("--optimizer", "sgd"), "--optimizer adam"),
    (("--pipeline-schedule", "gpipe"), (), "--pp 1"),
    (("--run-name", "x"), (), "--wandb-project"),
    (("--valid-data-path", "v"), (), "--eval-iters N"),
    (("--test-data-path", "v"), (), "--eval-test"),
    (("--wandb-entity", "x"), (), "--wandb-project"),
    (("--loss-scale", "1024"), ("--bf16",), "--fp16"),
    (("--hysteresis", "4"), ("--fp16", "--loss-scale", "1024"), "--loss-scale fixes"),
    (("--manual-gc-interval", "9"), (), "--manual-gc"),
    (("--transformer-pct", "50"), ("--hybrid-layer-pattern", "RE*E", "--num-layers", "2"), "--hybrid-layer-pattern"),
    (("--transformer-pct", "50"), RWKV, "--layer-schedule"),
    (("--moe-token-drop-policy", "probs"), (), "--moe-expert-capacity-factor"),
    (("--sequence-checkpoint", "64"), ATTENTION, "no RWKV-7 or Mamba-2 layer"),
    (("--sequence-checkpoint", "64"), ("--cp", "2"), "the ranks of --cp"),
    (("--moe-per-layer-logging",), (*ATTENTION, "--ffn", "dense"), "no layer with experts"),
    (("--moe-aux-loss-coeff", "0.1"), ("--moe-router-load-balancing-type", "none"), "no such loss"),
    (("--rwkv-gate-rank", "8"), ATTENTION, "no RWKV-7 layer"),
    (("--num-query-groups", "1"), RWKV, "no attention layer"),
    (("--rotary-base", "1e6"), (*ATTENTION, "--position-embedding-type", "none"), "rope"),
    (("--qk-clip",), RWKV, "no attention"),
    (("--attention-dropout", "0.1"), RWKV, "no attention"),
]


@pytest.mark.parametrize(("flag", "beside", "advice"), REFUSED)
def test_refused(flag: tuple[str, ...], beside: tuple[str, ...], advice: str) -> None:
    parse_config(list(beside))
    with pytest.raises(UserError) as caught:
        parse_config([*beside, *flag])
    assert str(caught.value).startswith(flag[0]) and advice in str(caught.value)


@pytest.mark.parametrize(("flag", "beside", "advice"), SAID)
def test_said(flag: tuple[str, ...], beside: tuple[str, ...], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    parse_config([*beside, *flag])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(flag[0])]
    assert len(lines) == 1 and advice in lines[0]


@pytest.mark.parametrize(
    "line",
    [
        ("--save", "r", "--save-interval", "4", "--keep-best", "1", "--keep-last", "5", *EVALUATED),
        ("--save", "r", "--keep-best", "1", *EVALUATED),
        ("--save", "r", "--keep-best", "1", *IN_EPOCHS),
        ("--save", "r", "--keep-best", "1", *IN_EPOCHS, "--save-interval-epochs", "0.3"),
        ("--early-stopping-patience", "2", *IN_EPOCHS),
        ("--lr-decay-style", "plateau", *IN_EPOCHS),
        ("--lr-warmup-iters", "500", "--train-epochs", "3", "--lr-warmup-init", "1e-6"),
        ("--lr-warmup-epochs", "0.1", "--lr-warmup-init", "1e-6"),
        ("--keep-best", "0", "--exit-interval", "0", "--eval-interval", "0"),
        ("--config", "cdrmix-core-1b", "--train-iters", "20"),  # a preset's warm-up is its own
        ("--config", "cdrmix-core-1b", "--ffn", "dense", "--moe-aux-loss-coeff", "0"),
        ("--lr-warmup-iters", "499", "--train-iters", "500"),
        ("--optimizer", "sgd", "--sgd-momentum", "0"),
        ("--optimizer", "muon", "--adam-beta1", "0.8", "--muon-momentum", "0"),
        ("--qat-latent-limit", "0"),
        ("--lr-warmup-iters", "900", "--train-iters", "500", "--lr-decay-style", "constant"),
        ("--lr-decay-iters", "90", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0.1"),
        ("--dry-run", "--dry-run-world-size", "8"),
        ("--load", "r", "--no-load-optim", "--no_load_rng", "--reset-data", "--override-opt_param-scheduler"),
        ("--load-optim", "--load-rng"),
        ("--hybrid-layer-pattern", "*-/*-", "--mtp-mode", "parallel", "--mtp-loss-scaling-factor", "1"),
    ],
)
def test_quiet_beside_its_partner(line: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    parse_config(list(line))
    assert capsys.readouterr().err == ""


def test_every_rule_has_a_line_above() -> None:
    tried = {re.sub("--no-(decoupled|exit|rl)", r"--\1", flag[0]) for flag, _, _ in REFUSED + SAID}
    for partner in PARTNERS:
        assert tried & {settings()[key].flag for key in partner.keys}, partner.text


def test_every_method_of_peft_has_a_line_above() -> None:
    tried = {flag[0] for flag, _, _ in REFUSED}
    by_readers: dict[str, set[str]] = {}  # flags that the same methods read are refused by the same words
    for name in PEFT_METHODS.names():
        for partner in method_partners(parse_config(["--peft", name]).config):
            assert all(key in settings() for key in partner.keys)
            by_readers.setdefault(partner.text, set()).update(settings()[key].flag for key in partner.keys)
    assert [text for text, flags in by_readers.items() if not tried & flags] == []


def test_a_method_of_peft_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ((lambda c: c.training.bf16, "it rounds: add --bf16"),)
    method = PeftMethod(print, ("lora_rank",), low_rank=True, needs=needs)
    monkeypatch.setitem(PEFT_METHODS._parts, "own", method)
    assert method.found() is print
    with pytest.raises(UserError, match=r"--lora-rank 4: .* add --peft lora, qlora, adalora or own$"):
        parse_config(["--lora-rank", "4"])
    with pytest.raises(UserError, match=r"^--peft own: it rounds: add --bf16$"):
        parse_config(["--peft", "own", "--lora-rank", "4"])
    model = parse_config(["--peft", "own", "--lora-rank", "4", "--bf16"]).config.model
    assert model.has_adapters and not model.replaces_weights
    with pytest.raises(UserError, match="--lora-alpha 4"):
        parse_config(["--peft", "own", "--lora-alpha", "4", "--bf16"])


def test_keys_are_those_of_settings() -> None:
    assert of_model("hadamard", "sub_norm") == ("model.hadamard", "model.sub_norm")
    assert all(key in settings() for partner in PARTNERS for key in partner.keys)
