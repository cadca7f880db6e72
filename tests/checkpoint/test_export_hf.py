"""Checkpoints in Hugging Face's form: transformers computes from them what we do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.export_hf import export_hf
from megaforge.checkpoint.packed_file import open_quantized
from megaforge.checkpoint.safetensors_file import SafetensorsFile
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from megaforge.quant.formats.hf_bitnet import unpack_rows
from tests.training.tiny import dense_arguments, make_trainer, write_dataset
from tools import convert_checkpoint

TERNARY = ("--quantize-weights", "ternary")
MODELS = {
    "bitnet": (*TERNARY, "--sub-norm", "--activation", "swiglu", "--num-query-groups", "2"),
    "bitnet-relu2": (*TERNARY, "--sub-norm", "--activation", "gated_relu2", "--untie-embeddings-and-output-weights"),
    "llama": ("--quantize-weights", "binary", "--activation", "swiglu", "--add-bias-linear", "--kv-channels", "16"),
    "arcee": (*TERNARY, "--bitnet-layers", "ffn", "--untie-embeddings-and-output-weights", "--rotary-base", "500"),
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 61


def train(folder: Path, *flags: str, pattern: str = "*-*-") -> Path:
    prefix = write_dataset(folder / "train_text_document")
    save = folder / "run"
    make_trainer(dense_arguments(prefix, pattern, "--train-iters", "2", "--save", str(save), *flags)).train()
    return save


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: train(tmp_path_factory.mktemp(name), *flags) for name, flags in MODELS.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_codes_and_scales_are_those_of_training(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    export_hf(open_source(runs[kind]), tmp_path / "hf")
    model, file = open_quantized(open_source(runs[kind])), SafetensorsFile(tmp_path / "hf" / "model.safetensors")
    up = model.coded("layers.1.ffn.up.weight")
    for number, role in enumerate(("up",) if kind == "arcee" else ("gate", "up")):
        their = f"model.layers.1.mlp.{role}_proj"
        assert torch.equal(unpack_rows(file.tensor(f"{their}.weight")), up.codes[48 * number : 48 * (number + 1)])
        assert torch.equal(file.tensor(f"{their}.weight_scale"), up.step[number : number + 1].reciprocal())
    assert file.tensor("model.embed_tokens.weight").shape == (62, 32)  # the vocabulary without its padding


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_same(
    runs: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # its BitLinear would be compiled
    transformers = pytest.importorskip("transformers", reason="needs the extra 'test'")
    pytest.importorskip("accelerate", reason="needs the extra 'test'")
    export_hf(open_source(runs[kind]), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert (
        type(theirs).__name__
        == {"bitnet": "BitNet", "llama": "Llama", "arcee": "Arcee"}[kind[:6].rstrip("-")] + "ForCausalLM"
    )
    packed = [name for name, module in theirs.named_modules() if type(module).__name__ == "BitLinear"]
    assert len(packed) == (4 if kind == "arcee" else 14)
    ours = load_trained_model(str(runs[kind]), device="cpu").model._chunk.logits(TOKENS)
    torch.testing.assert_close(theirs(TOKENS).logits, ours[..., :62], rtol=0, atol=1e-5)
    assert float(ours.std()) > 1e-3


def test_by_the_command(runs: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", "--load", str(runs["arcee"]), *more])
        assert convert_checkpoint.main() == 0
        return capsys.readouterr().out

    assert "bytes of weights" in run("--save", str(tmp_path / "hf"), "--to", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "arcee" and config["rope_parameters"]["rope_theta"] == 500
    left = config["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in left and "model.layers.1.self_attn.o_proj" in left and not any("mlp" in name for name in left)
    with pytest.raises(UserError, match="not an empty directory"):
        run("--save", str(tmp_path / "hf"), "--to", "hf")
    for more, message in (
        (("--save", "x.safetensors", "--to", "hf"), "writes a directory"),
        (("--save", "x", "--to", "packed"), "give it a name in .safetensors"),
        (("--save", "x", "--to", "hf", "--tp", "2"), "--to hf: it takes no --optimizer and no layout"),
        (("--save", "x", "--gguf-type", "TQ2_0"), "it is for --to gguf"),
    ):
        with pytest.raises(UserError, match=message):
            run(*more)


REFUSED = {
    "RWKV-7 layers with a dense FFN, attention layers with a dense FFN": ((), "R-*-"),
    "--ffn dense": ((*TERNARY,), "*"),
    "--normalization rmsnorm": (("--normalization", "layernorm"), "*-"),
    "--position-embedding-type rope": (("--rotary-percent", "0.5"), "*-"),
    "--hadamard 8": ((*TERNARY, "--hadamard", "8"), "*-"),
    "int4 weights": (("--quantize-weights", "int4"), "*-"),
    "has --sub-norm, which arcee": ((*TERNARY, "--sub-norm"), "*-"),
    "--activation gelu": (("--activation", "gelu"), "*-"),
    "--quant-granularity channel": ((*TERNARY, "--quant-granularity", "channel"), "*-"),
    "--quantize-activations none": ((*TERNARY, "--quantize-activations", "none"), "*-"),
    "not a multiple of 4": ((*TERNARY, "--ffn-hidden-size", "46"), "*-"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_models_are_refused(message: str, tmp_path: Path) -> None:
    flags, pattern = REFUSED[message]
    save = train(tmp_path, "--train-iters", "1", *flags, pattern=pattern)
    with pytest.raises(UserError) as caught:
        export_hf(open_source(save), tmp_path / "hf")
    assert message in str(caught.value) and not (tmp_path / "hf").exists()
