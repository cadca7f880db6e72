"""Adapters in the files of peft: read by peft itself, read back, merged and unmerged, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.adapter_files import AdapterFolder, MergedSource, export_peft
from megaforge.checkpoint.checkpoint import load_checkpoint, read_meta
from megaforge.checkpoint.convert import write_directory
from megaforge.checkpoint.export_hf import export_hf
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.sources import open_source
from megaforge.config.schema import config_from_dict
from megaforge.errors import UserError
from megaforge.inference.restore import add_adapter, load_trained_model
from megaforge.models.hybrid import HybridModel
from megaforge.optim import MainParameters
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import named_specs
from megaforge.peft.lora import adapters
from megaforge.peft.merging import Merged
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.peft.test_lora import LORA, MODEL, SIZES
from tests.training.tiny import arguments, dense_arguments, make_trainer, write_dataset

LLAMA = ("--activation", "swiglu", "--num-query-groups", "2")
RUN = ("--train-iters", "1", "--lr", "1e-2")
TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def train(argv: list[str]) -> None:
    trainer = trainer_of(argv)
    perturb(trainer.model, trainer.ctx, 0.05)
    trainer.train()


def lora_run(prefix: str, folder: Path, *more: str) -> str:
    """A base with noise on it, and a LoRA of it trained for one step."""
    base, tuned = str(folder / "base"), str(folder / "tuned")
    model = dense_arguments(prefix, "*-*-", *LLAMA, *RUN)
    train([*model, "--save", base])
    flags = [*model, "--peft", "lora", "--lora-rank", "4", "--lora-rank-pattern", "v_proj=2", *more]
    trainer = make_trainer([*flags, "--pretrained-checkpoint", base, "--save", tuned])
    for _, _, adapter in adapters(trainer.model):
        for factors in adapter.factors:
            torch.nn.init.normal_(adapter.pair(factors)[1], std=0.3)
    trainer.train()
    return tuned


@pytest.fixture(scope="module")
def tuned(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return lora_run(prefix, tmp_path_factory.mktemp("runs"))


def logits(load: str, **flags: Any) -> torch.Tensor:
    trained = load_trained_model(load, device="cpu", **flags)
    [chunk] = [module for module in trained.model._chunk.modules() if hasattr(module, "head_input")]
    with torch.no_grad():
        out: torch.Tensor = chunk.logits(TOKENS)
    return out


def test_peft_computes_the_same(tuned: str, tmp_path: Path) -> None:
    """The base exported for transformers, with our adapter put beside it by peft, and merged by it."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    export_hf(open_source(Path(tuned).parent / "base"), tmp_path / "hf")
    assert export_peft(open_source(tuned), tmp_path / "adapter") == 14
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    alone = base(TOKENS).logits.detach().clone()
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        theirs = model(TOKENS).logits
    assert (theirs - alone).abs().max() > 0.1
    torch.testing.assert_close(logits(tuned), theirs, rtol=0, atol=1e-5)
    # peft's own files come back.
    model.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(
        logits(str(Path(tuned).parent / "base"), adapter=str(tmp_path / "again")), theirs, rtol=0, atol=1e-5
    )


def test_merging_is_the_definition_and_is_undone_to_the_bit(tuned: str, tmp_path: Path, prefix: str) -> None:
    source = open_source(tuned)
    write_directory(MergedSource(source), tmp_path / "merged")
    export_peft(source, tmp_path / "adapter")
    both = MergedSource(open_source(Path(tuned).parent / "base"), str(tmp_path / "adapter"))
    merged = open_source(tmp_path / "merged")
    changed = 0
    for name, info in both.tensors.items():
        assert torch.equal(both.read(name), merged.read(name)), name
        half = tuple((size // 2, size) for size in info.shape)
        assert torch.equal(both.read(name, half), both.read(name)[tuple(slice(a, b) for a, b in half)])
        changed += not torch.equal(source.read(name), merged.read(name))
    assert changed == 8 and both.meta["config"]["model"]["peft"] is None
    assert torch.equal(logits(str(tmp_path / "merged")), logits(tuned))

    trainer = make_trainer(
        dense_arguments(
            prefix, "*-*-", *LLAMA, *RUN, "--peft", "lora", "--lora-rank", "4", "--lora-rank-pattern", "v_proj=2",
            "--load", tuned, "--train-iters", "2",
        )
    )  # fmt: skip
    model = trainer.model.eval()
    before, state = model.logits(TOKENS), {name: p.clone() for name, p in model.state_dict().items()}
    done = Merged(model)
    assert done.merged == 8 and not list(adapters(model))
    torch.testing.assert_close(model.logits(TOKENS), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.logits(TOKENS).argmax(-1), before.argmax(-1))
    done.undo()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(model.logits(TOKENS), before)


def experts_run(argv: list[str]) -> None:
    trainer = trainer_of(argv)
    perturb(trainer.model, trainer.ctx, 0.05)
    trainer.train()


def worst_error(base: str, adapter: str, whole: str) -> float:
    """Of the weights that a rank of tp 2 has once the adapter is merged in, against those of ``whole``."""
    ctx, path = ParallelContext.create(tp=2), find_checkpoint(base, ParallelContext.single())
    config = config_from_dict(read_meta(path)["config"])
    model = HybridModel(make_layer_context(config.model, ctx, dtype=torch.float64))
    main = MainParameters(model)
    load_checkpoint(path, main.entries(), ctx, allow_extra=("",))
    add_adapter(model, ctx, config, adapter, path)
    merged = open_source(whole)
    errors = [(p - spec.take_local(merged.read(spec.name), ctx)).abs().max() for spec, p in named_specs(model)]
    return float(max(errors))


def test_a_hybrid_is_saved_whole_from_any_layout_and_loaded_at_any(
    ranks: RankPool, prefix: str, tmp_path: Path
) -> None:
    """RWKV-7, attention, Mamba-2, experts: at tp 2 and pp 2 the files are those of one rank."""
    flags = arguments(prefix, *MODEL, *SIZES, *LORA, *RUN, "--fp64", "--global-batch-size", "4")
    layouts = {"one": (1, ()), "tp2": (2, ("--tp", "2", "--sp", "--zero", "1")), "pp2": (2, ("--pp", "2"))}
    tensors = {}
    for name, (world, layout) in layouts.items():
        ranks.run(world, experts_run, [*flags, *layout, "--micro-batch-size", "1", "--save", str(tmp_path / name)])
        export_peft(open_source(tmp_path / name), tmp_path / f"{name}-adapter")
        tensors[name] = AdapterFolder(tmp_path / f"{name}-adapter").pairs
    for name in ("tp2", "pp2"):
        assert tensors[name].keys() == tensors["one"].keys()
        for module, pair in tensors["one"].items():
            for ours, theirs in zip(tensors[name][module], pair, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=module)
    write_directory(MergedSource(open_source(tmp_path / "one")), tmp_path / "merged")
    write_directory(_Base(tmp_path / "one"), tmp_path / "base")
    paths = [str(tmp_path / name) for name in ("base", "one-adapter", "merged")]
    assert max(ranks.run(2, worst_error, *paths)) < 1e-14


class _Base(MergedSource):
    """A checkpoint without its adapters, not merged."""

    def __init__(self, path: Path) -> None:
        super().__init__(open_source(path))
        self._deltas = {}


def test_another_base_and_odd_files_are_refused(tuned: str, prefix: str, tmp_path: Path) -> None:
    base, other = str(Path(tuned).parent / "base"), str(tmp_path / "other")
    train([*dense_arguments(prefix, "*-*-", *LLAMA, *RUN), "--seed", "5", "--save", other])
    export_peft(open_source(tuned), tmp_path / "adapter")
    with pytest.raises(UserError, match="it was trained beside other weights"):
        load_trained_model(other, device="cpu", adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="has adapters of its own"):
        load_trained_model(tuned, device="cpu", adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="has no adapters of --peft lora"):
        export_peft(open_source(base), tmp_path / "no")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        AdapterFolder(tmp_path / "nowhere")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**said, "peft_type": "IA3"}))
    with pytest.raises(UserError, match="peft_type 'IA3': only LORA or ADALORA is read beside matrices"):
        AdapterFolder(tmp_path / "adapter")
    with pytest.raises(UserError, match="--peft lora in the checkpoint, none here; merge it first"):
        make_trainer([*dense_arguments(prefix, "*-*-", *LLAMA, *RUN), "--load", tuned, "--finetune"])
