"""The engine on its own, objectives other than the usual one, and how often the host waits for the device."""

from __future__ import annotations

import gc
import itertools
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import megaforge.device
from megaforge.data.loader import Batch
from megaforge.errors import UserError
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.losses import LossTerm
from megaforge.parallel.linear_op import PlainLinear
from megaforge.parallel.param_spec import named_specs
from megaforge.training.callbacks import MetricsWriter
from megaforge.training.objectives import NextToken, Objective, WithTerms
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, dense_arguments, make_trainer, record, weights, write_dataset


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def global_batches(trainer: Trainer) -> Iterator[list[Batch]]:
    return iter(trainer._loader(trainer.data, trainer.batches, 0))


def test_a_loop_of_ones_own_is_the_trainers(prefix: str) -> None:
    trainer, other = (make_trainer(arguments(prefix, "--train-iters", "3")) for _ in range(2))
    engine, losses = other.engine, []
    for iteration, batches in enumerate(itertools.islice(global_batches(other), 3), 1):
        engine.zero_grad()
        sums = engine.forward_backward(batches, other.objective)
        engine.reduce_gradients()
        norm, _ = engine.clip(1.0, sums)
        assert engine.update(other.schedule(iteration), norm, sums)
        losses.append(sums.means()["loss"])
    assert losses == [trainer.train_step(batches).loss for batches in itertools.islice(global_batches(trainer), 3)]
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, weights(other)[name]), name


class Asked(PlainLinear):
    """The head's op, which counts how often it forms logits."""

    products = 0

    def forward(self, *args: Any) -> Tensor:
        self.products += 1
        return super().forward(*args)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_head_forms_logits_once_where_the_loss_is_their_sum(prefix: str, at_once: bool) -> None:
    trainer = make_trainer(dense_arguments(prefix, "R-*-"))
    trainer.model.head.op = op = Asked()
    trainer.objective.takes_loss_sum = at_once
    batches = next(global_batches(trainer))
    trainer.train_step(batches)
    assert op.products == len(batches) * (1 if at_once else 2)


class Surprise(NextToken):
    """Log-probabilities of every third label, which is a count of its own, with a term that is only reported."""

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"thirds": float(batch.loss_mask[:, ::3].sum())}

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        chosen = (output.log_probs_SB * output.mask_SB)[::3]
        return {
            "loss": LossTerm(-chosen.sum(), "thirds", weight=2.0),
            "longest": LossTerm((chosen**3).sum(), "tokens", weight=0.0),
        }


def test_an_objective_reads_log_probabilities_and_counts_for_itself(prefix: str) -> None:
    trainer = make_trainer(dense_arguments(prefix, "R-*-", "--fp64", "--clip-grad", "0"))
    trainer.objective = Surprise(trainer.config)
    batches = next(global_batches(trainer))
    fields = [torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "labels", "loss_mask")]
    logits = trainer.model.logits(fields[0], torch.cat([b.document_start for b in batches]))
    scores = logits.log_softmax(-1).gather(-1, fields[1][:, :, None])[:, :, 0]
    chosen = (scores * fields[2])[:, ::3]
    value = -chosen.sum() / fields[2][:, ::3].sum()
    parameters = [parameter for _, parameter in named_specs(trainer.model)]
    expected = torch.autograd.grad(2 * value, parameters)
    metrics = trainer.train_step(batches)
    assert metrics.loss == pytest.approx(float(value.detach()), rel=1e-12)
    assert metrics.extra["longest"] == pytest.approx(float((chosen.detach() ** 3).sum()) / (8 * 24), rel=1e-12)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.main_grad, gradient, rtol=1e-9, atol=1e-13)


@dataclass
class Wrong:
    """Gives these terms, by this count; not hashable, as a dataclass is not by itself."""

    names: tuple[str, ...]
    by: str = "labels"
    counted: str = "labels"
    look_ahead: int = 1

    def counts(self, batch: Batch) -> dict[str, float]:
        return {self.counted: 1.0}

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        return {name: LossTerm(output.loss_sum, self.by) for name in self.names}


def added(output: ModelOutput) -> LossTerm:
    return LossTerm(output.loss_sum, "labels")


NO_PLACE: list[tuple[Objective, str]] = [
    (Wrong(("mine",)), "the objective Wrong gives no loss term called 'loss'"),
    (Wrong(("loss", "z_loss")), "the objective's loss term 'z_loss' has the name of one that a layer makes"),
    (Wrong(("loss",), "dozens"), "'loss' is divided by 'dozens', .* counts are labels, sequences, tokens"),
    (WithTerms(Wrong(("loss", "mine")), {"mine": added}), "--loss-terms mine: the objective has a term of this name"),
]


def refused(argv: list[str]) -> list[str]:
    """What a rank is told of each objective, and of one that changes."""
    trainer = trainer_of(argv)
    batches, told = next(global_batches(trainer)), list[str]()
    changing = Wrong(("loss",))
    step(trainer, batches, changing)
    changing.names = ("loss", "later")
    for objective in (*(objective for objective, _ in NO_PLACE), changing):
        with pytest.raises(UserError) as caught:
            step(trainer, batches, objective)
        told.append(str(caught.value))
    return told


def step(trainer: Trainer, batches: list[Batch], objective: Objective) -> None:
    trainer.engine.zero_grad()
    sums = trainer.engine.forward_backward(batches, objective)
    trainer.engine.reduce_gradients()
    trainer.engine.clip(1.0, sums)


@pytest.mark.parametrize("more", [(), ("--pp", "2"), ("--pp", "2", "--pipeline-schedule", "zb-h1")])
def test_every_rank_refuses_terms_without_a_place(ranks: RankPool, prefix: str, more: tuple[str, ...]) -> None:
    """Those without the head see nothing wrong by themselves, and must not be left waiting."""
    argv = arguments(prefix, *more)
    [told, *others] = ranks.run(2, refused, argv) if more else [refused(argv)]
    assert all(other == told for other in others)
    for text, complaint in zip(told, [*(text for _, text in NO_PLACE), "'later', by 'labels', was not"], strict=True):
        assert re.search(complaint, text)


def test_a_count_of_ones_own_has_a_name_of_its_own(prefix: str) -> None:
    trainer = make_trainer(arguments(prefix))
    for name in ("tokens", "sequences"):
        with pytest.raises(UserError, match=f"Wrong has a count '{name}'.*another name"):
            trainer.engine.forward_backward(next(global_batches(trainer)), Wrong(("loss",), counted=name))


def test_an_engine_keeps_nothing_of_objectives_that_are_gone(prefix: str) -> None:
    trainer = make_trainer(dense_arguments(prefix, "R-*-"))
    batches = next(global_batches(trainer))
    kept = Wrong(("loss",))
    for objective in (kept, Wrong(("loss",))):
        step(trainer, batches, objective)
    del objective
    gc.collect()
    assert list(trainer.engine._terms) == [kept]


@dataclass(slots=True)
class Slotted:
    """An objective to which Python makes no weak reference."""

    look_ahead: int = 1

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"labels": float(batch.loss_mask.sum())}

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        return {"loss": LossTerm(output.loss_sum, "labels")}


def test_an_objective_may_have_slots(prefix: str) -> None:
    trainer, plain = (make_trainer(dense_arguments(prefix, "R-*-")) for _ in range(2))
    trainer.objective = Slotted()
    batches = next(global_batches(trainer))
    for _ in range(2):
        assert trainer.train_step(batches).loss == plain.train_step(batches).loss
    step(trainer, batches, Slotted())  # another one that is equal is not the same
    assert len(trainer.engine._terms) == 2


def test_nothing_that_counts_is_no_loss(prefix: str) -> None:
    trainer = make_trainer(dense_arguments(prefix, "R-*-"))
    batches = [Batch(**{**vars(b), "loss_mask": torch.zeros_like(b.loss_mask)}) for b in next(global_batches(trainer))]
    metrics = trainer.train_step(batches)
    assert metrics.loss == metrics.grad_norm == 0.0


class Waits(TorchDispatchMode):
    """Notes where the host would wait for the device, if all tensors but the batches lay on one.

    Host tensors are the batches and what is computed of nothing else.
    """

    READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.places: list[str] = []
        self.host = WeakIdKeyDictionary()
        for field in tree_leaves([vars(batch) for batch in batches]):
            if isinstance(field, Tensor):
                self.host[field] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_host = bool(read) and all(tensor in self.host for tensor in read)
        if func.overloadpacket in self.READS and not on_host:
            self.note()
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if on_host and isinstance(leaf, Tensor):
                self.host[leaf] = True
        return out

    def note(self) -> None:
        frames = [frame.filename for frame in traceback.extract_stack() if "/megaforge/" in frame.filename]
        self.places.append(frames[-1].rpartition("/megaforge/")[2])

    def upload(self, tensor: Tensor, device: torch.device) -> Tensor:
        there = tensor.clone()
        self.host.pop(there, None)
        return there

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts also what no dispatch sees on a CPU."""
        tolist = Tensor.tolist

        def noted(tensor: Tensor) -> Any:
            if tensor not in self.host:
                self.note()
            return tolist(tensor)

        uploading = [m for m in list(sys.modules.values()) if getattr(m, "upload", None) is megaforge.device.upload]
        with ExitStack() as stack:
            for module in uploading:
                stack.enter_context(mock.patch.object(module, "upload", self.upload))
            stack.enter_context(mock.patch.object(Tensor, "tolist", noted))
            stack.enter_context(mock.patch("megaforge.device.synchronize", lambda device: self.note()))
            stack.enter_context(self)
            yield


@pytest.mark.parametrize("experts", [False, True])
def test_a_step_waits_for_the_device_once(prefix: str, experts: bool) -> None:
    flags = ("--log-interval", "1000", "--train-iters", "9", "--bf16")
    line = arguments(prefix, *flags) if experts else dense_arguments(prefix, "R-*-", *flags)
    trainer = make_trainer([*line, "--moe-router-load-balancing-type", "global_aux_loss"] if experts else line)
    record(trainer)
    [writer] = [callback for callback in trainer.callbacks if isinstance(callback, MetricsWriter)]
    first, second = itertools.islice(global_batches(trainer), 2)
    trainer.train_step(first)
    waits = Waits(second)
    with waits.watching():
        writer.on_step_end(trainer, trainer._timed_step(iter([second])))
    # Experts' products on a CPU read how many rows each has; those of a GPU do not.
    assert [place for place in waits.places if not place.startswith("kernels/")] == ["training/batch_sums.py"]


class Retold(NextToken):
    """Learns from other sequences than those that were read: shorter ones, more of them, with weights of its own."""

    def experience(self, trainer: Trainer, batches: Any) -> list[Batch]:
        self.looked = trainer.engine.observe(batches, lambda output, batch: float(output.loss_sum.detach()))
        return [self._retold(batch, len(batches), trainer.ctx.dp.size) for batch in batches]

    def _retold(self, batch: Batch, count: int, ranks: int) -> Batch:
        rows = {name: torch.cat(getattr(batch, name).split(12, 1)) for name in ("tokens", "labels", "document_start")}
        mask = torch.zeros_like(rows["tokens"], dtype=torch.float32)
        mask[:, 3] = 1
        tokens = mask.numel() * count * ranks
        return replace(batch, **rows, loss_mask=mask, tokens_of=tokens, extras={"weight": 2 * mask})

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"weights": float(batch.extras["weight"].sum())}

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        assert output.info is not None
        weight = output.info.local(batch.extras["weight"]).t()
        summed = (output.losses_SB * weight).sum()
        return {
            "loss": LossTerm(summed, "weights"),
            "tokens_seen": LossTerm(weight.new_tensor(weight.numel()), "tokens"),
        }


def retold(argv: list[str]) -> tuple[list[dict[str, Any]], int]:
    trainer = trainer_of(argv)
    trainer.objective = WithTerms(Retold(trainer.config), {})
    recorder = record(trainer)
    trainer.train()
    return recorder.records, trainer.consumed_samples


def test_an_objective_may_learn_from_other_sequences_than_were_read(ranks: RankPool, prefix: str) -> None:
    argv = dense_arguments(prefix, "R-*-", "--fp64", "--train-iters", "2")
    expected, consumed = retold(argv)
    assert consumed == 16 and all(one["tokens_seen"] == 1 for one in expected)
    for layout in (("--pp", "2"), ("--cp", "2")):
        for found, samples in ranks.run(4, retold, [*argv, *layout]):
            assert samples == 16
            for ours, theirs in zip(found, expected, strict=True):
                assert {n: ours[n] for n in ("loss", "grad_norm", "tokens_seen")} == pytest.approx(
                    {n: theirs[n] for n in ("loss", "grad_norm", "tokens_seen")}, rel=1e-10
                )


def test_looking_tells_of_each_micro_batch_in_order(prefix: str) -> None:
    trainer = make_trainer(dense_arguments(prefix, "R-*-", "--train-iters", "1"))
    batches = next(global_batches(trainer))
    told = trainer.engine.observe(
        batches, lambda output, batch: (batch.samples.tolist(), output.losses_SB.requires_grad)
    )
    assert told == [(batch.samples.tolist(), False) for batch in batches]


def test_what_an_objective_adds_is_cut_with_its_rows(prefix: str) -> None:
    trainer = make_trainer(dense_arguments(prefix, "R-*-", "--train-iters", "1"))
    batch = replace(next(global_batches(trainer))[0], extras={"rows": torch.tensor([[1.0], [2.0]])})
    trainer.micro_batches.parts = 2
    assert [piece.extras["rows"].tolist() for piece in trainer.micro_batches.cut([batch])] == [[[1.0]], [[2.0]]]
