"""The reported numbers against their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megaforge.monitor.names import STEP, known
from megaforge.monitor.sinks import read_metrics
from megaforge.training.metrics import EvaluationMetrics, StepMetrics
from tests.training.tiny import arguments, make_trainer, write_dataset


def test_evaluation_numbers() -> None:
    metrics = EvaluationMetrics(5, nats=20 * math.log(8), tokens=20, correct=5, text_bytes=60)
    assert metrics.loss == pytest.approx(math.log(8))
    assert metrics.perplexity == pytest.approx(8)
    assert metrics.bits_per_byte == pytest.approx(1.0), "three bits a token, three bytes a token"
    assert metrics.accuracy == 0.25
    assert set(metrics.values()) == {"loss", "perplexity", "bits_per_byte", "accuracy", "tokens"}


def test_unknown_numbers_are_left_out() -> None:
    assert set(EvaluationMetrics(1, 1.0, 1).values()) == {"loss", "perplexity", "tokens"}
    assert EvaluationMetrics(1, 1e6, 1).perplexity == math.inf


@pytest.mark.parametrize("precision", [(), ("--fp16",)])
def test_every_number_that_a_run_writes_has_a_name_in_the_table(tmp_path: Path, precision: tuple[str, ...]) -> None:
    prefix = write_dataset(tmp_path / "d_text_document", documents=20)
    path = tmp_path / "metrics.jsonl"
    flags = ("--eval-iters", "1", "--train-iters", "2", "--log-interval", "2", "--metrics-file", str(path))
    flags += ("--rampup-batch-size", "4", "4", "80", "--clip-grad-value", "0.1", "--second-stage-at", "0.5")
    flags += ("--grokfast", "ema", "--plateau-boost", "--plateau-boost-interval", "1")
    flags += ("--lr-on-spike", "0.5", "--decoupled-lr", "1e-3", "--log-params-norm", "--log-num-zeros-in-grad")
    flags += ("--qk-clip", "--quantize-weights", "ternary", "--log-quantization")
    flags += ("--quant-lambda", "linear", "--quant-lambda-end-iters", "2")
    flags += ("--evaluation-metrics", "label_probability")
    flags += ("--label-smoothing", "0.1", "--contrastive-weight", "0.1", "--l1-coeff", "1e-4", "--l2-coeff", "1e-4")
    flags += ("--mtp-num-layers", "1", "--mod-capacity-factor", "0.5")
    flags += ("--moe-expert-capacity-factor", "0.5", "--moe-per-layer-logging")
    make_trainer(arguments(prefix, *flags, *precision)).train()
    records = read_metrics(path)
    for record in records:
        assert not [name for name in record.keys() - {"kind", "iteration"} if not known(record["kind"], name)]
    first, last = records[0].keys(), records[1].keys()
    of_interval = {
        "peak_memory_bytes",
        "page_faults",
        "memory_share",
        "host_memory_share",
        "disk_share",
        "plateau_improvement",
        "quant_error",
        "quant_saturation",
        "quant_step",
    }
    assert last - first == of_interval, "numbers of an interval alone"
    fp16 = {"loss_scale", "skipped"} if precision else set()
    of_others = ("`--objective ", "`--agent-memory run", "stage B, ", "`--rl-ce-weight", "`--plastic-correlation")
    assert {name.partition("/")[0] for name in last} - {"kind", "iteration"} == {
        name.partition("/")[0] for name in STEP
    } - ({"loss_scale", "skipped"} - fp16) - {
        "reserved_memory_bytes",  # of GPUs
        "slowest_rank",  # of several ranks
        "wait_share",
        "quant_flips",  # from the second interval on
        "weight_decay",  # excludes a second stage
        *("quant_clip_weights", "quant_clip_activations"),  # exclude --quant-lambda
        *("distill", "relations", "policy_lr_factor"),  # of other objectives
        *(name for name, one in STEP.items() if one.when.startswith(of_others)),
        "goodput",  # of runs that save
        *("trained_share", "orthogonality_penalty", "adapter_ranks"),  # of --peft
    }
    layers = {name.partition("/")[2] for name in last if name.startswith("expert_overflow/")}
    assert layers == {"0.ffn", "1.ffn", "mtp.0.ffn"}
    for name in ("load_balance_loss", "z_loss", "expert_entropy_bits"):
        own = [value for key, value in records[1].items() if key.startswith(f"{name}/")]
        assert len(own) == 3 and records[1][name] == pytest.approx(math.fsum(own) / 3), "means over the layers"
    assert 0.4 < records[1]["expert_overflow"] < 1, "an expert takes half of its even share"
    kinds = {name.removeprefix("grad_norm/") for name in last if name.startswith("grad_norm/")}
    assert kinds == {"embedding", "attention", "rwkv", "moe", "router", "norm", "mtp"}
    squares = math.fsum(value**2 for name, value in records[1].items() if name.startswith("grad_norm/"))
    assert records[1]["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-12)


def test_step_record_has_the_promised_keys() -> None:
    step = StepMetrics(3, 2.0, 1.0, 1e-3, 300, 3, 100, extra={"z_loss": 0.5}).after(0.5)
    assert step.values() == {
        "loss": 2.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 300,
        "consumed_samples": 3,
        "step_seconds": 0.5,
        "tokens_per_second": 200.0,
        "z_loss": 0.5,
    }
