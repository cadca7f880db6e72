"""Models as Hugging Face's transformers reads them: those of :data:`megaforge.registry.ARCHITECTURES`, quantized
matrices as its BitNet quantizer packs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.checkpoint.architectures.base import Architecture, Part
from megaforge.checkpoint.hf_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    copy_tokenizer,
    publish_directory,
)
from megaforge.checkpoint.packed_file import QuantizedModel, open_quantized
from megaforge.checkpoint.published import architecture
from megaforge.checkpoint.safetensors_file import Slot, file_order, write_safetensors
from megaforge.checkpoint.sources import TensorSource
from megaforge.config.pattern import blocks_of
from megaforge.data.tokenizer_files import find_tokenizer
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.quant.formats.hf_bitnet import pack_rows
from megaforge.quant.whole_matrix import CodedMatrix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5_000_000_000
_WANTED = "--to hf"


class Exported(NamedTuple):
    """What was written: the architecture, bytes of weights, files of weights, and files of the tokenizer."""

    model_type: str
    bytes: int
    shards: int
    tokenizer: list[str]


def export_hf(
    source: TensorSource, directory: str | Path, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Writes the model of the checkpoint ``source`` as ``config.json``, ``generation_config.json``, safetensors files
    and its tokenizer. Memory holds one tensor at a time.

    Quantized matrices are packed, four rows in one, with the reciprocals of their steps (``bitlinear``). In fp32
    transformers computes what the model does; in bf16 it rounds the products of codes, which here are exact.

    Args:
        dtype: one of :data:`DTYPES`; None: what the run computed in, norms and routers in fp32.
        shard_bytes: most bytes of a file, unless one tensor has more; several files get an index.

    Raises:
        UserError: no architecture of transformers' computes what the model does, or ``directory`` is not empty or
            cannot be written.
    """
    model = open_quantized(source)
    kind = architecture(model, _WANTED)
    _check_quantizer(model)
    if dtype is not None:
        model = _in_dtype(model, dtype)
    writer = _Writer(model, kind)

    def write(folder: Path) -> Exported:
        size, shards = writer.write(folder, shard_bytes)
        tokenizer = write_tokenizer(model, folder)
        tokens = _special_tokens(model, folder)
        (folder / CONFIG_FILE).write_text(_json(_config(model, kind, writer.parts) | tokens), encoding="utf-8")
        if not (folder / "generation_config.json").exists():
            (folder / "generation_config.json").write_text(_json(tokens), encoding="utf-8")
        return Exported(kind.name, size, shards, tokenizer)

    return publish_directory(directory, write)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _in_dtype(model: QuantizedModel, dtype: str) -> QuantizedModel:
    if model.schemes:
        raise UserError(f"--dtype {dtype}: codes follow from the type that they were trained in; leave it out")
    return model._replace(dtype=DTYPES[dtype])


def _check_quantizer(model: QuantizedModel) -> None:
    cfg = model.config.model
    if not model.schemes:
        return
    if cfg.quant_granularity != "tensor":
        raise UserError(
            f"{_WANTED}: --quant-granularity {cfg.quant_granularity}: transformers' BitNet has one scale a matrix; use "
            "--to packed"
        )
    if cfg.activation_kind != "int8" or cfg.asymmetric_activations:
        raise UserError(
            f"{_WANTED}: transformers' BitNet quantizes activations to symmetric int8, and this model was trained with "
            f"--quantize-activations {cfg.activation_kind or 'none'}"
            f"{' --asymmetric-activations' if cfg.asymmetric_activations else ''}; use --to packed"
        )


class _Writer:
    """The files of a model's tensors, each of which is read when it is written."""

    def __init__(self, model: QuantizedModel, kind: Architecture) -> None:
        self.model = model
        self.parts = list(kind.parts(model.config.model, model.specs))
        self._tensors = dict(self._declared())
        self._coded: tuple[str, CodedMatrix] | None = None

    def _declared(self) -> Iterator[tuple[str, tuple[Slot, Part]]]:
        for part in self.parts:
            if part.ours not in self.model.schemes:
                yield part.theirs, (Slot(part.theirs, self.model.dtype_of(part.ours), part.shape), part)
                continue
            rows, columns = part.shape
            if rows % 4:
                raise UserError(f"{_WANTED}: {part.theirs}: {rows} rows are not a multiple of 4; use --to packed")
            yield part.theirs, (Slot(part.theirs, torch.uint8, (rows // 4, columns)), part)
            scale = f"{part.theirs}_scale"
            yield scale, (Slot(scale, self.model.dtype, (1,)), part)

    def write(self, folder: Path, shard_bytes: int) -> tuple[int, int]:
        """Bytes of all files, and how many there are."""
        shards = self._shards(shard_bytes)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        names = [WEIGHTS_FILE] if len(shards) == 1 else names
        written = 0
        for name, shard in zip(names, shards, strict=True):
            slots = sorted(shard, key=file_order)
            record = write_safetensors(folder / name, slots, map(self._read, slots), {"format": "pt"})
            written += record.bytes
        if len(shards) > 1:
            total = sum(slot.nbytes for shard in shards for slot in shard)
            places = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX_FILE).write_text(_json(index), encoding="utf-8")
        return written, len(shards)

    def _shards(self, shard_bytes: int) -> list[list[Slot]]:
        shards: list[list[Slot]] = [[]]
        room = shard_bytes
        for slot, _ in self._tensors.values():
            if shards[-1] and slot.nbytes > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(slot)
            room -= slot.nbytes
        return shards

    def _read(self, slot: Slot) -> Tensor:
        part = self._tensors[slot.name][1]
        if part.ours not in self.model.schemes:
            return part.to_theirs(self.model.read(part.ours, part.box))
        matrix = self._codes(part.ours)
        if slot.name == part.theirs:
            return pack_rows(part.to_theirs(matrix.codes[part.box[0][0] : part.box[0][1]]))
        step = matrix.step[part.number].clamp_min(torch.finfo(torch.float32).tiny)  # of a matrix of zeros
        return step.reciprocal().to(slot.dtype).view(1)

    def _codes(self, name: str) -> CodedMatrix:
        if self._coded is None or self._coded[0] != name:
            self._coded = (name, self.model.coded(name))
        return self._coded[1]


def _config(model: QuantizedModel, kind: Architecture, parts: list[Part]) -> dict[str, Any]:
    cfg, config = model.config.model, model.config
    written: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.name,
        "vocab_size": cfg.vocab_size or cfg.padded_vocab_size(),
        "num_hidden_layers": len(blocks_of(cfg)),
        "max_position_embeddings": cfg.max_position_embeddings or config.data.seq_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        **kind.config(cfg),
    }
    if model.schemes:
        matrices = [part for part in parts if part.layer is not None and len(part.shape) == 2]
        left = [part.theirs.removesuffix(".weight") for part in matrices if part.ours not in model.schemes]
        written["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head", *left],
        }
    return written


def write_tokenizer(model: QuantizedModel, folder: Path) -> list[str]:
    """Copies the run's tokenizer, with what lies beside it; its files."""
    saved = model.source.meta.get("tokenizer") or {}
    if saved.get("type") not in ("HuggingFaceTokenizer", "SentencePieceTokenizer"):
        return []
    try:
        paths = find_tokenizer(str(saved["model"]), saved["type"]).paths
    except UserError:
        return []
    if not all(path.is_file() for path in paths):
        return []
    _ = copy_tokenizer(paths[0].parent, folder)
    standard = {".json": "tokenizer.json", ".model": "tokenizer.model"}
    names = ("vocab.json", "merges.txt") if len(paths) == 2 else (standard.get(paths[0].suffix, paths[0].name),)
    for path, name in zip(paths, names, strict=True):
        shutil.copyfile(path, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        named = {"eos_token": saved["eod_token"]} if saved.get("eod_token") else {}
        kind = "LlamaTokenizer" if saved["type"] == "SentencePieceTokenizer" else "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(_json({"tokenizer_class": kind, **named}), encoding="utf-8")
    return [name for name in TOKENIZER_FILES if (folder / name).exists()]


def _special_tokens(model: QuantizedModel, folder: Path) -> dict[str, Any]:
    """Ids of the first, the last and the filling token: as the model came with them, else what ends documents."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    given = folder / "generation_config.json"
    if given.is_file():
        try:
            content = dict(parse_json(given.read_bytes()))
            return {name: content.get(name) for name in names}
        except (ValueError, TypeError):
            given.unlink()
    eod = (model.source.meta.get("tokenizer") or {}).get("eod")
    return dict(zip(names, (eod, eod, None), strict=True))
