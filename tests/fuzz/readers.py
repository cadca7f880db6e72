"""What reads files: a good file of each format, and how the program reads one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megaforge.checkpoint import import_gguf
from megaforge.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from megaforge.checkpoint.encryption import EncryptedFile, Encryptor, Key, Label
from megaforge.checkpoint.gguf_file import GGUFFile, GGUFTensor, write_gguf
from megaforge.checkpoint.hf_folder import HFFolder
from megaforge.checkpoint.import_rwkv7 import read_pth
from megaforge.checkpoint.manifest import MANIFEST_FILE, SUMS_FILE, read_manifest
from megaforge.checkpoint.megatron.pickles import read_pickle, read_torch
from megaforge.checkpoint.packed_file import TrainedFile
from megaforge.checkpoint.phase_interface import load_phase4_models
from megaforge.checkpoint.registry import list_checkpoints, verify_checkpoints
from megaforge.checkpoint.safetensors_file import SafetensorsFile, Slot, write_safetensors
from megaforge.checkpoint.shards import TensorEntry
from megaforge.checkpoint.sources import DirectorySource
from megaforge.config.checkpoint_source import newest_meta
from megaforge.config.cli import parse_config
from megaforge.config.yaml_files import load_layer
from megaforge.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, idx_path, sidecar_path
from megaforge.data.sidecar import read_sidecar
from megaforge.data.skip_list import SKIP_FILE, add_skip, read_skips
from megaforge.data.text.readers import read_texts
from megaforge.data.tokenizer import load_tokenizer
from megaforge.inference.prompts import read_prompts
from megaforge.monitor.accounting import Accounting
from megaforge.monitor.audit import AUDIT_FILE, AuditTrail, Signer, read_trail
from megaforge.monitor.compare_digests import FILE as DIGESTS
from megaforge.monitor.compare_digests import read_digests
from megaforge.monitor.events import EventLog, read_events
from megaforge.monitor.sinks import JsonlSink, read_metrics
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec
from megaforge.planning.gpus import GPUS, gpu_named
from megaforge.resilience.faults import Plan, draw

CTX = ParallelContext.single()
KEY = Key(bytes(range(32)))
LABEL = Label("ab" * 16, 3, "rank_00000.safetensors.aes")


class Reader(NamedTuple):
    """One format.

    Attributes:
        make: writes a good file, and what belongs to it, into an empty folder; returns the file.
        read: reads the file, which may be mutated.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def _spec(name: str) -> ParamSpec:
    from tests.checkpoint.model_entries import INIT

    return ParamSpec(name, (8, 4), INIT)


def _entries() -> list[TensorEntry]:
    return [TensorEntry(name, _spec(name), torch.full((8, 4), -1.0)) for name in ("a", "b")]


def _checkpoint(folder: Path) -> Path:
    entries = [TensorEntry(name, _spec(name), torch.full((8, 4), 1.0)) for name in ("a", "b")]
    return save_checkpoint(folder, 3, entries, {"iteration": 3, "state": {"data": {}}}, CTX)


def _manifest(folder: Path) -> Path:
    return _checkpoint(folder) / MANIFEST_FILE


def _sums(folder: Path) -> Path:
    return _checkpoint(folder) / SUMS_FILE


def _shard(folder: Path) -> Path:
    return _checkpoint(folder) / "rank_00000.safetensors"


def _with_new_sums(step: Path) -> None:
    """A hostile writer's sums agree with what it wrote."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(step.iterdir())
        if path.name != SUMS_FILE
    ]
    (step / SUMS_FILE).write_text("".join(lines))


def _whole_or_refused(step: Path) -> None:
    entries = _entries()
    load_checkpoint(step, entries, CTX)
    wrong = [entry.key for entry in entries if not torch.isfinite(entry.tensor).all() or (entry.tensor == -1.0).any()]
    if wrong:
        raise AssertionError(f"partly loaded: {wrong}")


def _read_manifest(path: Path) -> None:
    _with_new_sums(path.parent)
    read_manifest(path.parent)
    for listed in (list_checkpoints, verify_checkpoints):
        list(listed(path.parent.parent))
    source = DirectorySource(path.parent)
    for key in source.tensors:
        source.read(key)
    load_checkpoint(path.parent, _entries(), CTX)


def _tensors(file: SafetensorsFile) -> None:
    for slot in file.slots():
        file.fill(slot.name, torch.empty(slot.shape, dtype=slot.dtype))
        file.tensor(slot.name)


def _safetensors(folder: Path) -> Path:
    path = folder / "file.safetensors"
    tensors = [torch.ones(3, 4), torch.ones(5, dtype=torch.bfloat16), torch.ones((), dtype=torch.int64)]
    pairs = [(Slot(name, each.dtype, tuple(each.shape)), each) for name, each in zip("abc", tensors, strict=True)]
    pairs.sort(key=lambda pair: (-pair[0].dtype.itemsize, pair[0].name))
    meta = {"step": "3", "meta": json.dumps({"config": {}}), "metric": "0.5", "packed": '{"a": {"kind": "binary"}}'}
    write_safetensors(path, [slot for slot, _ in pairs], [tensor for _, tensor in pairs], meta)
    return path


def _encrypted(folder: Path) -> Path:
    path, plain = folder / LABEL.file, _safetensors(folder).read_bytes()
    encryptor = Encryptor(KEY, LABEL, len(plain))
    path.write_bytes(b"".join([encryptor.head, *encryptor.update(memoryview(plain)), encryptor.finish()]))
    return path


def _gguf(folder: Path) -> Path:
    path = folder / "file.gguf"
    fields = {"general.architecture": "llama", "llama.block_count": 1, "x": 0.5, "list": [1, 2], "names": ["a", "b"]}
    write_gguf(path, fields, [GGUFTensor("token_embd.weight", (4, 8), 0, torch.ones(4, 8))])
    return path


def _gguf_model(folder: Path) -> Path:
    path = folder / "file.gguf"
    fields = {f"llama.{name}": 4 for name in import_gguf._FIELDS} | {"general.architecture": "llama"}
    write_gguf(path, fields, [GGUFTensor("token_embd.weight", (4, 8), 0, torch.ones(4, 8))])
    return path


def _read_gguf(path: Path) -> None:
    file = GGUFFile(path)
    for name in file.slots:
        file.content(name, 128)


def _index(folder: Path) -> Path:
    with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
        for length in (3, 0, 5):
            writer.add_document(np.arange(length))
    return idx_path(folder / "data")


def _read_index(path: Path) -> None:
    data = IndexedDataset(path.with_suffix(""))
    data.document_extents()
    for sequence in range(min(len(data), 100)):
        data.read(sequence)


def _sidecar(folder: Path) -> Path:
    path = sidecar_path(folder / "data")
    tokenizer = {"type": "NullTokenizer", "fingerprint": "ab", "vocab_size": 7, "eod": 6, "eod_token": None}
    content = {"format": "megaforge-dataset", "version": 1, "tokenizer": tokenizer, "tokens": 8, "text_bytes": 20}
    more = {"sources": [{"sha256": "cd"}], "settings": {"append_eod": True, "json_key": "text"}, "idx_sha256": "ef"}
    path.write_text(json.dumps(content | more))
    return path


def _lines(name: str, records: list[dict[str, Any]]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder / name

    return make


_EVENTS = [
    {"time": 1.5, "kind": kind, "iteration": 1, "uptime": 0.5, "step": 1, "seconds": 0.1, "host": "a", "pid": 7}
    for kind in ("start", "train", "snapshot", "save", "end", "start", "train")
]
_METRICS = [{"kind": "step", "iteration": n, "loss": 2.5, "tokens": 64, "grad_norm": None} for n in (1, 2, 3)]
_DIGESTS = [
    {"iteration": n, "weights": {"a": [1.0, "ab"]}, "gradients": {"a": [0.5, "cd"]}, "activations": {"b": [2.0, "ef"]}}
    for n in (1, 2)
]


def _read_events(path: Path) -> None:
    read_events(path)
    EventLog(path).tell("end")


def _read_accounts(path: Path) -> None:
    Accounting(read_events(path).events).goodput()


def _audit(folder: Path) -> Path:
    trail = AuditTrail(folder / AUDIT_FILE, Signer(bytes(32)))
    for step in (1, 2):
        trail.append("save", step=step, sums="ab")
    trail.sign()
    return folder / AUDIT_FILE


def _read_audit(path: Path) -> None:
    """Nothing but a whole beginning of what was written may pass."""
    lines = path.read_bytes().split(b"\n")
    read_trail(path)
    with tempfile.TemporaryDirectory() as other:
        good = [_said(line) for line in _audit(Path(other)).read_bytes().splitlines()]
    told = [_said(line) for line in lines[:-1]]
    if told != good[: len(told)]:
        raise AssertionError("a trail that was changed verifies")
    AuditTrail(path)


def _said(line: bytes) -> tuple[object, object]:
    """What a line of the trail says, but for its time and what follows from that."""
    told = json.loads(line)
    return told["kind"], told.get("step")


def _skips(folder: Path) -> Path:
    for stretch in ((3, 8), (20, 24)):
        add_skip(folder, stretch, reason="loss")
    return folder / SKIP_FILE


def _machine(folder: Path) -> Path:
    path = folder / "machine.json"
    path.write_text(
        json.dumps({"device": {**dataclasses.asdict(next(iter(GPUS.values()))), "name": "mine"}, "note": "x"})
    )
    return path


def _read_metrics(path: Path) -> None:
    read_metrics(path)
    JsonlSink(path, 2).close()


def _yaml(folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        "base: cdrmix-test\nname: mine\nmodel:\n  hidden_size: 64\n  ffn: dense\noptimizer:\n  lr: 1e-3\n"
        "data:\n  data_path: [a, 0.5, b, 0.5]\ntraining:\n  train_iters: 10\n"
    )
    return path


def _read_yaml(path: Path) -> None:
    load_layer(str(path))
    parse_config(["--config", str(path), "--vocab-size", "64"], prog="fuzz")


def _tokenizer(folder: Path) -> Path:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, special_tokens=["<|endoftext|>"], show_progress=False)
    made.train_from_iterator(["to be or not to be, that is the question"] * 5, trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(path))
    tokenizer.decode(tokenizer.encode("to be"))


def _hf_folder(folder: Path) -> Path:
    _safetensors(folder).rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 64}))
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
    return path


def _pth(folder: Path) -> Path:
    torch.save({"emb.weight": torch.ones(2, 3), "head.weight": torch.ones(2)}, folder / "model.pth")
    return folder / "model.pth"


def _pickle(folder: Path) -> Path:
    (folder / "common.pkl").write_bytes(pickle.dumps({"a": [1, 2.5, "x", None, (True, b"y")], "b": {"c": {1, 2}}}))
    return folder / "common.pkl"


def _phase4(folder: Path) -> Path:
    torch.save({"model_state_dict": {"a": torch.ones(2)}}, folder / "compressed_model.pt")
    path = folder / "compression_metadata.json"
    path.write_text(json.dumps({"compression_method": "bitnet", "bit_width": 1, "stats": {"ratio": 8}}))
    return path


def _plan(folder: Path) -> Path:
    Plan(str(folder), draw(1, 5, ranks=2, first=1, stride=1)).write(folder / "plan.json")
    return folder / "plan.json"


READERS = {
    "idx": Reader(_index, _read_index),
    "sidecar": Reader(_sidecar, lambda path: read_sidecar(path.with_suffix(""))),
    "manifest": Reader(_manifest, _read_manifest),
    "sums": Reader(_sums, lambda path: _whole_or_refused(path.parent)),
    "checkpoint": Reader(_shard, lambda path: _whole_or_refused(path.parent)),
    "safetensors": Reader(_safetensors, lambda path: _tensors(SafetensorsFile(path))),
    "encrypted": Reader(_encrypted, lambda path: _tensors(SafetensorsFile(path, EncryptedFile(path, KEY, LABEL)))),
    "packed": Reader(_safetensors, lambda path: TrainedFile(path)),
    "gguf": Reader(_gguf, _read_gguf),
    "gguf model": Reader(_gguf_model, lambda path: import_gguf._described(GGUFFile(path))),
    "hf": Reader(_hf_folder, lambda path: HFFolder(path.parent)),
    "pth": Reader(_pth, read_pth),
    "torch": Reader(_pth, read_torch),
    "pickle": Reader(_pickle, read_pickle),
    "phase 4": Reader(_phase4, lambda path: load_phase4_models(path.parent)),
    "events": Reader(_lines("events.jsonl", _EVENTS), _read_events),
    "accounts": Reader(_lines("events.jsonl", _EVENTS), _read_accounts),
    "audit": Reader(_audit, _read_audit),
    "skips": Reader(_skips, lambda path: read_skips(path.parent)),
    "machine": Reader(_machine, lambda path: gpu_named(str(path))),
    "newest meta": Reader(_manifest, lambda path: newest_meta(path.parent.parent)),
    "metrics": Reader(_lines("metrics.jsonl", _METRICS), _read_metrics),
    "digests": Reader(_lines(DIGESTS, _DIGESTS), read_digests),
    "yaml": Reader(_yaml, _read_yaml),
    "tokenizer": Reader(_tokenizer, _read_tokenizer),
    "text": Reader(
        _lines("text.jsonl", [{"text": "one"}, {"text": "two"}]), lambda p: list(read_texts(str(p), "text"))
    ),
    "prompts": Reader(_lines("prompts.jsonl", [{"prompt": "one"}]), lambda path: read_prompts(os.fspath(path), True)),
    "plan of faults": Reader(_plan, Plan.read),
}
