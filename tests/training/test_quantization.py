"""Quantization that comes in by and by, in stages, and what a run tells of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.packed_file import write_packed
from megaforge.checkpoint.sources import open_source
from megaforge.config.qat_config import QATConfig, QuantStage
from megaforge.errors import UserError
from megaforge.monitor.names import known
from megaforge.parallel.layers import linears
from megaforge.quant.linear import QuantizedLinear
from megaforge.quant.statistics import quantized_layers
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.training.tiny import arguments, dense_arguments, make_trainer, record, weights, write_dataset

TERNARY = ("--quantize-weights", "ternary")
STAGES = ("--quant-stages", "0:none", "1:int8/int4,lr=0.5", "2:ternary/int8,wd=0")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.5), ("step", 0.5), ("exponential", (math.exp(5) - 1) / (math.exp(10) - 1)), ("sigmoid", 0.5)],
)
def test_lambda_goes_from_0_to_1(shape: str, middle: float) -> None:
    flags = QATConfig(quant_lambda=shape, quant_lambda_start_iters=10, quant_lambda_end_iters=110)
    shares = [flags.share_at(step) for step in range(1, 200)]
    assert shares[:10] == pytest.approx([0.0] * 10, abs=1e-12) and shares[109:] == [1.0] * 90
    assert shares[59] == pytest.approx(middle)
    assert all(one <= next_one for one, next_one in zip(shares, shares[1:], strict=False))
    if shape == "step":
        assert {*shares} == {0, 0.25, 0.5, 0.75, 1}
    if shape == "sigmoid":  # the logistic function, stretched
        low, high = (1 / (1 + math.exp(-10 * (p - 0.5))) for p in (0, 1))
        assert shares[29] == pytest.approx((1 / (1 + math.exp(-10 * (0.2 - 0.5))) - low) / (high - low))
    assert QATConfig().share_at(1) == 1
    steep = QATConfig(quant_lambda=shape, quant_lambda_end_iters=4, quant_lambda_sharpness=500)
    assert all(0 <= steep.share_at(step) <= 1 for step in range(1, 6))


def run(argv: list[str]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    trainer = make_trainer(argv)
    recorder = record(trainer)
    trainer.train()
    return [one for one in recorder.records if one["kind"] == "step"], weights(trainer)


def test_lambda_0_is_full_precision_and_1_is_the_quantized_model(prefix: str) -> None:
    flags = ("--train-iters", "3", "--sub-norm")
    ramp = ("--quant-lambda", "step", "--quant-lambda-steps", "1", "--quant-lambda-end-iters", "3")
    plain, abrupt, by_and_by = (
        run(dense_arguments(prefix, "R-*-", *flags, *more))[0] for more in ((), TERNARY, (*TERNARY, *ramp))
    )
    assert [one["quant_lambda"] for one in by_and_by] == [0, 0, 1]
    assert [one["loss"] for one in by_and_by[:2]] == [one["loss"] for one in plain[:2]]
    assert by_and_by[2]["loss"] != plain[2]["loss"] and abrupt[0]["loss"] != plain[0]["loss"]
    assert "quant_lambda" not in abrupt[0]


def test_stages_change_bits_and_factors_and_go_on(prefix: str, tmp_path: Path) -> None:
    flags = (*TERNARY, *STAGES, "--train-iters", "4", "--sub-norm", "--log-quantization")
    argv = dense_arguments(prefix, "R-*-", *flags)
    records, expected = run(argv)
    assert [one["quant_lambda"] for one in records] == [0, 1, 1, 1]
    assert [one["lr"] for one in records] == pytest.approx([1e-3, 5e-4, 1e-3, 1e-3])
    plain, ternary = run(dense_arguments(prefix, "R-*-", "--sub-norm"))[0], run(dense_arguments(prefix, "R-*-"))[0]
    assert records[0]["loss"] == plain[0]["loss"] != ternary[0]["loss"]
    assert records[1]["quant_error"] < 0.01 < 0.1 < records[2]["quant_error"]  # int8, then ternary
    save = ("--save", str(tmp_path / "run"))
    run([*argv, *save, "--exit-interval", "2"])
    trainer = make_trainer([*argv, "--load", str(tmp_path / "run")])
    trainer.train()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(trainer).items())
    ops = [layer.op for _, layer in linears(trainer.model) if isinstance(layer.op, QuantizedLinear)]
    assert {op.weights.kind for op in ops if op.weights is not None} == {"ternary"}
    assert trainer.optimizer.decay_factor == 0 and "quant_stage" not in trainer.lr_factors


def test_every_layout_tells_the_same(ranks: RankPool, prefix: str) -> None:
    """With experts, sequence parallelism, pipeline stages and ZeRO: statistics and losses, stage by stage."""
    ramp = ("--quant-lambda", "linear", "--quant-lambda-end-iters", "2", "--log-quantization", "--fp64")
    short = ("--hybrid-layer-pattern", "RE*-", "--train-iters", "3", "--micro-batch-size", "1")
    argv = arguments(prefix, *short, *TERNARY, *ramp, "--global-batch-size", "4")
    expected = train(argv)
    steps = [one for one in expected["records"] if one["kind"] == "step"]
    assert [one["quant_lambda"] for one in steps] == [0.5, 1, 1]
    assert "quant_flips" not in steps[0] and 0 < steps[1]["quant_flips"] < 0.2
    assert all(0.2 < one["quant_error"] < 0.9 and 0.1 < one["quant_saturation"] < 0.4 for one in steps)
    assert all(known("step", name) for name in steps[1] if name.startswith("quant"))
    compare(ranks.run(4, train, [*argv, "--tp", "2", "--sp", "--pp", "2"]), expected, 1e-9)
    compare(ranks.run(2, train, [*argv, "--ep", "2", "--zero", "1"]), expected, 1e-9)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            ("--quant-lambda", "linear", "--quant-lambda-end-iters", "8"),
            "lambda of --quant-lambda linear is 0.25, and 1",
        ),
        (("--quant-stages", "0:int8", "2:ternary"), "the last of --quant-stages begins after iteration 2"),
    ],
)
def test_nothing_is_exported_before_the_last_codes(
    prefix: str, tmp_path: Path, more: tuple[str, ...], why: str
) -> None:
    save = ("--save", str(tmp_path / "run"), "--save-interval", "2", "--train-iters", "2")
    run(dense_arguments(prefix, "R-", *TERNARY, *more, *save))
    with pytest.raises(UserError, match=f"after iteration 2 its quantization is not complete \\({why}"):
        write_packed(open_source(tmp_path / "run"), tmp_path / "x.safetensors")
    flags = make_trainer(dense_arguments(prefix, "R-", *TERNARY, *more)).config.qat
    assert flags.unfinished(0) is not None and flags.unfinished(8) is None
    assert QATConfig().unfinished(0) is None


def test_a_run_says_what_is_quantized(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(dense_arguments(prefix, "R-*-", *TERNARY, *STAGES))
    trainer.train()
    told = capsys.readouterr().err
    assert "ternary weights, int8 activations: 10 matrices with" in told and "(embedding, w1, w2," in told
    assert "quantization from iteration 2 on: int8 weights, activations int4, lr x 0.5" in told
    layers = quantized_layers(trainer.model)
    elements = sum(layer.weight.numel() for _, layer, _ in layers)
    packed = sum(layer.weight.shape[0] * -(-layer.weight.shape[1] // 4) + 4 for _, layer, _ in layers) + 2 * 4
    full = sum(p.numel() * (4 if p.spec.keep_fp32 else 2) for p in trainer.model.parameters())
    assert f"packed {(full - 2 * elements + packed) / 1e6:.2f} MB, in 16 bits {full / 1e6:.2f} MB" in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--quant-lambda", "linear"), "no matrix is quantized"),
        ((*TERNARY, "--quant-lambda", "linear"), "add --quant-lambda-end-iters N"),
        ((*TERNARY, "--quant-lambda-end-iters", "5"), "lambda is 1 from the beginning"),
        ((*TERNARY, "--quant-lambda-end-epochs", "5"), "lambda is 1 from the beginning"),
        (
            (*TERNARY, "--quant-lambda", "linear", "--quant-lambda-end-iters", "5", "--quant-lambda-start-iters", "5"),
            "--quant-lambda-end-iters 5: must be beyond",
        ),
        ((*TERNARY, "--quant-stages", "0:none", "5:int8"), "last stage is not the model"),
        ((*TERNARY, "--quant-stages", "0:none", "5:ternary,share=1"), "5:ternary,share=1: write ITERATIONS:WEIGHTS"),
        ((*TERNARY, "--quant-stages", "1:ternary"), "the first begins at 0"),
        (
            (*TERNARY, "--quant-stages", "0:ternary", "--second-stage-at", "0.5"),
            "leave out --quant-lambda and --second",
        ),
    ],
)
def test_what_does_not_fit_is_refused(prefix: str, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(arguments(prefix, *more))


def test_lambda_counts_in_epochs(prefix: str) -> None:
    argv = arguments(prefix, *TERNARY, "--quant-lambda", "linear", "--quant-lambda-end-epochs", "2")
    flags = make_trainer(argv).config.qat
    assert flags.quant_lambda_end_iters is not None and flags.quant_lambda_end_iters > 10


def test_stages_are_read() -> None:
    read = QATConfig(quant_stages=("0:none", "9:binary/none,lambda=0.5,lr=2,wd=0")).stages
    assert read == (QuantStage(0, "none", "none"), QuantStage(9, "binary", "none", 0.5, 2.0, 0.0))
