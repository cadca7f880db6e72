#!/usr/bin/env python3
"""Converts checkpoints: to one safetensors file, from it, to another layout, and from and to weights that others read.

    python tools/convert_checkpoint.py --load runs/1b --save 1b.safetensors --optimizer
    python tools/convert_checkpoint.py --load 1b.safetensors --save runs/1b-tp2 --tp 2 --pp 2
    python tools/convert_checkpoint.py --load runs/1b --save runs/1b-tp8 --tp 8
    python tools/convert_checkpoint.py --load runs/bitnet --save bitnet.safetensors --to packed
    python tools/convert_checkpoint.py --load runs/1b --save 1b-hf --to hf
    python tools/convert_checkpoint.py --load runs/rwkv7 --save rwkv7.pth --to rwkv7
    python tools/convert_checkpoint.py --load runs/gpt --save checkpoints/gpt --to megatron
    python tools/convert_checkpoint.py --load runs/bitnet --save bitnet.gguf --to gguf --gguf-type TQ2_0
    python tools/convert_checkpoint.py --load runs/tuned --save adapter --to peft
    python tools/convert_checkpoint.py --load runs/1b --adapter adapter --merge --save runs/merged
    python tools/convert_checkpoint.py --from hf Llama-3.1-8B --save runs/llama
    python tools/convert_checkpoint.py --from megatron checkpoints/gpt --save runs/gpt --tp 2
    python tools/convert_checkpoint.py --from rwkv7 RWKV-x070.pth --to hf --save rwkv7-hf
    python tools/convert_checkpoint.py --from rwkv7 RWKV-x070-World-0.1B.pth --save checkpoints/rwkv7-0.1b
    python tools/convert_checkpoint.py list runs/1b
    python tools/convert_checkpoint.py verify runs/1b
    python tools/convert_checkpoint.py fetch s3://bucket/1b runs/1b

A directory is what a run was given as --save (its newest valid checkpoint is taken) or one step_N in it. A file has
whole tensors by their global names, weights alone or with --optimizer everything that continuing the run needs; its
metadata carry step and configuration as JSON. Any directory loads at any layout; --tp, --pp, ... decide into which
files it is cut. Values stay the same bits, and memory holds one tensor at a time.

--to packed writes a model of --quantize-weights as packed codes with their scales, which tools/generate.py and
tools/evaluate.py read. --to hf writes models of the architectures that Hugging Face's transformers knows, --to gguf
those that llama.cpp knows, --to rwkv7 RWKV-LM's, --to peft the adapters of --peft lora (docs/finetuning.md). --from hf
and --from rwkv7 read such models; docs/from_huggingface.md says which. --from megatron and --to megatron: GPTs of
Megatron-LM (docs/from_megatron.md).

list shows the checkpoints of a run, verify reads every byte of them and leaves with status 1 where one is damaged; both
also take one step_N, and --json. fetch brings back what --save-replica has copied.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, byte_size, integer
from megaforge.config.config import Config
from megaforge.config.entry import run_entry
from megaforge.config.run_config import ParallelConfig
from megaforge.data.tokenizer import TOKENIZER_TYPES, guess_tokenizer_type, load_tokenizer
from megaforge.errors import UserError

if TYPE_CHECKING:
    from megaforge.checkpoint.sources import TensorSource

FILE_SUFFIX = ".safetensors"
TARGETS = {
    "packed": FILE_SUFFIX,
    "hf": "",
    "gguf": ".gguf",
    "rwkv7": ".pth",
    "megatron": "",
    "peft": "",
}  # name -> how --save ends
SOURCES = {  # name -> what reads it, of an Import
    "gguf": "megaforge.checkpoint.import_gguf:import_gguf",
    "hf": "megaforge.checkpoint.import_hf:import_hf",
    "rwkv7": "megaforge.checkpoint.import_rwkv7:import_rwkv7",
    "megatron": "megaforge.checkpoint.megatron.importing:import_megatron",
}
DTYPES = ("float32", "bfloat16", "float16")
GGUF_TYPES = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0")
LAYOUT = {  # flag -> field of the parallel section
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="with --from: the published weights (hf, megatron: a directory)"
    )
    parser.add_argument("--load", metavar="DIR|FILE.safetensors", help="what is converted")
    parser.add_argument("--save", required=True, metavar="DIR|FILE.safetensors", help="where it goes; must be new")
    parser.add_argument("--optimizer", action="store_true", help="with --save FILE: optimizer and run state too")
    for name, field in LAYOUT.items():
        parser.add_argument(
            f"--{name}", type=integer(1), metavar="N", help=f"with --save DIR: {field.replace('_', ' ')}"
        )
    parser.add_argument("--dp", type=integer(1), metavar="N", help="with --save DIR: data-parallel size")
    parser.add_argument("--to", dest="target", choices=tuple(TARGETS), help="whose format --save is in")
    parser.add_argument("--gguf-type", choices=GGUF_TYPES, help="with --to gguf: blocks of quantized matrices")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="with --to hf, rwkv7, megatron: of the weights (default: the run's)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_size,
        metavar="SIZE",
        help="with --to hf: most bytes of a file, as 5GB (default), 500MB",
    )
    parser.add_argument("--merge", action="store_true", help="adapters become a part of the matrices beside them")
    parser.add_argument("--adapter", metavar="DIR", help="with --merge: a folder of adapters, ours or peft's")
    parser.add_argument("--from", dest="source", choices=tuple(SOURCES), help="whose format FILE is in")
    parser.add_argument("--tokenizer-model", help="with --from: the model's tokenizer, recorded in the checkpoint")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="default: told from --tokenizer-model")
    parser.add_argument("--plain", action="store_true", help="with an encrypted --load: write what is not encrypted")
    parser.add_argument(
        "--encrypt",
        action="store_true",
        help="with --save DIR: encrypt what is not encrypted (MEGAFORGE_KEY_FILE)",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Runs the command; 0 when the result is published."""
    if sys.argv[1:2] == ["fetch"]:
        return _fetch(sys.argv[2:])
    if sys.argv[1:2] in (["list"], ["verify"]):
        return _registry(sys.argv[1], sys.argv[2:])
    flags = parse_arguments()
    _check(flags)
    if flags.source is not None:
        _import(flags)
    elif flags.target is not None:
        _export(flags, _open(flags))
    elif flags.save.endswith(FILE_SUFFIX):
        _to_file(flags)
    else:
        _to_directory(flags)
    return 0


def _fetch(arguments: list[str]) -> int:
    parser = ArgumentParser(prog="convert_checkpoint.py fetch", description="Brings a copy of --save-replica back.")
    parser.add_argument("url", metavar="URL", help="what a run was given as --save-replica")
    parser.add_argument("directory", metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--step", type=integer(0), metavar="N", help="of this iteration (default: the newest)")
    flags = parser.parse_args(arguments)

    from megaforge.checkpoint.replica import Replica

    print(f"{Replica(flags.url).fetch(Path(flags.directory), flags.step)}: fetched, and every byte of it checked")
    return 0


def _registry(command: str, arguments: list[str]) -> int:
    parser = ArgumentParser(prog=f"convert_checkpoint.py {command}", description=f"{command.title()} checkpoints.")
    parser.add_argument("directory", metavar="DIR", help="a run's --save directory, or one step_N in it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    flags = parser.parse_args(arguments)

    from megaforge.checkpoint import registry

    found = registry.list_checkpoints if command == "list" else registry.verify_checkpoints
    rows = list(found(flags.directory))
    if flags.json:
        lines = [json.dumps(registry.as_json(row)) for row in rows]
    else:
        lines = registry.table(rows, flags.directory, "there" if command == "list" else "whole")
    print("\n".join(lines))
    return int(command == "verify" and any(row.problem for row in rows))


def _check(flags: argparse.Namespace) -> None:
    if flags.source is None and flags.file is not None:
        raise UserError(f"{flags.file}: a FILE goes with --from; --load takes its own value")
    if (flags.load is None) == (flags.source is None) or (flags.source is None) != (flags.file is None):
        raise UserError("give either --load DIR|FILE.safetensors, or --from rwkv7 FILE, or --from hf|megatron DIR")
    for name in ("tokenizer_model", "tokenizer_type"):
        if flags.source is None and (value := getattr(flags, name)) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {value}: it is for --from; --load says which tokenizer it was trained with")
    if flags.source is not None and flags.optimizer:
        raise UserError("--optimizer: published weights have no optimizer state; leave it out")
    if flags.source is not None and flags.target is None and flags.save.endswith((*filter(None, TARGETS.values()),)):
        raise UserError(f"--save {flags.save}: --from makes a checkpoint, which is a directory; name one")
    if flags.gguf_type is not None and flags.target != "gguf":
        raise UserError(f"--gguf-type {flags.gguf_type}: it is for --to gguf")
    if flags.dtype is not None and flags.target not in ("hf", "rwkv7", "megatron"):
        raise UserError(f"--dtype {flags.dtype}: it is for --to hf, rwkv7 and megatron")
    if flags.max_shard_size is not None and flags.target != "hf":
        raise UserError(f"--max-shard-size {flags.max_shard_size}: it is for --to hf")
    if flags.encrypt and (flags.plain or flags.source or flags.target or flags.save.endswith(FILE_SUFFIX)):
        raise UserError("--encrypt: it is for --load with --save DIR, and without --plain")
    if flags.target is not None:
        _check_target(flags)
    if flags.adapter is not None and not flags.merge:
        raise UserError(f"--adapter {flags.adapter}: add --merge")
    if flags.merge and (flags.source is not None or flags.optimizer or flags.target == "peft"):
        raise UserError("--merge: it is for --load and --save of weights; leave --from, --optimizer and --to peft out")
    if flags.source is None and flags.save.endswith(FILE_SUFFIX) and (given := _given_layout(flags)):
        raise UserError(f"--{next(iter(given))}: one file has no layout; leave it out, or give --save a directory")
    if flags.source is None and flags.target is None and not flags.save.endswith(FILE_SUFFIX) and flags.optimizer:
        raise UserError("--optimizer is for --save FILE.safetensors; a directory gets all that --load has")


def _check_target(flags: argparse.Namespace) -> None:
    suffix = TARGETS[flags.target]
    if flags.optimizer or _given_layout(flags):
        raise UserError(f"--to {flags.target}: it takes no --optimizer and no layout")
    if suffix and not flags.save.endswith(suffix):
        raise UserError(f"--save {flags.save}: --to {flags.target} writes one file; give it a name in {suffix}")
    if not suffix and flags.save.endswith((FILE_SUFFIX, ".gguf")):
        raise UserError(f"--save {flags.save}: --to {flags.target} writes a directory; name one")


def _given_layout(flags: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(flags, name) for name in (*LAYOUT, "dp") if getattr(flags, name) is not None}


def _asked_layout(flags: argparse.Namespace) -> tuple[ParallelConfig, int | None]:
    """The layout to write, and dp where it is given."""
    given = _given_layout(flags)
    fields: dict[str, Any] = {LAYOUT[name]: size for name, size in given.items() if name in LAYOUT}
    return ParallelConfig(**fields), given.get("dp")


def _open(flags: argparse.Namespace, *, keeps_encryption: bool = False) -> TensorSource:
    from megaforge.checkpoint.sources import open_source

    source = open_source(flags.load)
    if source.encrypted and not flags.plain and not keeps_encryption:
        raise UserError(
            f"--load {source.path} is encrypted, and --save {flags.save} is plain; add --plain if it may be"
        )
    if flags.merge:
        from megaforge.checkpoint.adapter_files import MergedSource

        source = MergedSource(source, flags.adapter)
    if flags.plain and not source.encrypted:
        raise UserError(f"--plain: {source.path} is not encrypted; leave it out")
    return source


def _to_file(flags: argparse.Namespace) -> None:
    from megaforge.checkpoint.convert import write_file

    source = _open(flags)
    record = write_file(source, flags.save, optimizer=flags.optimizer)
    print(f"{flags.save}: step {source.step} of {source.path}, {record.bytes:,} bytes, SHA-256 {record.sha256}")
    _card(flags, source, "safetensors")


def _card(flags: argparse.Namespace, source: TensorSource, target: str) -> None:
    from megaforge.checkpoint.model_card import card_path, write_card

    if write_card(source, flags.save, target) is None:
        print(f"{card_path(Path(flags.save))} is there, and stays: it is not the model card of this export")


def _export(flags: argparse.Namespace, source: TensorSource) -> None:
    said = f"{flags.save}: step {source.step} of {source.path}"
    if flags.target == "packed":
        from megaforge.checkpoint.packed_file import write_packed

        record, packed, weights = write_packed(source, flags.save)
        print(f"{said}, {record.bytes:,} bytes, SHA-256 {record.sha256}")
        print(f"{weights:,} quantized weights take {packed:,} bytes, {packed * 8 / weights:.3f} bits each")
    elif flags.target == "peft":
        from megaforge.checkpoint.peft_files import export

        print(f"{said}, {export(source, flags.save)}")
    elif flags.target == "hf":
        _export_hf(flags, source, said)
    elif flags.target == "megatron":
        from megaforge.checkpoint.megatron.exporting import export_megatron

        done = export_megatron(source, flags.save, dtype=flags.dtype)
        tokenizer = f"with its tokenizer ({', '.join(done.tokenizer)})" if done.tokenizer else "without a tokenizer"
        print(f"{said}, {done.bytes:,} bytes of weights, {tokenizer}; its optimizer's state stays behind")
    elif flags.target == "rwkv7":
        from megaforge.checkpoint.export_rwkv7 import export_rwkv7

        print(f"{said}, {export_rwkv7(source, flags.save, dtype=flags.dtype):,} bytes")
    else:
        from megaforge.checkpoint.export_gguf import export_gguf

        size, has_tokenizer = export_gguf(source, flags.save, flags.gguf_type)
        without = "" if has_tokenizer else ", without a tokenizer: it has none that is a byte-level BPE tokenizer.json"
        print(f"{said}, {size:,} bytes{without}")
        model = source.meta["config"]["model"]
        if model.get("quantize_weights") and model.get("quant_scale_dtype") != "fp16":
            print("its scales are rounded to fp16, which training did not; --quant-scale-dtype fp16 trains with such")
    _card(flags, source, flags.target)


def _export_hf(flags: argparse.Namespace, source: TensorSource, said: str) -> None:
    from megaforge.checkpoint.export_hf import SHARD_BYTES, export_hf

    done = export_hf(source, flags.save, dtype=flags.dtype, shard_bytes=flags.max_shard_size or SHARD_BYTES)
    files = f"{done.shards} file{'s' if done.shards > 1 else ''}"
    print(f"{said}, a model of {done.model_type}, {done.bytes:,} bytes of weights in {files}")
    print(
        f"with its tokenizer ({', '.join(done.tokenizer)})"
        if done.tokenizer
        else "without a tokenizer: it has no files"
    )


def _to_directory(flags: argparse.Namespace) -> None:
    from megaforge.checkpoint.convert import write_directory
    from megaforge.checkpoint.encryption import read_key

    parallel, dp = _asked_layout(flags)
    source = _open(flags, keeps_encryption=True)
    key = read_key() if flags.encrypt or (source.encrypted and not flags.plain) else None
    path = write_directory(source, flags.save, parallel, dp, key)
    print(f"{path}: step {source.step} of {source.path}, {_describe(source)}{', encrypted' * (key is not None)}")


def _describe(source: TensorSource) -> str:
    from megaforge.checkpoint.stateful import state_prefixes

    has_state = any(key.startswith(state_prefixes(source.meta)) for key in source.tensors)
    size = sum(info.nbytes for info in source.tensors.values())
    note = "" if has_state else " (weights only: --load needs --finetune)"
    return f"{len(source.tensors)} tensors{note}, {size:,} bytes"


def _import(flags: argparse.Namespace) -> None:
    from megaforge.checkpoint.published_import import MODEL_FILE, Import, own_tokenizer

    kind, model = flags.tokenizer_type, flags.tokenizer_model
    if model is None and os.path.isdir(flags.file):
        model = own_tokenizer(flags.file)
    config, identity = Config(), None
    if model is not None:
        from megaforge.training.checkpointing import tokenizer_identity

        kind = kind or guess_tokenizer_type(model)
        identity = tokenizer_identity(load_tokenizer(kind, model))
        data = dataclasses.replace(config.data, tokenizer_type=kind, tokenizer_model=model)
        config = dataclasses.replace(config, data=data)
    parallel, dp = _asked_layout(flags)
    module, _, name = SOURCES[flags.source].partition(":")
    read = getattr(importlib.import_module(module), name)
    export = None if flags.target is None else functools.partial(_export, flags)
    path = read(Import(Path(flags.file), Path(flags.save), config, identity, parallel, dp, export))
    if export is not None:
        return
    print(f"{path}: written from {flags.file}")
    print(f"continue from it with: --config {os.path.join(flags.save, MODEL_FILE)} --load {flags.save} --finetune")


if __name__ == "__main__":
    run_entry(main)
