"""The train step against a written-out one, and the loop's state."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.data.indexed_dataset import IndexedDatasetWriter
from megaforge.data.loader import Batch, GlobalBatchLoader
from megaforge.errors import UserError
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.losses import LossTerm
from megaforge.parallel.param_spec import named_specs
from megaforge.registry import OBJECTIVES
from megaforge.training.callbacks import Callback, Place
from megaforge.training.metrics import StepMetrics
from megaforge.training.objectives import NextToken
from megaforge.training.trainer import Trainer
from tests.data.datasets import labels_of
from tests.training.tiny import VOCAB, arguments, make_trainer, record, weights, write_dataset


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def uneven(batch: Batch, number: int) -> Batch:
    """The batch with another share of its labels masked in each micro-batch."""
    mask = batch.loss_mask.clone()
    mask[:, : 5 * number] = 0.0
    return Batch(batch.tokens, batch.labels, mask, batch.document_start)


def test_the_gradient_is_that_of_the_global_mean(prefix: str) -> None:
    """Micro-batches of unequal token counts: the mean is over the global batch's tokens, not a mean of means."""
    trainer = make_trainer(arguments(prefix, "--fp64", "--clip-grad", "0"))
    loader = GlobalBatchLoader(trainer.data, BatchSchedule(8), 2)
    batches = [uneven(batch, number) for number, batch in enumerate(next(iter(loader)))]
    whole = Batch(
        *(torch.cat([getattr(b, f) for b in batches]) for f in ("tokens", "labels", "loss_mask", "document_start"))
    )
    output = trainer.model(whole.tokens, whole.labels, whole.loss_mask, whole.document_start)
    cfg = trainer.config.model
    total = (
        output.loss_sum / whole.loss_mask.sum()
        + cfg.moe_aux_loss_coeff * output.terms["load_balance_loss"].sum / 8
        + cfg.moe_z_loss_coeff * output.terms["z_loss"].sum / (8 * 24)
    )
    parameters = [parameter for _, parameter in named_specs(trainer.model)]
    expected = torch.autograd.grad(total, parameters)
    metrics = trainer.train_step(batches)
    assert metrics.loss == pytest.approx((output.loss_sum / whole.loss_mask.sum()).item(), rel=1e-12)
    assert metrics.extra["z_loss"] == pytest.approx(output.terms["z_loss"].sum.item() / 192 / 2, rel=1e-12), (
        "a mean of 2"
    )
    assert metrics.grad_norm == pytest.approx(torch.stack([g.norm() for g in expected]).norm().item(), rel=1e-12)
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.main_grad, grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("micro", ["1", "8"])
def test_micro_batches_change_nothing(prefix: str, micro: str) -> None:
    one = make_trainer(arguments(prefix, "--fp64", "--train-iters", "3"))
    other = make_trainer(arguments(prefix, "--fp64", "--train-iters", "3", "--micro-batch-size", micro))
    records = record(one), record(other)
    one.train()
    other.train()
    for a, b in zip(records[0].records, records[1].records, strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-9)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=1e-8, atol=1e-10)


def test_records_count_from_one_and_the_rate_follows_the_schedule(prefix: str) -> None:
    trainer = make_trainer(arguments(prefix, "--train-iters", "4", "--lr-warmup-iters", "2"))
    recorder = record(trainer)
    trainer.train()
    assert [r["iteration"] for r in recorder.records] == [1, 2, 3, 4]
    assert [r["lr"] for r in recorder.records] == [trainer.schedule(i) for i in (1, 2, 3, 4)]
    assert [r["consumed_samples"] for r in recorder.records] == [8, 16, 24, 32]
    assert recorder.records[-1]["tokens"] == 32 * 24
    assert 0 < recorder.records[0]["expert_entropy_bits"] <= 2


def test_evaluation_counts_every_token_of_the_split_once(prefix: str) -> None:
    trainer = make_trainer(arguments(prefix, "--eval-iters", "1000", "--fp64"))
    metrics = trainer.evaluate()
    view = trainer.data.validation("valid")
    assert metrics.tokens == labels_of(view)
    nats = 0.0
    for k in range(len(view)):
        sample = view.sample(k)
        tokens = sample.tokens[None]
        logits = trainer.model.logits(tokens[:, :-1], sample.document_start[None, :-1])
        picked = logits.log_softmax(-1)[0].gather(-1, tokens[0, 1:, None])[: sample.targets]
        nats -= picked.sum().item()
    assert metrics.nats == pytest.approx(nats, rel=1e-10)
    assert metrics.loss == pytest.approx(nats / metrics.tokens)


def test_resuming_is_bit_identical(prefix: str, tmp_path: Path) -> None:
    """Weights, moments, records and the counters of early stopping, whatever the step it was cut at."""
    more = ("--eval-iters", "2", "--eval-interval", "2", "--train-iters", "6", "--bf16")
    whole = make_trainer(arguments(prefix, *more, "--early-stopping-patience", "9"))
    recorder = record(whole)
    whole.train()
    save = str(tmp_path / "run")
    first = make_trainer(arguments(prefix, *more, "--save", save, "--exit-interval", "4"))
    first.train()
    second = make_trainer(arguments(prefix, *more, "--save", save, "--load", save))
    resumed = record(second)
    assert second.iteration == 4
    judged = [[c.state() for c in t.callbacks if c.state_name] for t in (first, second)]
    assert judged[0] == judged[1] and judged[0][0]["best_iteration"] > 0
    second.train()
    expected = [r for r in recorder.records if r["iteration"] > 4]
    assert resumed.records == expected
    for (name, _, a), (_, _, b) in zip(whole.optimizer.entries(), second.optimizer.entries(), strict=True):
        assert torch.equal(a, b), name
    states = [[c.state() for c in t.callbacks if c.state_name] for t in (whole, second)]
    assert states[0] == states[1] and states[0][0]["best"] is not None


def test_a_batch_that_grows(prefix: str, tmp_path: Path) -> None:
    """The learning rate follows the steps, the counts the samples; a run that is cut within the ramp goes on, at other
    micro-batches too, and data that are begun anew do not begin the ramp anew."""
    ramp = ("--rampup-batch-size", "2", "2", "24", "--micro-batch-size", "1", "--lr-decay-style", "linear", "--fp64")
    whole = make_trainer(arguments(prefix, *ramp, "--train-iters", "8"))
    recorder = record(whole)
    whole.train()
    sizes = [2, 2, 2, 2, 4, 4, 6, 6]
    assert [r["global_batch_size"] for r in recorder.records] == sizes
    assert [r["consumed_samples"] for r in recorder.records] == np.cumsum(sizes).tolist()
    assert [r["tokens"] for r in recorder.records] == (24 * np.cumsum(sizes)).tolist()
    assert [r["lr"] for r in recorder.records] == [whole.schedule(i) for i in range(1, 9)]
    save = str(tmp_path / "run")
    make_trainer(arguments(prefix, *ramp, "--train-iters", "8", "--save", save, "--exit-interval", "5")).train()
    for more, rel in ((), 0), (("--micro-batch-size", "2"), 1e-9):
        rest = make_trainer(arguments(prefix, *ramp, *more, "--train-iters", "8", "--load", save))
        resumed = record(rest)
        rest.train()
        for ours, expected in zip(resumed.records, recorder.records[5:], strict=True):
            assert ours.pop("kind") == "step"
            assert ours == pytest.approx({name: expected[name] for name in ours}, rel=rel, abs=rel)
    anew = make_trainer(arguments(prefix, *ramp, "--train-iters", "8", "--load", save, "--reset-data"))
    resumed = record(anew)
    anew.train()
    assert [r["global_batch_size"] for r in resumed.records] == sizes[5:]
    assert [r["consumed_samples"] for r in resumed.records] == [16, 22, 28]


def test_an_objective_looks_as_far_ahead_as_it_asks(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class ThreeAhead(NextToken):
        look_ahead = 3

        def counts(self, batch: Batch) -> dict[str, float]:
            return super().counts(batch) | {"third": float(batch.later[1][1].sum())}

        def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
            labels, mask = batch.later[1]
            assert torch.equal(labels[:, :-2], batch.labels[:, 2:])
            return super().terms(output, batch) | {"third": LossTerm((labels * mask).sum(), "third", weight=0.0)}

    monkeypatch.setattr(OBJECTIVES, "_parts", dict(OBJECTIVES._parts))
    OBJECTIVES.register("three-ahead", ThreeAhead)
    flags = ("--train-iters", "2", "--eval-iters", "1", "--num-workers", "2")
    trainer = make_trainer(arguments(prefix, "--objective", "three-ahead", *flags))
    recorder = record(trainer)
    trainer.train()
    assert [r["kind"] for r in recorder.records] == ["step", "step", "evaluation"]
    windows = [GlobalBatchLoader(trainer.data, BatchSchedule(8), 8, 0, 1, first, look_ahead=3) for first in (0, 8)]
    expected = [next(iter(loader))[0].later[1][0].double().mean().item() for loader in windows]
    assert [r["third"] for r in recorder.records[:2]] == pytest.approx(expected)


def test_one_line_starts_a_run_and_continues_it(prefix: str, tmp_path: Path) -> None:
    save = str(tmp_path / "new")
    line = arguments(prefix, "--save", save, "--load", save, "--train-iters", "2", "--save-interval", "1")
    first = make_trainer(line)
    assert first.iteration == 0
    first.train()
    assert make_trainer(line).iteration == 2
    with pytest.raises(UserError, match="elsewhere: does not exist"):
        make_trainer(arguments(prefix, "--save", str(tmp_path / "other"), "--load", str(tmp_path / "elsewhere")))


def test_going_back_in_the_own_directory(prefix: str, tmp_path: Path) -> None:
    save = tmp_path / "run"
    line = arguments(prefix, "--save", str(save), "--save-interval", "1", "--lr-decay-style", "constant")
    make_trainer([*line, "--train-iters", "4", "--keep-last", "0"]).train()
    again = make_trainer([*line, "--train-iters", "3", "--keep-last", "2", "--load", str(save / "step_0000001")])
    assert again.iteration == 1
    again.train()
    names = {path.name for path in save.iterdir() if path.is_dir() or path.name == "latest"}
    assert names == {
        *("latest", "step_0000002", "step_0000003"),
        *(f"step_{step:07d}.abandoned" for step in (2, 3, 4)),
    }
    assert make_trainer([*line, "--train-iters", "3", "--load", str(save)]).iteration == 3


def test_finetuning_takes_the_weights_and_starts_anew(prefix: str, tmp_path: Path) -> None:
    save = str(tmp_path / "run")
    trained = make_trainer(arguments(prefix, "--save", save, "--train-iters", "2"))
    trained.train()
    tuned = make_trainer(arguments(prefix, "--load", save, "--finetune", "--seed", "9"))
    assert (tuned.iteration, tuned.consumed_samples) == (0, 0)
    for name, tensor in weights(trained).items():
        assert torch.equal(tensor, weights(tuned)[name]), name
    assert all(not moment.any() for _, _, moment in tuned.optimizer.state_entries())
    assert next(p for s, p in named_specs(tuned.model) if s.name == "embedding.weight").equal(
        weights(trained)["embedding.weight"]
    )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            ("--num-experts", "2", "--moe-router-topk", "1", "--moe-router-pre-softmax"),
            ("--num-experts", "--moe-router-topk", "--moe-router-pre-softmax"),
        ),
        (("--tokenizer-model", "70"), ("--vocab-size 62", "fingerprint")),
        (("--seed", "77"), ("--seed",)),
        (("--seq-length", "16"), ("--seq-length",)),
        (("--split", "70,30,0"), ("--split",)),
    ],
)
def test_a_different_run_is_refused_by_name(
    prefix: str, tmp_path: Path, change: tuple[str, ...], names: tuple[str, ...]
) -> None:
    save = str(tmp_path / "run")
    make_trainer(arguments(prefix, "--save", save, "--train-iters", "1")).train()
    with pytest.raises(UserError) as caught:
        make_trainer(arguments(prefix, "--load", save, *change))
    assert all(name in str(caught.value) for name in names), str(caught.value)


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(prefix: str) -> None:
    trainer = make_trainer(arguments(prefix))
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[0, 0] = float("nan")
    before = weights(trainer)
    with pytest.raises(UserError, match="iteration 1: the gradient norm is nan"):
        trainer.train()
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


def test_fp16_skips_an_overflow_and_halves_the_scale(prefix: str) -> None:
    flags = ("--fp16", "--initial-loss-scale", "1e30", "--hysteresis", "1", "--train-iters", "2")
    trainer = make_trainer(arguments(prefix, *flags))
    recorder, before = record(trainer), weights(trainer)
    trainer.train()
    assert [r["skipped"] for r in recorder.records] == [1.0, 1.0]
    assert [r["loss_scale"] for r in recorder.records] == [0.5e30, 0.25e30]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


class Events(Callback):
    """Notes what happens, and what the gradient is then; halves the learning rate of the third step."""

    place = Place.BEFORE

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.norms: list[float] = []

    def on_step_start(self, trainer: Trainer) -> None:
        self.seen.append(f"start {trainer.iteration + 1}")
        trainer.lr_factors["third"] = 0.5 if trainer.iteration == 2 else 1.0

    def on_gradients(self, trainer: Trainer) -> None:
        gradients = [p.main_grad.double().norm() for _, p in named_specs(trainer.model) if p.requires_grad]
        self.norms.append(math.hypot(*map(float, gradients)) / trainer.scaler.scale)
        self.seen.append("gradients")

    def on_update(self, trainer: Trainer) -> None:
        self.seen.append("update")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.seen.append(f"end {metrics.iteration}")
        metrics.extra["mine"] = 7.0


def test_callbacks_hear_each_part_of_a_step(prefix: str) -> None:
    scaling = ("--fp16", "--initial-loss-scale", "1e30", "--hysteresis", "1")
    for flags in ((), scaling):
        trainer = make_trainer(arguments(prefix, "--train-iters", "3", "--clip-grad", "0.1", *flags))
        recorder, events = record(trainer), Events()
        trainer.add(events)
        trainer.train()
        update = () if flags else ("update",)
        steps = [(f"start {step}", "gradients", *update, f"end {step}") for step in (1, 2, 3)]
        assert events.seen == [event for step in steps for event in step]
        assert [r["lr"] for r in recorder.records] == [1e-3, 1e-3, 5e-4]
        assert {r["mine"] for r in recorder.records} == {7.0}
        if not flags:
            assert events.norms == pytest.approx([r["grad_norm"] for r in recorder.records], rel=1e-6)


def test_a_run_without_a_loss_scale_continues_in_fp16_at_the_initial_one(prefix: str, tmp_path: Path) -> None:
    save = str(tmp_path / "run")
    make_trainer(arguments(prefix, "--save", save, "--train-iters", "1")).train()
    continued = make_trainer(arguments(prefix, "--load", save, "--fp16", "--initial-loss-scale", "4096"))
    assert (continued.iteration, continued.scaler.scale) == (1, 4096.0)


def test_the_loss_falls(prefix: str) -> None:
    trainer = make_trainer(arguments(prefix, "--train-iters", "30", "--lr", "5e-3"))
    recorder = record(trainer)
    trainer.train()
    assert recorder.records[0]["loss"] == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.15)
    assert recorder.records[-1]["loss"] < recorder.records[0]["loss"] - 0.5


def test_evaluation_drops_no_tokens(prefix: str) -> None:
    """A capacity is a matter of training: evaluating ignores it, and leaves every module in the mode it was in."""
    free, tight = (
        make_trainer(arguments(prefix, "--eval-iters", "2", *more))
        for more in ((), ("--moe-expert-capacity-factor", "0.3"))
    )
    tight.model.chunks[0].head.eval()
    assert tight.evaluate() == free.evaluate()
    assert tight.model.training and not tight.model.chunks[0].head.training
    batches = next(iter(tight._loader(tight.data, tight.batches)))
    assert tight.train_step(batches).loss != free.train_step(batches).loss, "the capacity is tight"


def test_an_evaluation_with_nothing_to_predict_says_so(tmp_path: Path) -> None:
    """The split has labels, and the samples that this evaluation reads have none."""
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for length in [9] * 80 + [1] * 300 + [9]:
            writer.add_document(np.arange(length))
    split = ("--split", "80,301,0", "--split-order", "sequential")
    flags = ("--eod-mask-loss", "--eval-iters", "1", "--seq-length", "8")
    trainer = make_trainer(arguments(str(tmp_path / "d"), *split, *flags))
    with pytest.raises(UserError, match="--eval-iters 1: there is nothing to predict"):
        trainer.evaluate()


def test_mock_data_need_no_files_and_go_on_exactly(tmp_path: Path) -> None:
    flags = [*arguments("unused", "--mock-data", "--eval-iters", "1", "--save", str(tmp_path / "run"))]
    with pytest.raises(UserError, match="--mock-data and --data-path unused exclude each other"):
        make_trainer(flags)
    at = flags.index("--data-path")
    del flags[at : at + 2]
    whole, first = make_trainer(flags), make_trainer([*flags, "--exit-interval", "3"])
    assert whole.evaluate().loss == pytest.approx(np.log(VOCAB + 1), abs=0.1)
    recorder = record(whole)
    first.train()
    second = make_trainer([*flags, "--load", str(tmp_path / "run")])
    resumed = record(second)
    second.train()
    whole.train()
    assert resumed.records == [r for r in recorder.records if r["iteration"] > 3]


def test_a_run_goes_on_with_the_vocabulary_of_its_checkpoint(prefix: str, tmp_path: Path) -> None:
    """Presets once had vocabularies of their own, which the tokenizer's replaces now."""
    save = str(tmp_path / "run")
    make_trainer(arguments(prefix, "--vocab-size", "300", "--save", save, "--train-iters", "1")).train()
    trainer = make_trainer(arguments(prefix, "--save", save, "--load", save))
    assert (trainer.config.model.vocab_size, trainer.iteration) == (300, 1)
    with pytest.raises(UserError, match="--vocab-size 300 in the checkpoint, 62 here"):
        make_trainer(arguments(prefix, "--load", save, "--vocab-size", "62"))


def test_evaluations_may_have_batches_of_their_own(tmp_path: Path) -> None:
    """One batch of 16 sequences reads what two of 8 do."""
    prefix = write_dataset(tmp_path / "train_text_document")
    twice = make_trainer(arguments(prefix, "--eval-iters", "2")).evaluate()
    once = make_trainer(arguments(prefix, "--eval-iters", "1", "--eval-global-batch-size", "16")).evaluate()
    assert (once.tokens, once.correct) == (twice.tokens, twice.correct) and once.nats == pytest.approx(twice.nats)
    with pytest.raises(UserError, match="--eval-global-batch-size 5 is not divisible .* use .*4 or 6"):
        make_trainer(arguments(prefix, "--eval-iters", "1", "--eval-global-batch-size", "5"))


def test_another_number_of_ranks_is_refused_where_one_is_named(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    make_trainer(arguments(prefix, "--world-size", "1"))
    with pytest.raises(UserError, match="--world-size 4: 1 rank was started"):
        make_trainer(arguments(prefix, "--world-size", "4"))
