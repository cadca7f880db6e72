"""Checkpoints through one safetensors file and through other layouts: the same bits; clear words for bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.checkpoint import convert, safetensors_file
from megaforge.checkpoint.checkpoint import save_checkpoint
from megaforge.checkpoint.compatible import describe_run
from megaforge.checkpoint.manifest import read_manifest
from megaforge.checkpoint.shards import TensorEntry
from megaforge.checkpoint.sources import DirectorySource, FileSource
from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import named_specs

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
MODEL = ModelConfig(
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    rwkv_head_size=8,
    num_experts=4,
    moe_router_topk=2,
    vocab_size=61,
    hybrid_layer_pattern="RE|*-*E",
)
PARTS = {"data": {"consumed_samples": 56}, "optimizer": {"step": 7}, "scaler": {}, "callbacks.average": {"decay": 0.9}}
RUN = {"iteration": 7, "state": PARTS}
KEPT = "callbacks.average.loss"  # a tensor of a callback


def everything() -> dict[str, Tensor]:
    """A weight and two moments of each parameter, by key."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for spec, _ in named_specs(HybridModel(make_layer_context(MODEL, ParallelContext.single("meta")))):
        for key in (spec.name, f"optimizer.exp_avg.{spec.name}", f"optimizer.exp_avg_sq.{spec.name}"):
            found[key] = torch.randn(spec.shape, generator=generator)
    return found | {KEPT: torch.randn((2, 3), generator=generator)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with one checkpoint, written by one rank that also kept a random state."""
    directory, tensors = tmp_path_factory.mktemp("run"), everything()
    specs = {
        spec.name: spec
        for spec, _ in named_specs(HybridModel(make_layer_context(MODEL, ParallelContext.single("meta"))))
    }
    entries = [
        TensorEntry(key, specs.get(key.split(".", 2)[2] if "optimizer" in key else key), tensors[key])
        for key in tensors
    ]
    meta = describe_run(Config(model=MODEL), None) | RUN
    save_checkpoint(directory, 7, entries, meta, ParallelContext.single(), {"cpu": torch.zeros(3, dtype=torch.uint8)})
    return directory


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    assert runpy.run_path(str(TOOL))["main"]() == 0


def test_a_round_trip_through_file_and_layouts_keeps_every_bit(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, again = tmp_path / "one.safetensors", tmp_path / "again.safetensors"
    run_tool(monkeypatch, "--load", saved, "--save", one, "--optimizer")
    expected, found = everything(), load_file(one)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with safetensors.safe_open(one, "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "7" and json.loads(metadata["meta"])["config"]["model"]["hidden_size"] == 16
    cut = tmp_path / "cut"
    layout = ("--tp", "2", "--pp", "2", "--ep", "2", "--etp", "1", "--dp", "2")
    run_tool(monkeypatch, "--load", one, "--save", cut, *layout)
    run_tool(monkeypatch, "--load", cut, "--save", tmp_path / "small", "--tp", "2", "--ep", "2", "--dp", "1")
    assert read_manifest(tmp_path / "small" / "step_0000007").layout["world"] == 2, "experts are split over ep alone"
    run_tool(monkeypatch, "--load", tmp_path / "small", "--save", tmp_path / "whole", "--pp", "3")
    run_tool(monkeypatch, "--load", tmp_path / "whole", "--save", again, "--optimizer")
    assert again.read_bytes() == one.read_bytes()
    manifest = read_manifest(cut / "step_0000007")
    assert manifest.layout == {"tp": 2, "cp": 1, "pp": 2, "dp": 2, "ep": 2, "etp": 1, "edp": 2, "world": 8, "vpp": 1}
    sizes = [record.bytes for record in manifest.files.values()]
    assert len(sizes) == 8 and max(sizes) < 0.3 * sum(sizes)
    assert sum(sizes) < 1.3 * one.stat().st_size, "replicas are written once"


def test_a_file_of_weights_alone(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tool(monkeypatch, "--load", saved, "--save", tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == {
        key for key in everything() if not key.startswith(("optimizer", "callbacks"))
    }
    run_tool(monkeypatch, "--load", tmp_path / "w.safetensors", "--save", tmp_path / "w")
    meta = DirectorySource(tmp_path / "w").meta
    assert meta["iteration"] == 7 and "state" not in meta and "config" in meta


def test_pieces_are_read_one_at_a_time(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to a rank's file is that rank's piece, not the tensor it is cut from."""
    source, largest = DirectorySource(saved), 0
    read = source.read

    def watched(key: str, box: Any = None) -> Tensor:
        nonlocal largest
        piece = read(key, box)
        largest = max(largest, piece.numel())
        return piece

    monkeypatch.setattr(source, "read", watched)
    config = dataclasses.replace(Config().parallel, tensor_model_parallel_size=2)
    convert.write_directory(source, tmp_path / "cut", config)
    assert largest == max(tensor.numel() for tensor in everything().values()) // 2


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        tensors = load_file(source)
        change(tensors)
        with safetensors.safe_open(source, "pt") as file:
            save_file(tensors, target, metadata=file.metadata())

    return write


BAD_FILES = {
    "missing": (
        changed(lambda t: t.pop("layers.1.mixer.qkv.weight")),
        r"1 weights of the model are missing: layers.1.mixer.qkv.weight",
    ),
    "shape": (
        changed(lambda t: t.update({"final_norm.weight": torch.zeros(17)})),
        r"final_norm.weight has the shape \(17,\), the model's is \(16,\)",
    ),
    "unknown": (
        changed(lambda t: t.update({"layers.1.mixer.qkw.weight": torch.zeros(3)})),
        r"no parameter layers.1.mixer.qkw.weight .*did you mean layers.1.mixer.qkv.weight\?",
    ),
    "unknown state": (
        changed(lambda t: t.update({"optimizer.exp_avg.final_norm.wait": torch.zeros(16)})),
        r"no parameter final_norm.wait \(tensor optimizer.exp_avg.final_norm.wait\); did you mean final_norm.weight\?",
    ),
    "shape of a state": (
        changed(lambda t: t.update({"optimizer.exp_avg.final_norm.weight": torch.zeros(17)})),
        r"optimizer.exp_avg.final_norm.weight has the shape \(17,\), --optimizer adam's is \(16,\)",
    ),
    "no metadata": (lambda source, target: save_file(load_file(source), target), "metadata does not say which model"),
    "no safetensors": (lambda source, target: target.write_bytes(b"weights"), "not a safetensors file"),
    "truncated": (
        lambda source, target: target.write_bytes(source.read_bytes()[:-1]),
        "bytes of data where the header",
    ),
    "absent": (lambda source, target: None, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(saved: Path, tmp_path: Path, case: str) -> None:
    write, message = BAD_FILES[case]
    convert.write_file(DirectorySource(saved), tmp_path / "good.safetensors", optimizer=True)
    write(tmp_path / "good.safetensors", tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        convert.write_directory(FileSource(tmp_path / "bad.safetensors"), tmp_path / "out")
    assert str(caught.value).startswith(f"--load {tmp_path / 'bad.safetensors'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--save", "{saved}"), "it holds checkpoints; name another directory"),
        (("--save", "{tmp}/there.safetensors"), "it exists; remove it"),
        (("--save", "{tmp}/x.safetensors", "--tp", "2"), "--tp: one file has no layout"),
        (("--save", "{tmp}/x", "--optimizer"), "--optimizer is for --save FILE.safetensors"),
        (("--save", "{tmp}/x", "--tp", "3"), "--tp 3 does not divide"),
        (("--save", "{tmp}/x", "--ep", "3"), "--ep 3 does not divide both --num-experts 4"),
        (("--save", "{tmp}/x", "--pp", "4"), "4 stages, but the model has only 3 blocks"),
        (("--save", "{tmp}/x", "--pp", "0"), "--pp 0: must be at least 1"),
        (("--save", "{tmp}/x", "--from", "rwkv7"), "give either --load"),
        (("--save", "{tmp}/x", "word"), "word: a FILE goes with --from"),
        (("--save", "{tmp}/x", "--tokenizer-model", "t.json"), "--tokenizer-model t.json: it is for --from"),
    ],
)
def test_bad_flags_are_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"x")
    given = [word.format(saved=saved, tmp=tmp_path) for word in arguments]
    with pytest.raises(UserError, match=message):
        run_tool(monkeypatch, "--load", saved, *given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.safetensors"]


def test_a_failed_write_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file.os, "fsync", full)
    source = DirectorySource(saved)
    for write, name in ((convert.write_file, "a.safetensors"), (convert.write_directory, "a")):
        with pytest.raises(UserError, match=f"--save {tmp_path / name}: .*not written .No space left"):
            write(source, tmp_path / name)
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".")] == []
