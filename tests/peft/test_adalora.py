"""AdaLoRA: against peft's own model and its RankAllocator over a whole run, at every layout, resumed, in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.checkpoint.adapter_files import AdapterFolder, MergedSource, export_peft
from megaforge.checkpoint.convert import write_directory
from megaforge.checkpoint.export_hf import export_hf
from megaforge.checkpoint.sources import open_source
from megaforge.config.adalora_config import AdaLoraConfig
from megaforge.data.loader import Batch
from megaforge.errors import UserError
from megaforge.parallel.param_spec import named_specs
from megaforge.training.callbacks import Callback
from megaforge.training.trainer import Trainer
from megaforge.training.triplets import Budget, Triplets
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, observed, trainer_of
from tests.peft.test_adapter_files import LLAMA, TOKENS, logits
from tests.peft.test_lora import MODEL, SHORT, SIZES
from tests.training.tiny import arguments, dense_arguments, make_trainer, record, write_dataset

ADALORA = ("--peft", "adalora", "--lora-rank", "4", "--lora-alpha", "8", "--adalora-target-rank", "2")
PATTERN = ("--lora-rank-pattern", "qkv.v=3", "moe=3")
STEPS = 8
RUN = ("--train-iters", str(STEPS), "--fp64", "--lr", "2e-2", "--lr-decay-style", "constant", "--optimizer", "adam")
RUN = (*RUN, "--weight-decay", "0", "--clip-grad", "0.5", "--lora-dropout", "0", "--adalora-interval", "2")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


class Seen(Callback):
    """The batches of a run, and its adapters at the beginning and after each step."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.adapters: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer) -> None:
        self._look(trainer)
        forward_backward = trainer.engine.forward_backward

        def seeing(batches: Any, objective: Any) -> Any:
            self.batches += batches
            return forward_backward(batches, objective)

        trainer.engine.forward_backward = seeing  # type: ignore[method-assign]

    def on_step_end(self, trainer: Trainer, metrics: Any) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        named = named_specs(trainer.model)
        self.adapters.append({spec.name: p.detach().clone() for spec, p in named if ".lora." in spec.name})


@pytest.fixture(scope="module")
def ran(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen, list[dict[str, Any]]]:
    """A base with noise on it, and AdaLoRA of it: the folder of both, what was seen of the run, and its records."""
    folder = tmp_path_factory.mktemp("runs")
    model = dense_arguments(prefix, "*-*-", *LLAMA, "--fp64", "--micro-batch-size", "2", "--global-batch-size", "2")
    base = trainer_of([*model, "--train-iters", "1", "--lr", "1e-2", "--save", str(folder / "base")])
    observed(base)
    argv = [*model, *RUN, *ADALORA, "--pretrained-checkpoint", str(folder / "base"), "--save", str(folder / "tuned")]
    trainer, seen = make_trainer(argv), Seen()
    trainer.add(seen)
    recorder = record(trainer)
    trainer.train()
    return folder, seen, recorder.records


def names_there(module: str) -> tuple[str, str]:
    """The layer of ours and the part in it that a module of the exported model is."""
    _, _, number, _, name = module.split(".")
    path, part = {
        "q_proj": ("mixer.qkv", "q_"), "k_proj": ("mixer.qkv", "k_"), "v_proj": ("mixer.qkv", "v_"),
        "o_proj": ("mixer.output", ""), "gate_proj": ("ffn.up", "gate_"), "up_proj": ("ffn.up", "up_"),
        "down_proj": ("ffn.down", ""),
    }[name]  # fmt: skip
    return f"layers.{number}.{path}.lora", part


def test_a_run_is_that_of_peft(ran: tuple[Path, Seen, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Every factor after every step, with peft's layers, its penalty, its RankAllocator and torch's AdamW."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder, seen, records = ran
    export_hf(open_source(folder / "base"), tmp_path / "hf")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=2, lora_alpha=8, total_step=STEPS, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).double().train()
    theirs = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            path, part = names_there(module)
            theirs[f"{path}.{part}{rest[0]}"] = parameter
    assert theirs.keys() == seen.adapters[0].keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(seen.adapters[0][name])
    optimizer = torch.optim.AdamW(theirs.values(), lr=2e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    for step, batch in enumerate(seen.batches, start=1):
        out = model(input_ids=batch.tokens, labels=batch.tokens)  # the labels only bring the penalty into its loss
        penalty = out.loss - base(input_ids=batch.tokens, labels=batch.tokens).loss
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        (loss + penalty).backward()
        assert records[step - 1]["loss"] == pytest.approx(loss.item(), rel=1e-6), step
        assert records[step - 1]["orthogonality_penalty"] == pytest.approx(penalty.item(), rel=1e-5), step
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        for name, parameter in theirs.items():
            torch.testing.assert_close(
                seen.adapters[step][name],
                parameter.detach(),
                rtol=1e-5,
                atol=1e-6,
                msg=f"{step} {name}",
            )
    ranks = [sum(int((t != 0).sum()) for name, t in one.items() if name.endswith("E")) for one in seen.adapters]
    assert ranks == [0, 56, *ranks[2:6], 28, 28, 28] and records[-1]["adapter_ranks"] == 28
    assert [record["adapter_ranks"] for record in records[:6]] == sorted(
        (record["adapter_ranks"] for record in records[:6]), reverse=True
    )


def test_files_are_those_of_peft(ran: tuple[Path, Seen, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Read by peft, which computes the same; written by it and read back; merged."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder, _, _ = ran
    tuned, base = str(folder / "tuned"), str(folder / "base")
    export_hf(open_source(base), tmp_path / "hf")
    assert export_peft(open_source(tuned), tmp_path / "adapter") == 14
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    alone = hf(TOKENS).logits.detach().clone()
    model = peft.PeftModel.from_pretrained(hf, str(tmp_path / "adapter"), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        theirs = model(TOKENS).logits
    assert (theirs - alone).abs().max() > 1e-2
    torch.testing.assert_close(logits(tuned).double(), theirs, rtol=0, atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    for adapter in ("adapter", "again"):
        torch.testing.assert_close(
            logits(base, adapter=str(tmp_path / adapter)).double(), theirs, rtol=0, atol=1e-5, msg=adapter
        )
    write_directory(MergedSource(open_source(tuned)), tmp_path / "merged")
    torch.testing.assert_close(logits(str(tmp_path / "merged")), logits(tuned), rtol=0, atol=1e-6)


def hybrid(prefix: str, *more: str) -> list[str]:
    """RWKV-7, attention, Mamba-2 and experts; ranks are chosen after steps 2 and 3, and stay after 4."""
    lasting = ("--train-iters", "4", "--lr-decay-style", "constant")
    return arguments(prefix, *MODEL, *SIZES, *SHORT, *ADALORA, *PATTERN, *lasting, *more)


def train(argv: list[str]) -> dict[str, Any]:
    """What is observed of a run, singular values apart: those of a whole matrix may be zero."""
    found = observed(trainer_of(argv))
    found["values"] = {name: w for name, w in found["weights"].items() if name.endswith("E")}
    found["weights"] = {name: w for name, w in found["weights"].items() if name not in found["values"]}
    return found


@pytest.fixture(scope="module")
def one_rank(prefix: str) -> dict[str, Any]:
    return train(hybrid(prefix))


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (4, ("--tp", "4", "--sp", "--etp", "2", "--ep", "2")),
        (4, ("--tp", "2", "--sp", "--ep", "2", "--zero", "1", "--recompute", "full")),
        (4, ("--tp", "2", "--pp", "2", "--zero", "2")),
        (2, ("--cp", "2", "--zero", "2")),
        (2, ("--pp", "2", "--pipeline-schedule", "zb-h1")),
    ],
    ids=lambda value: "".join(value) if isinstance(value, tuple) else "",
)
def test_the_layout_changes_nothing(
    ranks: RankPool, prefix: str, one_rank: dict[str, Any], world: int, layout: tuple[str, ...]
) -> None:
    """Loss, every gradient, every update, and which ranks remain."""
    found = ranks.run(world, train, hybrid(prefix, *layout))
    compare(found, one_rank, 1e-10)
    for name, values in ((name, values) for rank in found for name, values in rank["values"].items()):
        torch.testing.assert_close(values, one_rank["values"][name], rtol=1e-10, atol=1e-14, msg=name)
    kept = sum(int((values != 0).sum()) for values in one_rank["values"].values())
    assert kept == one_rank["records"][3]["adapter_ranks"] < one_rank["records"][0]["adapter_ranks"]


def test_a_resumed_run_is_the_run(prefix: str, tmp_path: Path) -> None:
    flags = [*hybrid(prefix), "--adalora-beta1", "0.5", "--save-interval", "2"]
    whole = make_trainer([*flags, "--save", str(tmp_path / "whole")])
    whole.train()
    make_trainer([*flags, "--save", str(tmp_path / "parts"), "--exit-interval", "2"]).train()
    rest = make_trainer([*flags, "--save", str(tmp_path / "parts"), "--load", str(tmp_path / "parts")])
    assert rest.iteration == 2
    rest.train()
    assert all(torch.equal(value, rest.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


def test_the_budget_and_ties(prefix: str) -> None:
    """Against RankAllocator's schedule, without its first step (0 of 0); of equal ones the first remain."""
    allocator = pytest.importorskip("peft.tuners.adalora.layer").RankAllocator.__new__(
        pytest.importorskip("peft.tuners.adalora.layer").RankAllocator
    )
    flags = AdaLoraConfig(adalora_interval=3, adalora_target_rank=2)
    budget = Budget.of(flags, [12, 4, 1], 50)
    assert budget == Budget(17, 5, 5, 35, 3)
    allocator.init_bgt, allocator.target_bgt = 17, 5
    allocator.peft_config = type("Config", (), {"tinit": 5, "tfinal": 15, "total_step": 50, "deltaT": 3})
    for step in range(1, 51):
        count, chooses = allocator.budget_schedule(step)
        assert budget.at(step) == count
        assert budget.chooses(step) == (step == 35 or (chooses and step < 35))
    trainer = make_trainer(hybrid(prefix))
    triplets = Triplets(trainer.model, trainer.optimizer.main, trainer.ctx)
    triplets.choose(5)
    assert triplets.kept.tolist() == [1.0] * 5 + [0.0] * (len(triplets.kept) - 5)


def test_lora_begins_with_adalora_and_the_other_way_round(
    ran: tuple[Path, Seen, list[dict[str, Any]]], prefix: str, tmp_path: Path
) -> None:
    """``--peft-from``: a folder's triplets have a rank each; what AdaLoRA has between A and B is in A of LoRA."""
    folder, _, _ = ran
    export_peft(open_source(folder / "tuned"), tmp_path / "adapter")
    pairs = AdapterFolder(tmp_path / "adapter").pairs
    base = ("--pretrained-checkpoint", str(folder / "base"), "--peft-from", str(tmp_path / "adapter"))
    model = dense_arguments(prefix, "*-*-", *LLAMA, "--fp64", "--train-iters", "1", "--lr", "1e-30")
    kept = [".".join(names_there(name)).replace(".lora", "").rstrip("_.") for name in pairs]
    ranks = [f"{name}={len(pair.first)}" for name, pair in zip(kept, pairs.values(), strict=True)]
    lora = ("--peft", "lora", "--lora-alpha", "8", "--lora-rank-pattern", *ranks, "--peft-targets", *kept)
    expected = logits(str(folder / "tuned")).double()
    begun = make_trainer([*model, *lora, *base, "--save", str(tmp_path / "lora")])
    with torch.no_grad():
        torch.testing.assert_close(begun.model.logits(TOKENS), expected, rtol=0, atol=1e-6)
    begun.train()
    export_peft(open_source(tmp_path / "lora"), tmp_path / "of_lora")
    back = ("--peft", "adalora", "--adalora-target-rank", "2", "--train-iters", "4")
    back = (*lora, *base, *back, "--peft-from", str(tmp_path / "of_lora"))
    with torch.no_grad():
        torch.testing.assert_close(make_trainer([*model, *back]).model.logits(TOKENS), expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"has rank \d there, 7 here"):
        make_trainer([*model, *back, "--lora-rank-pattern", "all-linear=7"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--adalora-target-rank", "5"), "ranks shrink to --adalora-target-rank: use at most --lora-rank"),
        (("--adalora-warmup-fraction", "0.8"), "leave no step between them; use a sum below 1"),
        (("--train-iters", "1"), "--train-iters 1: --peft adalora has no step between the first 1 and the final 0"),
        (("--use-rslora",), "--use-rslora"),
    ],
)
def test_bad_input_is_named(prefix: str, more: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_trainer(hybrid(prefix, *more))
