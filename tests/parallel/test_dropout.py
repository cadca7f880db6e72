"""Dropout's masks against SplitMix64 written out, dropped attention against its definition, and training with both at
layouts against one rank."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.kernels.attention import native_dropped
from megaforge.kernels.attention.dropped import Places, dropped_attention
from megaforge.kernels.attention.segments import documents_of, segments_of
from megaforge.models.prepared_run import check_run
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.dropout import DropoutRates, kept, scale_of, threshold_of
from megaforge.parallel.region import TensorParallelRegion
from megaforge.training.setup import build_trainer
from megaforge.verification.parity import Comparison, combined, compare, parity_config, write_documents
from megaforge.verification.parity_layouts import choose_layouts
from tests.nn.support import random
from tests.parallel.pool import RankPool

CPU = torch.device("cpu")
ONE = TensorParallelRegion(ParallelContext.single(), sequence_parallel=False)
WORD, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def mixed(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def stays(rate: float, *path: int) -> bool:
    """Whether an element is kept; its path ends with its number in the row."""
    key = 0
    for value in path[:-1]:
        key = mixed(key ^ ((value + 1) * GOLDEN & WORD))
    word = mixed((key + (path[-1] // 4 + 1) * GOLDEN) & WORD)
    signed = ((word >> (16 * (path[-1] % 4))) + (1 << 15)) % (1 << 16) - (1 << 15)
    return signed >= round(rate * 65536) - (1 << 15)


def test_masks_are_splitmix64() -> None:
    rates = DropoutRates(0.3, 0.6, seed=1234)
    samples, places = torch.tensor([5, 123456789]), torch.tensor([0, 1, 70000])
    dropout = rates.of(samples, places)
    found = dropout.hidden(torch.ones(3, 2, 7), 4, 2, ONE)
    rows = kept(dropout.attention_rows(4, range(2, 4)), 0.6, 6)
    for s, place in enumerate(places.tolist()):
        for b, sample in enumerate(samples.tolist()):
            for element in range(7):
                left = stays(0.3, 1234, sample, place, 4, 2, element)
                assert float(found[s, b, element]) == pytest.approx(left / 0.7, rel=1e-4)
            for head in (2, 3):
                expected = [stays(0.6, 1234, sample, place, 4, 1, head, key) for key in range(6)]
                assert rows[b, head - 2, s].tolist() == expected


def test_masks_are_fair_and_unlike_each_other() -> None:
    """The share that is dropped, and the agreement of masks that differ in one thing, to five standard deviations."""
    rate, shape = 0.25, (64, 8, 256)
    count = math.prod(shape)

    def mask(seed: int, first: int, layer: int, site: int) -> Tensor:
        dropout = DropoutRates(rate, 0.0, seed).of(torch.arange(first, first + 8), torch.arange(64))
        return dropout.hidden(torch.ones(shape), layer, site, ONE) == 0

    masks = [
        mask(1, 0, 0, 2),
        mask(2, 0, 0, 2),
        mask(1, 8, 0, 2),
        mask(1, 0, 1, 2),
        mask(1, 0, 0, 3),
        mask(1, 0, -1, 0),
    ]
    masks += [masks[0].roll(1, dim) for dim in range(3)]
    for number, one in enumerate(masks):
        assert abs(float(one.double().mean()) - rate) < 5 * math.sqrt(rate * (1 - rate) / count), number
        if number:
            both = float((one & masks[0]).double().mean())
            assert abs(both - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / count), number
    assert torch.equal(masks[0], mask(1, 0, 0, 2))


@pytest.mark.parametrize("rate", [0.0, 1e-9, 1 / 65536, 0.5, 0.99999, 1 - 1e-9])
def test_extreme_rates(rate: float) -> None:
    rows = DropoutRates(rate, rate, 3).of(torch.arange(2), torch.arange(500)).attention_rows(0, range(4))
    left = float(kept(rows, rate, 33).double().mean())
    assert math.isfinite(scale_of(rate)) and abs(left * scale_of(rate) - 1) < 0.02 or rate > 0.9
    assert rate > 1e-6 or left == 1


def written_out(query: Tensor, key: Tensor, value: Tensor, places: list[int], documents: Tensor, factors: Tensor):
    """One query at a time; ``documents`` [b, t] of all places, ``factors`` [b, heads, s, t]."""
    out, each = torch.zeros_like(query), query.shape[1] // key.shape[1]
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for s, place in enumerate(places):
                seen = [t for t in range(place + 1) if documents[b, t] == documents[b, place]]
                scores = key[b, h // each, seen] @ query[b, h, s] / math.sqrt(query.shape[-1])
                rows.append((scores.softmax(0) * factors[b, h, s, seen]) @ value[b, h // each, seen])
    return torch.stack(rows).view_as(out)


@pytest.mark.parametrize(
    ("starts", "size", "groups", "packed"),
    [((0,), 9, 4, False), ((0,), 1, 2, False), ((0,), 70, 2, True), ((3, 12), 3, 1, True)],
)
def test_dropped_attention(starts: tuple[int, ...], size: int, groups: int, packed: bool) -> None:
    """Whole sequences, and a rank's chunks of one; blocks of rows, alike rows and large logits."""
    places = [start + i for start in starts for i in range(size)]
    last, rate = 15 if len(starts) > 1 else size, 0.4
    documents = torch.arange(last).expand(2, -1) // 5 if packed else torch.zeros(2, last, dtype=torch.long)
    own = documents[:, places]
    rows = DropoutRates(0.0, rate, 9).of(torch.tensor([3, 4]), torch.tensor(places)).attention_rows(1, range(4))
    query, key, value = (random(2, n, m, 6, seed=n * m) for n, m in ((4, len(places)), (groups, last), (groups, last)))
    key[:, :, last // 2] = key[:, :, 0]
    query[0, 1] *= 100
    inputs = [x.requires_grad_() for x in (query, key, value)]
    where = Places(starts, own, documents) if packed else Places(starts)
    out = dropped_attention(*inputs, where, lambda a, b, c: kept(rows[:, :, a:b], rate, c), scale_of(rate))
    factors = kept(rows, rate, last).double() * scale_of(rate)
    expected = written_out(query, key, value, places, documents, factors)
    direction = random(*out.shape, seed=5)
    assert float((out - expected).detach().norm()) <= 1e-12 * max(float(expected.detach().norm()), 1.0)
    ours = torch.autograd.grad((out * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    for name, one, other in zip(("query", "key", "value"), ours, theirs, strict=True):
        assert float((one - other).norm()) <= 1e-12 * max(float(other.norm()), 1.0), name
    narrow = [x.detach().bfloat16() for x in inputs]
    low = dropped_attention(*narrow, where, lambda a, b, c: kept(rows[:, :, a:b], rate, c), scale_of(rate))
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_attention_compiled(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype) -> None:
    """Against blocks in fp64: documents that begin at no multiple of four, groups, a chunk of queries after keys."""
    if not native_dropped.takes(torch.empty(1)):
        pytest.skip("the compiled attention is not built, or before this operator")
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", isa)
    rate, last, first = 0.4, 150, 61
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 30, 70, 49])).expand(2, -1)
    query, key, value, direction = (
        random(2, n, m, 20, seed=n * m).to(dtype) for n, m in ((4, 89), (2, 150), (2, 150), (4, 89))
    )
    rows = DropoutRates(0.0, rate, 9).of(torch.tensor([3, 4]), torch.arange(first, last)).attention_rows(1, range(4))
    ours, theirs = ([x.to(t).requires_grad_() for x in (query, key, value)] for t in (dtype, torch.float64))
    seen = segments_of(documents_of(ids), range(first, last), range(last))
    try:
        out = native_dropped.dropped_attention(*ours, seen, rows, threshold_of(rate))
    except RuntimeError as error:
        pytest.skip(str(error))
    where = Places((first,), ids[:, first:], ids)
    expected = dropped_attention(*theirs, where, lambda a, b, c: kept(rows[:, :, a:b], rate, c), scale_of(rate))
    found = [out, *torch.autograd.grad(out, ours, direction)]
    wanted = [expected, *torch.autograd.grad(expected, theirs, direction.double())]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype and float((one - other).norm()) <= (2e-6 if dtype == torch.float32 else 8e-3) * float(
            other.norm()
        )


FLAGS = (
    *("--hidden-dropout", "0.2", "--attention-dropout", "0.3", "--qk-layernorm", "--add-qkv-bias"),
    *("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "128"),
)
# Micro-batches, recomputation, sequence and context parallelism, pipelines with a split backward pass.
NAMES = ("micro1", "pp2-cp2-zb-v", "tp2-sp-recompute", "tp2-sp-pp2-cp2-vpp2")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("dropout") / "train_text_document"), 61)


def compare_here(documents: str, name: str) -> Comparison:
    reference = parity_config(documents, "fp64", None, FLAGS)
    return compare(parity_config(documents, "fp64", choose_layouts([name])[0], FLAGS), reference, CPU)


@pytest.mark.parametrize("name", NAMES)
def test_layout_changes_nothing(ranks: RankPool, documents: str, name: str) -> None:
    [layout] = choose_layouts([name])
    found = combined(
        ranks.run(layout.ranks, compare_here, documents, name), parity_config(documents, "fp64", layout, FLAGS)
    )
    assert found.agrees("fp64"), f"{name}: {found.worst}"


def test_training_drops_and_evaluation_does_not(documents: str) -> None:
    config = parity_config(documents, "fp64", None, FLAGS)
    trainer = build_trainer(check_run(config, 1), ParallelContext.single())
    still = dataclasses.replace(
        config, model=dataclasses.replace(config.model, hidden_dropout=0.0, attention_dropout=0.0)
    )
    plain = build_trainer(check_run(still, 1), ParallelContext.single())
    batches = next(iter(trainer._loader(trainer.data, trainer.batches, 0)))
    losses = []
    for one in (trainer, plain):
        engine = one.engine
        engine.zero_grad()
        trained = engine.forward_backward(batches, one.objective)
        engine.reduce(trained)
        trained.read()
        evaluated = type(trained)(engine.ctx, one.objective, trained.counts)
        engine.forward(batches, evaluated)
        engine.reduce(evaluated)
        evaluated.read()
        losses.append((trained.means()["loss"], evaluated.means()["loss"]))
    (dropped, whole), (same, again) = losses
    assert whole == same == again != dropped
    resumed = next(iter(trainer._loader(trainer.data, trainer.batches, 24)))
    assert [sample for batch in resumed for sample in batch.samples.tolist()] == list(range(24, 32))
    unnumbered = [dataclasses.replace(batch, samples=None) for batch in batches]
    with pytest.raises(UserError, match="does not number its samples"):
        trainer.engine.forward_backward(unnumbered, trainer.objective)
