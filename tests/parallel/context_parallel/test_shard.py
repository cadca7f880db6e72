"""Sequences shared by the ranks of cp: models trained at cp x tp x sp against one rank, with every kind of document.

Compared on every rank: loss, router statistics, every gradient, the gradient norm and every weight after the steps,
with the real reducer, clip and AdamW. Every sequence of the batch has another set of documents: one, ends at the
borders of the chunks, ends next to them, and documents that span several chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.config.check_layout import with_tokenizer_vocab
from megaforge.config.cli import parse_config
from megaforge.config.model_config import ModelConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.models.hybrid import HybridModel
from megaforge.models.prepared_run import check_run
from megaforge.optim import Optimizer
from megaforge.optim.clip import clip_gradients
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.context_parallel.shard import ContextParallelShard, ring
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.mappings import reduce_from_tensor_parallel
from megaforge.parallel.param_spec import named_specs
from megaforge.training.setup import build_trainer
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_model_parity import SMALL, whole
from tests.training.tiny import VOCAB, arguments, record, write_dataset

LENGTH, STEPS = 48, 2
NOISE, LEARNING_RATE = 0.05, 1e-3
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
# Where documents begin, one line a sequence. The chunks are 12 tokens long at cp 2 and 6 at cp 4.
PACKED = ((), (6, 12, 18, 24, 30, 36, 42), (5, 7, 11, 13, 23, 25, 35, 37, 47), (3, 40))
ALONE = ((),) * 4

CASES = {
    "attention": {"hybrid_layer_pattern": "*-*-", "activation": "swiglu", "num_query_groups": 2},
    "RWKV-7": {
        "hybrid_layer_pattern": "R-R-",
        "normalization": "layernorm",
        "untie_embeddings_and_output_weights": True,
    },
    "experts": {"hybrid_layer_pattern": "RE*E", "activation": "swiglu"},
    "hybrid": {"hybrid_layer_pattern": "RE*-", "rotary_percent": 0.5},
}


@dataclass(frozen=True)
class Shape:
    """A layout: dp is what the other sizes leave of the ranks."""

    world: int
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    comm_type: str = "allgather"


ONE = Shape(1)
SHAPES = (Shape(4, cp=4), Shape(4, 2, 2, True))


@dataclass
class Outcome:
    """What a run gave: numbers of every step, and global tensors by parameter name."""

    numbers: dict[str, float]
    experts: list[Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def global_batch(vocab: int, documents: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """Tokens, labels, uneven loss mask and document starts, each [b, s]."""
    generator = torch.Generator().manual_seed(3)
    batch = len(documents)
    ids = torch.randint(0, vocab, (batch, LENGTH + 1), generator=generator)
    # The mask is uneven over sequences and over chunks.
    likely = torch.linspace(0.2, 1, batch)[:, None] * torch.linspace(1, 0.3, LENGTH)
    mask = (torch.rand(batch, LENGTH, generator=generator) < likely).float()
    start = torch.zeros(batch, LENGTH, dtype=torch.bool)
    for row, places in enumerate(documents):
        start[row, list(places)] = True
    return ids[:, :-1], ids[:, 1:], mask, start


def train(case: str, shape: Shape, dtype: torch.dtype, documents: tuple[tuple[int, ...], ...]) -> Outcome:
    """Some steps, two micro-batches a dp rank."""
    ctx = ParallelContext.create(tp=shape.tp, cp=shape.cp)
    cfg = ModelConfig(**{**SMALL, **CASES[case]})  # type: ignore[arg-type]
    model = HybridModel(
        make_layer_context(
            cfg, ctx, sequence_parallel=shape.sequence_parallel, dtype=dtype, cp_comm_type=shape.comm_type
        )
    )
    initialize_parameters(model, ctx, seed=5)
    perturb(model, ctx, NOISE)
    reducer = GradientReducer(model, ctx, bucket_size=5000)
    optimizer = Optimizer(OptimizerConfig(lr=LEARNING_RATE), model, ctx)
    batch = global_batch(cfg.vocab_size or 0, documents)
    tokens, sequences = float(batch[2].sum()), len(documents)
    own = [part.chunk(ctx.dp.size)[ctx.dp.rank].chunk(2) for part in batch]
    outcome = Outcome({}, [], {}, {})
    for step in range(STEPS):
        reducer.zero_grad()
        sums = torch.zeros(4, dtype=torch.float64)
        experts = torch.zeros(cfg.hybrid_layer_pattern.count("E"), cfg.num_experts, dtype=torch.int64)  # type: ignore[union-attr]
        for number, micro in enumerate(zip(*own, strict=True)):
            reducer.set_last_microbatch(number == 1)
            out = model(*micro)
            zero = torch.zeros(())
            balance, z = (out.terms[name].sum if out.terms else zero for name in ("load_balance_loss", "z_loss"))
            parts = (out.loss_sum, balance, z, out.correct)
            loss = out.loss_sum / tokens + cfg.moe_aux_loss_coeff * balance / sequences
            loss = loss + cfg.moe_z_loss_coeff * z / (sequences * LENGTH)
            loss.backward()
            sums += torch.stack([part.detach().double() for part in parts])
            if len(experts):  # a model without experts counts none
                experts += out.experts[0]
        reducer.finish_grad_sync()
        totals = reduce_from_tensor_parallel(sums, ctx.dp_cp).tolist()
        names = ("loss", "load balance", "z-loss", "correct")
        outcome.numbers |= {f"{name} {step}": value for name, value in zip(names, totals, strict=True)}
        outcome.experts.append(reduce_from_tensor_parallel(experts, ctx.dp_cp))
        if step == 0:
            outcome.gradients = {s.name: whole(s, p.main_grad, ctx) for s, p in named_specs(model)}  # type: ignore[attr-defined]
        outcome.numbers[f"norm {step}"] = clip_gradients(model, ctx, 0.5)
        optimizer.step(LEARNING_RATE)
    outcome.weights = {s.name: whole(s, p.detach(), ctx) for s, p in named_specs(model)}
    return outcome


def differences(
    case: str, shape: Shape, dtype: torch.dtype, documents: tuple[tuple[int, ...], ...], expected: Outcome
) -> dict[str, float]:
    """Everything of this rank's run that differs from ``expected`` by more than the tolerance, and by how much."""
    found = train(case, shape, dtype, documents)
    errors = {
        name: abs(found.numbers[name] - value) / max(abs(value), 1e-9) for name, value in expected.numbers.items()
    }
    for step, (ours, theirs) in enumerate(zip(found.experts, expected.experts, strict=True)):
        errors[f"tokens per expert {step}"] = float((ours - theirs).abs().sum())
    for kind in ("gradients", "weights"):
        for name, value in getattr(expected, kind).items():
            errors[f"{kind} of {name}"] = float((getattr(found, kind)[name] - value).norm() / value.norm())
    return {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}


def assert_same(
    ranks: RankPool,
    case: str,
    dtype: torch.dtype,
    shapes: tuple[Shape, ...],
    documents: tuple[tuple[int, ...], ...] = PACKED,
) -> None:
    expected = train(case, ONE, dtype, documents)
    for name, gradient in expected.gradients.items():
        assert bool(gradient.any()), f"{name}: its gradient is trivially zero"
    assert expected.numbers["norm 0"] > 0.5, "clipping must be at work"
    for shape in shapes:
        for rank, wrong in enumerate(ranks.run(shape.world, differences, case, shape, dtype, documents, expected)):
            assert not wrong, f"{shape}, rank {rank}: {wrong}"


def exchange() -> tuple[Tensor, ...]:
    """Whole again after being shared; the chunks' predecessors; gradients of both; a tour of the ring."""
    ctx = ParallelContext.create(cp=3)
    shards = ContextParallelShard(ctx.cp)
    x = torch.arange(36.0, dtype=torch.float64).view(12, 3)
    own = shards.take(x, 0).requires_grad_()
    again = shards.gather(own)
    (again * again.detach() * (ctx.cp.rank + 1)).sum().backward()
    ends = torch.tensor([float(number) for number in shards.chunks]).requires_grad_()
    before = shards.before(ends)
    (before * (ctx.cp.rank + 1)).sum().backward()
    seen = torch.tensor([[rank, int(value)] for rank, value in ring(torch.tensor([ctx.cp.rank]), ctx.cp)])
    assert own.grad is not None and ends.grad is not None
    return again.detach(), own.detach(), own.grad, before.detach(), ends.grad, seen


def test_exchanges_between_three_ranks(ranks: RankPool) -> None:
    x = torch.arange(36.0, dtype=torch.float64).view(12, 3)
    for rank, (again, own, grad, before, ends_grad, seen) in enumerate(ranks.run(3, exchange)):
        assert torch.equal(again, x)
        assert torch.equal(grad, 6 * own), "every rank's gradient counts: 1 + 2 + 3"
        chunks = (rank, 5 - rank)
        assert before.tolist() == [max(number - 1, 0) for number in chunks]
        # The end of chunk n is used by the rank that holds chunk n + 1, that of the last chunk by none.
        holder = (0, 1, 2, 2, 1, 0)
        assert ends_grad.tolist() == [holder[n + 1] + 1 if n < 5 else 0 for n in chunks]
        assert seen.tolist() == [[(rank - step) % 3] * 2 for step in range(3)]


@pytest.mark.parametrize("case", ["attention", "RWKV-7", "experts"])
def test_sharing_sequences_changes_nothing(ranks: RankPool, case: str) -> None:
    assert_same(ranks, case, torch.float64, SHAPES)


def test_sharing_sequences_changes_nothing_in_fp32(ranks: RankPool) -> None:
    assert_same(ranks, "hybrid", torch.float32, (Shape(4, cp=4), Shape(4, 2, 2, True, "p2p")))


@pytest.mark.parametrize("documents", [PACKED, ALONE], ids=["packed", "alone"])
def test_a_ring_changes_nothing(ranks: RankPool, documents: tuple[tuple[int, ...], ...]) -> None:
    assert_same(ranks, "attention", torch.float64, (Shape(4, 2, 2, True, "p2p"),), documents)


def test_one_document_carries_its_state_through_all_chunks(ranks: RankPool) -> None:
    assert_same(ranks, "RWKV-7", torch.float64, (Shape(4, cp=4),), ALONE)


def numbers(case: str, shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    return train(case, shape, dtype, PACKED).numbers


@pytest.mark.parametrize("comm_type", ["allgather", "p2p"])
def test_bf16_follows(ranks: RankPool, comm_type: str) -> None:
    expected = numbers("hybrid", ONE, torch.float32)
    for found in ranks.run(2, numbers, "hybrid", Shape(2, cp=2, comm_type=comm_type), torch.bfloat16):
        for name in ("loss 0", "norm 0", "loss 1"):
            assert found[name] == pytest.approx(expected[name], rel=0.02), name


def run_trainer(prefix: str, *more: str) -> list[dict[str, Any]]:
    """What a whole run writes to its sinks: training and evaluation."""
    argv = arguments(prefix, "--fp64", "--train-iters", "2", "--eval-iters", "2", "--eod-mask-loss", *more)
    config = with_tokenizer_vocab(parse_config(argv).config, VOCAB)
    ctx = ParallelContext.create(cp=config.parallel.context_parallel_size)
    trainer = build_trainer(check_run(config, ctx.world.size), ctx)
    recorder = record(trainer)
    trainer.train()
    return recorder.records


def test_a_run_counts_every_label_once(ranks: RankPool, tmp_path: Path) -> None:
    """The losses that are trained on and reported, and the tokens of an evaluation, are those of one rank."""
    prefix = write_dataset(tmp_path / "text_document")
    expected = run_trainer(prefix)
    assert {entry["kind"] for entry in expected} == {"step", "evaluation"}
    for world in (2, 4):
        found = ranks.run(world, run_trainer, prefix, "--cp", "2")[0]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert ours[name] == (pytest.approx(value, rel=1e-10) if isinstance(value, float) else value), name
