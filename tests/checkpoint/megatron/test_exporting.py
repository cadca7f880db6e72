"""Our models in Megatron-LM's form: megatron-core computes from them what we do, and they come back bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.megatron.exporting import export_megatron
from megaforge.checkpoint.megatron.importing import import_megatron
from megaforge.checkpoint.megatron.pickles import read_torch
from megaforge.checkpoint.published_import import Import
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from tests.checkpoint.megatron import models
from tests.parallel.pool import RankPool
from tests.training.tiny import arguments, dense_arguments, make_trainer, write_dataset
from tools import convert_checkpoint

RUNS = {
    "llama": ("*-*-", "--activation", "swiglu", "--num-query-groups", "2", "--untie-embeddings-and-output-weights"),
    "squared-relu": ("*-*-", "--activation", "relu2", "--rotary-base", "500", "--kv-channels", "16"),
    "mixtral": (
        *("*E*E", "--activation", "swiglu", "--untie-embeddings-and-output-weights"),
        *("--moe-shared-expert-intermediate-size", "16"),
    ),
    "gpt": (
        *("*-*-", "--activation", "gelu", "--normalization", "layernorm", "--add-bias-linear"),
        *("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "24"),
    ),
    "qwen": (
        *("*-*-", "--activation", "gelu_exact", "--qk-layernorm", "--add-qkv-bias", "--use-rope-scaling"),
        *("--rotary-percent", "0.5", "--rotary-interleaved"),
    ),
    "some-experts": (
        *("*-*E", "--activation", "swiglu", "--moe-router-score-function", "sigmoid"),
        *("--moe-router-enable-expert-bias", "--moe-router-topk-scaling-factor", "2.5"),
        *("--moe-ffn-hidden-size", "24"),
    ),
}


def train(folder: Path, pattern: str, *flags: str) -> Path:
    prefix = write_dataset(folder / "train_text_document")
    given = arguments(prefix, "--hybrid-layer-pattern", pattern) if "E" in pattern else dense_arguments(prefix, pattern)
    make_trainer([*given, "--train-iters", "1", "--save", str(folder / "run"), *flags]).train()
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: train(tmp_path_factory.mktemp(name), *flags) for name, flags in RUNS.items()}


@torch.no_grad()
def test_logits_are_those_of_megatron_core(runs: dict[str, Path], ranks: RankPool, tmp_path: Path) -> None:
    models.available()
    for name, run in runs.items():
        export_megatron(open_source(run), tmp_path / name)
    theirs = ranks.run(1, models.all_logits, {name: str(tmp_path / name) for name in runs})[0]
    for name, run in runs.items():
        ours = load_trained_model(str(run), device="cpu").model._chunk.logits(models.TOKENS)
        torch.testing.assert_close(theirs[name][..., : ours.shape[-1]], ours, rtol=0, atol=1e-5, msg=name)
        assert float(ours.std()) > 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_they_come_back_bit_for_bit(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    export_megatron(open_source(runs[name]), tmp_path / "theirs")
    import_megatron(Import(tmp_path / "theirs", tmp_path / "ours"))
    before, after = open_source(runs[name]), open_source(tmp_path / "ours")
    for key in after.tensors:
        assert torch.equal(before.read(key), after.read(key)), key
    cfg, again = before.meta["config"]["model"], after.meta["config"]["model"]
    for key in ("activation", "num_experts", "moe_router_score_function", "rotary_base", "kv_channels"):
        assert cfg[key] == again[key] or cfg[key] is None, key


def test_by_the_command(runs: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", "--load", str(runs["llama"]), *more])
        assert convert_checkpoint.main() == 0
        return capsys.readouterr().out

    folder = tmp_path / "theirs"
    assert "state stays behind" in run("--save", str(folder), "--to", "megatron", "--dtype", "bfloat16")
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1"
    common = read_torch(folder / "iter_0000001" / "common.pt")
    assert common["args"].get("padded_vocab_size") == 128 and common["args"].get("params_dtype") == torch.bfloat16
    with pytest.raises(UserError, match="not an empty directory"):
        run("--save", str(folder), "--to", "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


REFUSED = {
    "RWKV-7 layers": ("R-",),
    "blocks without an FFN": ("*",),
    "--activation gated_relu2": ("*-", "--activation", "gated_relu2"),
    "weights that are quantized": ("*-", "--quantize-weights", "ternary"),
}


@pytest.mark.parametrize("part", REFUSED)
def test_other_models_are_refused(part: str, tmp_path: Path) -> None:
    run = train(tmp_path, *REFUSED[part])
    with pytest.raises(UserError, match=f"the model has .*{part}"):
        export_megatron(open_source(run), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
