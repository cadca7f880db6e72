"""Megatron-LM's flags of checkpoints, logs and checks, and of other programs, that are none of ours."""

from __future__ import annotations

from megaforge.config.megatron.rows import (
    ANY,
    LEAVE_OUT,
    NOT_AVAILABLE,
    Outcome,
    Row,
    advice,
    alias,
    becomes,
    noop,
    only,
)

_TIMERS = "step_seconds, tokens_per_second and peak_memory_bytes are in --metrics-file and the trackers; leave it out"
_PROFILE = "write --profile, whose trace has operators and memory; leave it out"

RUN_ROWS: tuple[Row, ...] = (
    # Checkpoints.
    *noop(
        0,
        "use-persistent-ckpt-worker auto-detect-ckpt-format ckpt-fully-parallel-save ckpt-fully-parallel-load "
        "no-ckpt-fully-parallel-save no-ckpt-fully-parallel-load ckpt-assume-constant-structure use-dist-ckpt "
        "verify-integrity no-use-tokenizer-model-from-checkpoint-args",
    ),
    *noop(1, "ckpt-format"),
    *noop(ANY, "dist-ckpt-* no-dist-ckpt-*"),
    *noop(0, "exit-signal-handler exit-signal-handler-for-dataloader"),
    only(
        "exit-signal", "sigterm sigint sigusr1", "SIGTERM, SIGINT and SIGUSR1 end a run that saves first; leave it out"
    ),
    *advice(0, "checkpoints are whole; --no-load-optim leaves it out when they are read", "no-save-optim no-save-rng"),
    *advice(
        ANY,
        NOT_AVAILABLE,
        "non-persistent-* replication* override-ckpt-iteration ckpt-convert-* use-mp-args-* check-for-* "
        "check-weight-hash-*",
    ),
    # Logs and profiles.
    *alias(1, {"wandb-exp-name": "--run-name {}"}),
    *noop(0, "log-throughput log-validation-ppl-to-tensorboard use-pytorch-profiler"),
    *noop(1, "tensorboard-queue-size"),
    only("tensorboard-log-interval", "1", "every step is written to --tensorboard-dir; leave it out"),
    only("timing-log-level", "0", _TIMERS),
    *advice(1, _TIMERS, "timing-log-option log-memory-interval"),
    *advice(0, _TIMERS, "log-timers-to-tensorboard log-memory-to-tensorboard log-device-memory-used"),
    *advice(ANY, _PROFILE, "pytorch-profiler-* record-memory-history memory-snapshot-path nvtx-ranges"),
    *advice(0, "write --metrics-file FILE", "log-progress"),
    *advice(ANY, LEAVE_OUT, "log-energy log-world-size-*"),
    *advice(0, "write --dry-run", "fake-process-group"),
    *advice(1, "write --config FILE.yaml", "yaml-cfg"),
    *advice(1, "write --print-config", "config-logger-dir"),
    # Checks.
    *noop(0, "no-check-for-nan-in-loss-and-grad"),
    only(
        "rerun-mode",
        "disabled",
        "write --repeat-suspect-steps for validate_results; a gradient that is not finite ends the run, "
        "or see --skip-nonfinite-steps. Write disabled, or leave it out",
    ),
    *advice(
        ANY,
        "is a vendor's service; leave it out",
        "one-logger* no-one-logger enable-one-logger app-tag-* otel-* straggler* log-straggler disable-straggler-* "
        "ft-* enable-ft-* calc-ft-* inprocess-* enable-msc disable-msc adlr-* fault-injector* kitchen* use-kitchen* "
        "gpu-sniff-*",
    ),
    *advice(
        ANY,
        "is not of pretraining a decoder; leave it out",
        "grpo-* rl-* perform-rl-* no-rl-* langrl-* inference-* max-tokens-to-oom decode-only-cuda-graphs "
        "enable-chunked-prefill moe-pad-experts-* logits-* sft* mask-prob bert-* ict-* img-* patch-dim export-*",
    ),
)

_LEVELS = {"10": "debug", "20": "info", "30": "warning", "40": "error"}
RUN_VALUES: dict[str, dict[str, Outcome]] = {
    "logging-level": {number: becomes(f"--logging-level {name}") for number, name in _LEVELS.items()},
}
