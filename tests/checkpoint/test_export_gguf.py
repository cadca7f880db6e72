"""GGUF files: the ``gguf`` package reads our weights from them, and transformers our model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaforge.checkpoint.export_gguf import export_gguf
from megaforge.checkpoint.packed_file import open_quantized
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from megaforge.quant.formats.ggml_blocks import BLOCK_TYPES
from megaforge.quant.quantizers import weight_values
from megaforge.quant.whole_matrix import scale_of
from tests.checkpoint.test_export_hf import TERNARY, TOKENS, train
from tools import convert_checkpoint

WIDE = ("--hidden-size", "256", "--ffn-hidden-size", "256", "--quant-scale-dtype", "fp16")
MODELS = {
    "bitnet": (*TERNARY, "--sub-norm", "--activation", "swiglu", "--num-query-groups", "2"),
    "llama": (*TERNARY, "--activation", "swiglu", "--quantize-activations", "none", "--num-query-groups", "2"),
    "arcee": (
        "--quantize-weights",
        "binary",
        "--quant-granularity",
        "channel",
        "--untie-embeddings-and-output-weights",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: train(tmp_path_factory.mktemp(name), "--train-iters", "1", *flags, *WIDE, pattern="*-")
        for name, flags in MODELS.items()
    }


def values(run: Path, name: str) -> torch.Tensor:
    """What training saw of a quantized parameter."""
    model = open_quantized(open_source(run))
    matrix, scheme = model.coded(name), model.schemes[name]
    return weight_values(matrix.codes, scale_of(matrix, model.specs[name].parts, scheme), scheme)


def read(file: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs gguf, of the extra 'test'")
    import gguf

    return gguf, gguf.GGUFReader(file)


@pytest.mark.parametrize(("kind", "blocks"), [("bitnet", "TQ1_0"), ("llama", "TQ2_0"), ("arcee", "Q1_0")])
def test_gguf_reads_our_weights(runs: dict[str, Path], kind: str, blocks: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    size, has_tokenizer = export_gguf(open_source(runs[kind]), file, None if kind != "bitnet" else blocks)
    assert size == file.stat().st_size and not has_tokenizer
    gguf, reader = read(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == kind and fields[f"{kind}.block_count"] == 1
    assert fields["general.file_type"] == BLOCK_TYPES[blocks].file_type
    known = gguf.MODEL_TENSORS[{name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[kind]]
    names = {gguf.TENSOR_NAMES[one].format(bid=0) + ".weight" for one in known}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() <= names
    assert ("output.weight" in tensors) == (kind == "arcee")
    up = tensors["blk.0.ffn_up.weight"]
    assert up.tensor_type.name == blocks and tuple(up.shape) == (256, 256)
    expected = values(runs[kind], "layers.0.ffn.up.weight")[-256:]
    if blocks == "Q1_0":  # the package does not read it
        codes, step = BLOCK_TYPES[blocks].decode(torch.from_numpy(np.array(up.data)).view(256, -1))
        assert torch.equal(codes.unflatten(1, (2, 128)) * step.unsqueeze(-1), expected.unflatten(1, (2, 128)))
    else:
        assert np.array_equal(gguf.quants.dequantize(up.data, up.tensor_type), expected.numpy())


@torch.no_grad()
def test_transformers_computes_the_same_from_the_file(runs: dict[str, Path], tmp_path: Path) -> None:
    """It dequantizes the blocks, and multiplies activations as they are."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'test'")
    export_gguf(open_source(runs["llama"]), tmp_path / "m.gguf")
    read(tmp_path / "m.gguf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ours = load_trained_model(str(runs["llama"]), device="cpu").model._chunk.logits(TOKENS)
    torch.testing.assert_close(theirs(TOKENS).logits, ours[..., :62], rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="Q1_0: it has one bit"):
        export_gguf(open_source(runs["llama"]), file, "Q1_0")
    narrow = train(tmp_path, "--train-iters", "1", *TERNARY, "--ffn-hidden-size", "64", "--hidden-size", "64")
    with pytest.raises(UserError, match="blocks of 256 .* use --gguf-type Q2_0"):
        export_gguf(open_source(narrow), file)
    assert export_gguf(open_source(narrow), file, "Q2_0")[0] > 0
    with pytest.raises(UserError, match="it exists"):
        export_gguf(open_source(narrow), file, "Q2_0")
    again = str(tmp_path / "again.gguf")
    argv = ["convert", "--load", str(narrow), "--save", again, "--to", "gguf", "--gguf-type", "Q2_0"]
    monkeypatch.setattr(sys, "argv", argv)
    assert convert_checkpoint.main() == 0 and file.read_bytes() == Path(again).read_bytes()
    said = capsys.readouterr().out
    assert "without a tokenizer" in said and "rounded to fp16" in said
