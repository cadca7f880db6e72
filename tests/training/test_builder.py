"""Runs from Python: the same as by the command line, with callbacks and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.config.fine_tuning import DEFAULTS
from megaforge.errors import UserError
from megaforge.training.builder import PEFTConfig, TrainerBuilder, fine_tune
from megaforge.training.callbacks import Callback
from megaforge.training.metrics import EvaluationMetrics
from megaforge.training.sampling import SampleGenerator
from megaforge.training.trainer import Trainer
from tests.training.tiny import arguments, dense_arguments, make_trainer, write_dataset

LORA = PEFTConfig(rank=4, alpha=8, dropout=0.0, target_modules=("attention",), rank_pattern={"v_proj": 2})
SMALL: dict[str, Any] = {
    "device": "cpu",
    "seq_length": 24,
    "split": "80,20,0",
    "num_workers": 0,
    "train_iters": 2,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "log_interval": 1,
    "alerts_off": ("throughput", "memory", "disk"),
    "eval_iters": 1,
    "eval_interval": 1,
    "lr_decay_style": "constant",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


@pytest.fixture(scope="module")
def base(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("runs") / "base")
    make_trainer([*dense_arguments(data, "*-*-"), "--train-iters", "1", "--save", directory]).train()
    return directory


class Seen(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        self.losses.append(metrics.values()["loss"])


def test_it_is_the_run_of_the_same_flags(base: str, data: str, tmp_path: Path) -> None:
    seen = Seen()
    output = tmp_path / "tuned"
    trainer = fine_tune(base, data, LORA, output=output, callbacks=[seen], lr=1e-2, **SMALL)
    assert trainer.complete and len(seen.losses) == 2 and seen.losses[1] < seen.losses[0]
    line = ["--pretrained-checkpoint", base, "--data-path", data, *LORA_LINE, "--lr", "1e-2"]
    for name, value in SMALL.items():
        line += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else (str(value),))]
    assert parse_config(line, defaults=DEFAULTS).config.model == trainer.config.model
    assert trainer.config.training.early_stopping_patience == 5
    # Started again it goes on.
    more = {**SMALL, "train_iters": 3}
    assert fine_tune(base, data, LORA, output=output, lr=1e-2, **more).iteration == 3


LORA_LINE = (
    *("--peft", "lora", "--lora-rank", "4", "--lora-alpha", "8", "--lora-dropout", "0", "--peft-targets", "attention"),
    *("--lora-rank-pattern", "v_proj=2"),
)


def test_everything_that_a_builder_says_is_a_flag(data: str) -> None:
    builder = Trainer.builder().config(data_path=(data,), hybrid_layer_pattern="*-", **SMALL).rank(0)
    builder.strategy(tp=2, zero=1).precision("bf16").quantizer("ternary").device("cpu")
    config = parse_config([*arguments(data)[:10], *builder.config(seed=7).arguments()]).config
    assert config.parallel.tensor_model_parallel_size == 2 and config.parallel.zero_stage == 1
    assert config.training.bf16 and config.model.quantize_weights == "ternary" and config.training.seed == 7
    flags = PEFTConfig("qlora", gradient_checkpointing=True, more={"qlora_quant_type": "int4"}).flags()
    assert flags == {"peft": "qlora", "recompute": "full", "qlora_quant_type": "int4"}


def test_a_preset_from_nothing_with_accumulation_and_samples(data: str) -> None:
    shown: list[tuple[int, str, str]] = []
    small = {**SMALL, "train_iters": 1, "global_batch_size": None, "tokenizer_type": "NullTokenizer"}
    small |= {"tokenizer_model": "61", "eval_interval": 1}
    builder = Trainer.builder().model("cdrmix-test").data(data).config(**small).accumulation(3)
    trainer = builder.generator(["1 2 3"], tokens=4, show=lambda *told: shown.append(told)).build()
    assert trainer.batches.size == 2 * 3
    trainer.train()
    [(iteration, prompt, text)] = shown
    assert (iteration, prompt) == (1, "1 2 3") and 1 <= len(text.split()) <= 4
    [sampler] = [one for one in trainer.callbacks if isinstance(one, SampleGenerator)]
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        best = int(trainer.model.eval().logits(tokens, last_only=True)[0, -1][:62].argmax())
    assert sampler.texts["1 2 3"].split()[0] == str(best)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda builder: builder.config(learning_rate=1).arguments(), r"config\(learning_rate=1\): there is no flag"),
        (lambda builder: builder.precision("fp8"), r"precision\('fp8'\): use one of fp32, bf16"),
        (lambda builder: builder.rank(3), r"rank\(3\): this process was started as rank 0"),
        (lambda builder: builder.config(data_path="d", lr="x").build(), "--lr x"),
    ],
)
def test_bad_input_is_named(wrong: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        wrong(TrainerBuilder())
