"""Published RWKV-7 weights become a checkpoint of ours, value for value, or one clear error."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaforge.checkpoint.architectures.rwkv7 import pth_name
from megaforge.checkpoint.checkpoint import load_checkpoint, read_meta
from megaforge.checkpoint.compatible import check_compatible
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.import_rwkv7 import import_rwkv7, read_pth, rwkv7_source
from megaforge.checkpoint.published_import import MODEL_FILE, Import
from megaforge.checkpoint.shards import TensorEntry
from megaforge.config.cli import parse_config
from megaforge.config.model_config import ModelConfig
from megaforge.config.schema import config_from_dict
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import named_specs
from tests.checkpoint.rwkv7_weights import FFN, LAYERS, VOCAB, WIDTH, published_weights

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def convert_rwkv7(weights: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    cfg, source = rwkv7_source(weights, Path("model.pth"))
    return cfg, {name: source.read(name) for name in source.tensors}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """In bf16, as they are published."""
    return {name: value.bfloat16() for name, value in published_weights().items()}


def test_the_configuration_is_read_off_the_tensors(weights: dict[str, Tensor]) -> None:
    cfg, tensors = convert_rwkv7(weights)
    cfg.validate()
    assert cfg.hybrid_layer_pattern == "R-" * LAYERS and cfg.num_layers == LAYERS
    assert (cfg.hidden_size, cfg.ffn_hidden_size, cfg.vocab_size) == (WIDTH, FFN, VOCAB)
    ranks = (cfg.rwkv_decay_rank, cfg.rwkv_iclr_rank, cfg.rwkv_value_rank, cfg.rwkv_gate_rank)
    assert ranks == (32, 48, 16, 64)
    assert (cfg.normalization, cfg.norm_epsilon, cfg.activation) == ("layernorm", 1e-5, "relu2")
    assert cfg.untie_embeddings_and_output_weights
    assert tensors["embedding.weight"].shape[0] == cfg.padded_vocab_size() == 128


def test_every_used_value_arrives_exactly(weights: dict[str, Tensor]) -> None:
    _, tensors = convert_rwkv7(weights)
    used = {pth_name(name): name for name in tensors}
    assert weights.keys() - used.keys() == {f"blocks.0.att.v{i}" for i in range(3)} and used.keys() <= weights.keys()
    for theirs, ours in used.items():
        value = weights[theirs].float().flatten()
        assert torch.equal(tensors[ours].flatten()[: value.numel()], value), theirs
        assert not tensors[ours].flatten()[value.numel() :].any()  # only the vocabulary's padding is left


def test_a_file_becomes_a_checkpoint_that_loads_at_any_layout(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "model.pth")
    import_rwkv7(Import(tmp_path / "model.pth", tmp_path / "save"))
    cfg, tensors = convert_rwkv7(weights)
    whole = ParallelContext.single()
    path = find_checkpoint(tmp_path / "save", whole)
    meta = read_meta(path)
    assert parse_config(["--config", str(tmp_path / "save" / MODEL_FILE)]).config.model == cfg
    check_compatible(meta, config_from_dict(meta["config"]))
    assert meta["config"]["model"]["rwkv_iclr_rank"] == 48 and meta["source"]["file"] == "model.pth"
    for rank in range(2):
        ctx = ParallelContext.of_rank(rank, 2, tp=2)
        model = HybridModel(make_layer_context(cfg, ctx))
        entries = [TensorEntry(spec.name, spec, p.detach()) for spec, p in named_specs(model)]
        load_checkpoint(path, entries, ctx)
        for name, spec, local in entries:
            assert torch.equal(local, spec.take_local(tensors[name], ctx)), name


def test_the_tool_writes_it_and_records_the_tokenizer(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights, tmp_path / "model.pth")
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    argv = ["tool", "--from", "rwkv7", str(tmp_path / "model.pth"), "--save", str(tmp_path / "save")]
    monkeypatch.setattr(sys, "argv", [*argv, "--tokenizer-model", str(VOCAB - 1)])
    assert tool.main() == 0
    meta = read_meta(find_checkpoint(tmp_path / "save", ParallelContext.single()))
    assert meta["tokenizer"]["vocab_size"] == VOCAB and meta["config"]["data"]["tokenizer_type"] == "NullTokenizer"
    monkeypatch.setattr(sys, "argv", [*argv, "--tokenizer-model", "5000"])
    with pytest.raises(UserError, match="5001 ids, the model knows 97"):
        tool.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.att.w1": None}, "model.pth: the weight blocks.1.att.w1 is missing"),
        ({"blocks.0.att.r_k": None}, r"not RWKV-7 \(x070\) weights"),
        ({"blocks.1.ffn.s_emb.weight": torch.zeros(3)}, "s_emb.weight is of a part of the model that we do not have"),
        ({"moba.0.weight": torch.zeros(3)}, "moba.0.weight is of a part"),
        ({"blocks.2.att.g1": torch.zeros(WIDTH, 32)}, "blocks.2.att.g1 has the shape"),
        ({"blocks.2.ffn.x_k": torch.zeros(2, 1, WIDTH)}, "blocks.2.ffn.x_k has the shape"),
    ],
)
def test_other_weights_are_refused_by_name(weights: dict[str, Tensor], change: dict, message: str) -> None:
    changed = {name: value for name, value in (weights | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        convert_rwkv7(changed)


class StageTensors:
    """Something that plain unpickling would run."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(__file__).with_name("unpickled"),))


def test_files_that_hold_no_tensors_are_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_pth(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a model")
    torch.save({"emb.weight": StageTensors()}, tmp_path / "hostile.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text", "hostile", "list"):
        with pytest.raises(UserError, match=f"{name}.pth"):
            read_pth(tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match=r"it asks to run (getattr|pathlib)"):
        read_pth(tmp_path / "hostile.pth")
    assert not Path(__file__).with_name("unpickled").exists()
