"""Files that megatron-core wrote at tp 2, pp 2 and ep 2, read at other layouts: its own logits."""

from __future__ import annotations

import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.find import find_checkpoint, holds_other_program
from megaforge.checkpoint.megatron.importing import import_megatron, open_megatron, open_source
from megaforge.checkpoint.published_import import Import
from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from megaforge.parallel.context import ParallelContext
from tests.checkpoint.megatron import models
from tests.checkpoint.megatron.conftest import Written
from tools import convert_checkpoint

STEP = f"iter_{models.ITERATION:07d}"


@torch.no_grad()
@pytest.mark.parametrize("kind", models.KINDS)
def test_logits_are_those_of_megatron_core(written: Written, kind: str, tmp_path: Path) -> None:
    folders = [written.folders[kind, form] for form in models.FORMS if (kind, form) in written.folders]
    first, *others = (open_source(Import(folder, tmp_path)) for folder in folders)
    for name in first.tensors:
        assert all(torch.equal(first.read(name), other.read(name)) for other in others), name
    import_megatron(Import(written.folders[kind, "torch_dist"], tmp_path / "ours"))
    ours = load_trained_model(str(tmp_path / "ours"), device="cpu").model._chunk.logits(models.TOKENS)
    torch.testing.assert_close(ours, written.logits[kind], rtol=0, atol=1e-5)
    assert float(ours.std()) > 0.05


def _edit_ranks(folder: Path, edit: Callable[[dict[str, dict[str, Any]]], None]) -> None:
    """Changes what ranks saved, by the names of their directories."""
    files = {path.parent.name: path for path in (folder / STEP).glob("*/*.pt")}
    states = {name: torch.load(path, weights_only=False) for name, path in files.items()}
    edit(states)
    for name, path in files.items():
        torch.save(states[name], path)


def _as_transformer_engine(states: dict[str, dict[str, Any]]) -> None:
    for state in states.values():
        renamed = {}
        for name, value in state["model"].items():
            name = re.sub(r"experts.local_experts.(\d).(linear_fc\d.weight)", r"experts.\2\1", name)
            renamed[name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")] = value
        state["model"] = renamed | {"decoder.final_layernorm._extra_state": torch.zeros(3)}


def _layer(state: dict[str, Any], layer: int) -> dict[str, Any]:
    """A layer of a rank's, as its first."""
    own = f"decoder.layers.{layer}."
    return {name.replace(own, "decoder.layers.0."): value for name, value in state.items() if name.startswith(own)}


def _as_virtual_stages(states: dict[str, dict[str, Any]]) -> None:
    """Layers 0 and 2 on the first ranks, 1 and 3 on the second ones, of which the first ones had 0 and 1."""
    for name in [name for name in states if name.endswith("_000")]:
        first, second = states[name], states[name.replace("_000", "_001")]
        a, b = first.pop("model"), second.pop("model")
        ends = [{key: value for key, value in state.items() if ".layers." not in key} for state in (a, b)]
        first |= {"model0": _layer(a, 0) | ends[0], "model1": _layer(b, 0)}
        second |= {"model0": _layer(a, 1), "model1": _layer(b, 1) | ends[1]}


@pytest.mark.parametrize(("kind", "edit"), [("mixtral", _as_transformer_engine), ("llama", _as_virtual_stages)])
def test_other_ways_to_keep_the_same(written: Written, kind: str, edit: Any, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(written.folders[kind, "torch"], folder)
    _edit_ranks(folder, edit)
    before, after = (open_source(Import(path, tmp_path)) for path in (written.folders[kind, "torch"], folder))
    for name in before.tensors:
        assert torch.equal(before.read(name), after.read(name)), name


def test_norms_without_their_1(written: Written, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(written.folders["gpt", "torch_dist"], folder)
    plain = open_source(Import(folder, tmp_path))
    before = {name: plain.read(name) for name in ("layers.0.mixer_norm.weight", "layers.0.mixer_norm.bias")}
    _args({"apply_layernorm_1p": True})(folder / STEP)
    moved = open_source(Import(folder, tmp_path))
    for name, value in before.items():
        assert torch.equal(moved.read(name), value + name.endswith("weight")), name


def test_by_the_command(written: Written, tmp_path: Path, monkeypatch: Any, capsys: Any, caplog: Any) -> None:
    folder = written.folders["mixtral", "torch_dist"]
    save = tmp_path / "ours"
    argv = ["convert", "--from", "megatron", str(folder / STEP), "--save", str(save), "--tp", "2", "--ep", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    assert convert_checkpoint.main() == 0
    said = capsys.readouterr().out
    assert "iteration 7: the optimizer's state stays behind" in caplog.text
    assert f"--config {save / 'model.yaml'} --load {save} --finetune" in said
    model = parse_config(["--config", str(save / "model.yaml")], prog="test").config.model
    assert model.num_experts == 4 and model.moe_shared_expert_intermediate_size == 16 and model.query_groups == 2
    assert len(list((save / "step_0000000").glob("*.safetensors"))) == 4  # tp and ep are apart


def test_load_names_the_command(written: Written) -> None:
    for folder in (written.folders["llama", "torch"], written.folders["llama", "torch_dist"] / STEP):
        assert holds_other_program(folder, ParallelContext.single())
        with pytest.raises(UserError, match=f"--from megatron {folder} --save"):
            find_checkpoint(folder, ParallelContext.single())


def _args(change: dict[str, Any]) -> Callable[[Path], None]:
    """Megatron's arguments otherwise than they were."""

    def edit(step: Path) -> None:
        common = torch.load(step / "common.pt", weights_only=False)
        vars(common["args"]).update(change)
        torch.save(common, step / "common.pt")

    return edit


class _Code:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def _save(name: str, value: Any) -> Callable[[Path], None]:
    return lambda step: torch.save(value, step / name) if name.endswith(".pt") else _dump(step / name, value)


def _dump(file: Path, value: Any) -> None:
    file.write_bytes(pickle.dumps(value))


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "code": ("torch_dist", _save("common.pt", {"iteration": 7, "x": _Code()}), r"common.pt: .* not run: .*print"),
    "code in .metadata": ("torch_dist", _save(".metadata", _Code()), r"\.metadata: .* not run: builtins.print"),
    "code of a rank": (
        "torch",
        lambda step: _save("mp_rank_01_001/model_optim_rng.pt", {"model": _Code()})(step),
        r"mp_rank_01_001/.* not run: .*print",
    ),
    "damage": ("torch_dist", lambda step: _dump(step / "common.pt", 3), "common.pt: not a file of Megatron-LM"),
    "no arguments": ("torch_dist", _save("common.pt", {"iteration": 7}), "does not hold Megatron-LM's arguments"),
    "files": ("torch_dist", lambda step: (step / "__1_0.distcp").unlink(), "files are missing: __1_0.distcp"),
    "short files": (
        "torch_dist",
        lambda step: _dump(step / "__1_0.distcp", 0),
        "files are shorter than .metadata says: __1_0.distcp",
    ),
    "ranks": (
        "torch",
        lambda step: shutil.rmtree(step / "mp_rank_01_001"),
        "ranks are missing of tp 2, pp 2, ep 1: mp_rank_01_001",
    ),
    "shapes": (
        "torch_dist",
        _args({"ffn_hidden_size": 40}),
        r"linear_fc1.weight has the shape \(96, 32\), which should be \(80, 32\).*\(3 more do not fit\)",
    ),
    "layers": (
        "torch_dist",
        _args({"num_layers": 5}),
        r"6 weights \(decoder.layers.4.input_layernorm.weight, .* and 1 more\) are missing",
    ),
    "more layers": (
        "torch_dist",
        _args({"num_layers": 3}),
        r"6 tensors \(decoder.layers.3.input.* are of a part of the model that we do not have",
    ),
    "parts": (
        "torch_dist",
        _args({"multi_latent_attention": True, "window_size": (128, 0), "position_embedding_type": "yarn"}),
        r"--multi-latent-attention True, --window-size \(128, 0\), --position-embedding-type yarn",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(written: Written, case: str, tmp_path: Path, capsys: Any) -> None:
    form, spoil, message = BAD[case]
    folder = tmp_path / "theirs"
    shutil.copytree(written.folders["llama", form], folder)
    spoil(folder / STEP)
    with pytest.raises(UserError, match=message):
        import_megatron(Import(folder, tmp_path / "ours"))
    assert not (tmp_path / "ours").exists() and "must not run" not in capsys.readouterr().out


def test_a_missing_iteration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint of Megatron-LM"):
        open_megatron(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(UserError, match="says '12', and there is no such iteration"):
        open_megatron(tmp_path)
