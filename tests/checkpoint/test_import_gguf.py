"""GGUF files as checkpoints: our own come back with the same codes, and what the ``gguf`` package writes is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaforge.checkpoint.export_gguf import export_gguf
from megaforge.checkpoint.gguf_file import GGUFFile
from megaforge.checkpoint.import_gguf import Matrix, import_gguf
from megaforge.checkpoint.packed_file import open_quantized
from megaforge.checkpoint.published_import import Import
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from megaforge.quant.quantizers import WeightScheme, weight_codes, weight_scale, weight_statistics
from tests.checkpoint.test_export_gguf import TOKENS, runs  # noqa: F401 - a fixture


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    return load_trained_model(str(path), device="cpu").model._chunk.logits(TOKENS)


@pytest.mark.parametrize("kind", ["bitnet", "llama", "arcee"])
def test_our_own_files_come_back(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:  # noqa: F811
    export_gguf(open_source(runs[kind]), tmp_path / "m.gguf")
    import_gguf(Import(tmp_path / "m.gguf", tmp_path / "run"))
    before, after = (open_quantized(open_source(path)) for path in (runs[kind], tmp_path / "run"))
    assert after.schemes.keys() == before.schemes.keys()
    for name in before.schemes:
        ours, theirs = after.coded(name), before.coded(name)
        assert torch.equal(ours.codes, theirs.codes), name
        assert torch.equal(ours.step.expand_as(theirs.step), theirs.step), name
    if kind != "llama":  # that one was trained with activations as they are, which a file does not say
        assert torch.equal(logits(tmp_path / "run"), logits(runs[kind])[..., : logits(tmp_path / "run").shape[-1]])


def write(file: Path, **changed: Any) -> None:
    """A Llama of one block, by the package."""
    gguf = pytest.importorskip("gguf", reason="needs the extra 'test'")
    numbers = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1), writer.add_embedding_length(256), writer.add_feed_forward_length(512)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(64), writer.add_rope_freq_base(10000.0), writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2"), writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_token_merges(["t 0"]), writer.add_token_types([1] * 32)
    writer.add_bos_token_id(0), writer.add_eos_token_id(0)
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256)}
    shapes |= {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
    for name, shape in shapes.items():
        value = (numbers.standard_normal(shape) * 0.05).astype(np.float32)
        kind = changed.get(name, changed.get("kind", "F32"))
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(value, number), raw_dtype=number)
    ones = np.ones(256, np.float32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", ones)
    for name in ("token_embd", *changed.get("heads", ("output",))):
        writer.add_tensor(f"{name}.weight", (numbers.standard_normal((32, 256)) * 0.05).astype(np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F16", "TQ2_0"])
def test_files_of_the_package_are_read(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "m.gguf", kind=kind)
    import_gguf(Import(tmp_path / "m.gguf", tmp_path / "run"))
    if kind == "F16":
        transformers = pytest.importorskip("transformers", reason="needs the extra 'test'")
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
        tokens = TOKENS % 32
        found = load_trained_model(str(tmp_path / "run"), device="cpu").model._chunk.logits(tokens)
        torch.testing.assert_close(found[..., :32], theirs(tokens).logits, rtol=0, atol=1e-5)
        return
    model = open_quantized(open_source(tmp_path / "run"))
    assert model.config.model.quant_granularity == "group" and model.config.model.quant_group_size == 256
    import gguf

    slot = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.0.ffn_down.weight"]
    matrix = model.coded("layers.0.ffn.down.weight")
    expected = gguf.quants.dequantize(slot.data, slot.tensor_type)
    found = matrix.codes.unflatten(1, (2, 256)) * matrix.step.unsqueeze(-1)
    assert np.array_equal(found.flatten(1).numpy(), expected)


def test_weights_have_the_codes_and_steps_of_the_file() -> None:
    codes = torch.randint(-1, 2, (6, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[2] = 0
    for granularity, steps in (
        ("tensor", torch.full((6, 2), 0.25)),
        ("channel", torch.arange(1.0, 7.0).view(6, 1).expand(6, 2) / 8),
        ("group", torch.arange(1.0, 13.0).view(6, 2) / 8),
    ):
        matrix = Matrix(codes, steps)
        assert matrix.granularity == granularity
        scheme = WeightScheme("ternary", granularity, 32, scale_dtype=torch.float16)
        w = matrix.weights(granularity, binary=False)
        scale = weight_scale(weight_statistics(w, scheme), scheme, w.dtype)
        assert torch.equal(weight_codes(w, scale, scheme), codes)
        kept = scale.step[codes.view(6, 2, 32).any(-1, keepdim=True)] if granularity == "group" else scale.step[:2]
        assert set(kept.flatten().tolist()) <= set(steps.flatten().tolist())


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", heads=())
    raw = (tmp_path / "m.gguf").read_bytes()
    assert GGUFFile(tmp_path / "m.gguf").fields["general.architecture"] == "llama"

    def refused(content: bytes, said: str) -> None:
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(UserError, match=said):
            import_gguf(Import(tmp_path / "bad.gguf", tmp_path / "run"))

    refused(b"GGML" + raw[4:], "no GGUF file")
    refused(raw[:10], "no GGUF file")
    refused(raw[:100], "no GGUF file")
    refused(raw[:-4096], "ends within")
    refused(raw.replace(b"ffn_up", b"ffn_pu"), "blk.0.ffn_up.weight is missing")
    refused(raw.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma"), "gemma is not one of")
    write(tmp_path / "q.gguf", ffn_up="Q4_0")
    refused((tmp_path / "q.gguf").read_bytes(), "ggml's type 2; read are F32")
    with pytest.raises(UserError, match="cannot be read"):
        GGUFFile(tmp_path / "none.gguf")
