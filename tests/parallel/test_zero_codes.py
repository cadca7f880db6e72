"""ZeRO with packed codes in place of quantized weights: the same run, bit for bit, for fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.errors import UserError
from megaforge.parallel import zero
from megaforge.parallel.flat_shard import optimizer_shard
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of, whole
from tests.quant.test_converter import codes_of
from tests.training.tiny import arguments, make_trainer, record, write_dataset

MODEL = ("--hybrid-layer-pattern", "*E", "--activation", "swiglu", "--train-iters", "3", "--lr", "1e-2")
BATCH = ("--micro-batch-size", "1", "--global-batch-size", "4", "--clip-grad", "0", "--zero-quantized-gather")
LAYOUTS = {
    "ternary": (
        *("--quantize-weights", "ternary", "--bf16", "--tp", "2", "--sp", "--zero", "2"),
        *("--ema-decay", "0.9", "--ema-evaluate", "--eval-iters", "1", "--eval-interval", "1"),
    ),
    "int4": (
        *("--quantize-weights", "int4", "--asymmetric-weights", "--optimizer", "qat_adam", "--ep", "2", "--zero", "1"),
        *("--ddp-bucket-size", "4000", "--no-overlap-param-gather", "--fp64"),
    ),
}
BITS = {"ternary": 2, "int4": 4}


def train(argv: list[str]) -> dict[str, Any]:
    sent: list[tuple[torch.dtype, int]] = []
    gather = zero.all_gather_single

    def counted(output: torch.Tensor, own: torch.Tensor, **more: Any) -> Any:
        sent.append((output.dtype, output.nbytes))
        return gather(output, own, **more)

    zero.all_gather_single = counted
    try:
        trainer = trainer_of(argv)
        if "--load" not in argv:
            perturb(trainer.model, trainer.ctx, 0.05)
        recorder = record(trainer)
        trainer.train()
    finally:
        zero.all_gather_single = gather
    masters = trainer.optimizer.main.trained
    shards = trainer.optimizer.shards
    assert shards is not None
    return {
        "records": recorder.records,
        "masters": {m.spec.name: whole(optimizer_shard(m.parameter), m.master.detach(), trainer.ctx) for m in masters},
        "codes": codes_of(trainer),
        "sent": sent,
        "coded": [bucket.size for bucket in shards.buckets if bucket.coded],
        "missing": {m.spec.name for m in masters if bool(m.parameter.isnan().any())},
        "quantized": {m.spec.name for m in masters if m.spec.quantized},
    }


def both(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    return train([flag for flag in argv if flag != "--zero-quantized-gather"]), train(argv)


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_codes_travel_in_place_of_weights(ranks: RankPool, tmp_path: Path, recipe: str) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    for plain, coded in ranks.run(4, both, arguments(prefix, *MODEL, *BATCH, *LAYOUTS[recipe])):
        losses = [[one["loss"] for one in run["records"]] for run in (plain, coded)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-13) and len(losses[0]) >= 3
        for kind, tolerance in (("masters", 1e-12 if recipe == "int4" else 0.0), ("codes", 0.0)):
            assert coded[kind].keys() == plain[kind].keys()
            for name, one in coded[kind].items():  # buckets are others, and four ranks sum in another order
                torch.testing.assert_close(one, plain[kind][name], rtol=0, atol=tolerance)
        assert not plain["coded"] and not plain["missing"]
        assert coded["missing"] and coded["missing"] <= coded["quantized"]  # nobody reads those
        packed = [size for dtype, size in coded["sent"] if dtype == torch.uint8]
        times = len(packed) // len(coded["coded"])
        assert times >= 3 and sum(packed) == times * sum(coded["coded"]) * BITS[recipe] // 8
        assert sum(size for _, size in coded["sent"]) < sum(size for _, size in plain["sent"])


def test_a_run_goes_on_from_a_checkpoint_at_another_layout(ranks: RankPool, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    flags = arguments(
        prefix, *MODEL, *BATCH, "--quantize-weights", "ternary", "--fp64", "--save", str(tmp_path / "run")
    )
    [first, _] = ranks.run(2, train, [*flags, "--zero", "1", "--exit-interval", "2"])
    plain = [flag for flag in flags if flag != "--zero-quantized-gather"]
    rest = make_trainer([*plain, "--load", str(tmp_path / "run"), "--save", str(tmp_path / "other")])
    rest.train()
    [end, _] = ranks.run(2, train, [*flags, "--zero", "2", "--load", str(tmp_path / "run")])
    for main in rest.optimizer.main.trained:
        torch.testing.assert_close(end["masters"][main.spec.name], main.master.detach(), rtol=0, atol=1e-9)
    assert first["codes"].keys() == end["codes"].keys()


def test_what_needs_the_weights_themselves_is_refused(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    ternary = ("--zero-quantized-gather", "--quantize-weights", "ternary")
    for more, said in (
        (ternary, "add --zero 1"),
        (ternary[:1] + ("--zero", "1"), "--quantize-weights ternary"),
        ((*ternary, "--zero", "1", "--quant-noise", "0.1"), "--quant-noise at 0 and"),
        ((*ternary, "--zero", "1", "--quant-granularity", "channel"), "--quant-granularity at tensor"),
        ((*ternary, "--zero", "1", "--log-quantization"), "leave out --quant-lambda"),
    ):
        with pytest.raises(UserError, match=f"--zero-quantized-gather.*{said}"):
            make_trainer(arguments(prefix, *MODEL, *more))
