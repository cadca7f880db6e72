"""The memory of an agent: the index against all products in fp64, eviction, branches, and what trains summaries."""

from __future__ import annotations

import random as draws
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters, named_specs
from megaforge.parallel.region import TensorParallelRegion
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.memory.episodic import PAGE, EpisodicIndex
from megaforge.reasoning.memory.searches import TorchSearch
from megaforge.reasoning.memory.summariser import Summariser
from megaforge.reasoning.memory.token_lists import joined, split
from megaforge.reasoning.memory.working import WorkingMemory
from megaforge.registry import MEMORY_SEARCHES
from tests.nn.support import random
from tests.parallel.pool import RankPool

SEARCHES = MEMORY_SEARCHES.names()


def nearest_by_definition(keys: Tensor, query: Tensor, k: int) -> list[int]:
    """By all products in fp64, the highest first, of equals the oldest."""
    products = (keys.double() * query.double()).sum(-1).tolist()
    return sorted(range(len(keys)), key=lambda slot: (-products[slot], slot))[:k]


def keys_of(case: str, number: int, dim: int) -> Tensor:
    keys = torch.randn(number, dim, generator=torch.Generator().manual_seed(number))
    if case == "alike":  # three keys, many times each
        keys = keys[torch.arange(number) % 3]
    if case == "near":  # closer to each other than fp32 sums tell apart
        keys = keys[:1] + keys * 1e-7
    if case == "huge":
        keys = keys * 1e25
    if case == "tiny":
        keys = keys * 1e-30
    if case == "zero":
        keys = keys * 0
    return keys


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("case", ["drawn", "alike", "near", "huge", "tiny", "zero"])
def test_every_search_finds_what_fp64_finds(case: str, search: str) -> None:
    """None, one and several pages of keys; fewer than are asked for; ties; products beyond fp32."""
    for number in (0, 1, 5, PAGE + 300):
        keys = keys_of(case, number, 24)
        index = EpisodicIndex(24, PAGE + 300, search)
        for slot, key in enumerate(keys):
            index.write(key, [slot])
        for seed, k in enumerate((1, 4, 9)):
            query = keys_of("huge" if case == "huge" else "drawn", 7, 24)[seed]
            expected = nearest_by_definition(keys, query, k)
            assert index.retrieve(query, k) == [(slot,) for slot in expected]


def test_faiss_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"--memory-index faiss needs the Python package 'faiss'.*megaforge\[memory\]"):
        EpisodicIndex(4, 4, "faiss")
    with pytest.raises(UserError, match="'fais' is not a known search of the episodic index"):
        EpisodicIndex(4, 4, "fais")


def test_a_candidate_too_few_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slack is needed: without it products of fp32 decide, and some near keys are missed."""
    found: list[int] = []

    class Narrow(TorchSearch):
        def candidates(self, prepared: Any, query: Tensor, k: int, slack: float) -> Tensor:
            both = [super(Narrow, self).candidates(prepared, query, k, some) for some in (0.0, slack)]
            found.append(len(both[1]) - len(both[0]))
            return both[0]

    monkeypatch.setattr(MEMORY_SEARCHES, "_parts", {**MEMORY_SEARCHES._parts, "narrow": Narrow})
    keys, index = keys_of("near", 200, 24), EpisodicIndex(24, 200, "narrow")
    for slot, key in enumerate(keys):
        index.write(key, [slot])
    queries = keys_of("drawn", 20, 24)
    missed = sum(index.nearest(query, 3) != nearest_by_definition(keys, query, 3) for query in queries)
    assert missed and max(found) > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_least_found_then_the_oldest_goes(seed: int) -> None:
    """Against a list of all entries, over many random calls."""
    chance, index = draws.Random(seed), EpisodicIndex(8, 5)
    known: list[dict[str, Any]] = []
    for step in range(120):
        vector = torch.randn(8, generator=torch.Generator().manual_seed(1000 * seed + step))
        if chance.random() < 0.6:
            if len(known) == 5:
                known.pop(min(range(5), key=lambda at: (known[at]["uses"], known[at]["written"])))
            known.append({"key": vector, "tokens": (step, step), "uses": 0, "written": step})
            index.write(vector, [step, step])
        else:
            products = [float(entry["key"].double() @ vector.double()) for entry in known]
            best = sorted(range(len(known)), key=lambda at: -products[at])[:2]
            assert index.retrieve(vector, 2) == [known[at]["tokens"] for at in best]
            for at in best:
                known[at]["uses"] += 1
    assert len(index) == len(known) and index.evicted > 10


def test_keys_that_are_no_keys_are_refused() -> None:
    index = EpisodicIndex(4, 4)
    with pytest.raises(ValueError, match=r"a key of shape \(3,\); entries' have \(4,\)"):
        index.write(torch.zeros(3), [1])
    with pytest.raises(ValueError, match="a query that is not finite"):
        index.retrieve(torch.full((4,), 1e200, dtype=torch.float64), 1)
    assert len(index) == 0 and index.retrieve(torch.zeros(4), 3) == []


def test_working_memory_keeps_the_mean_when_it_merges() -> None:
    memory = WorkingMemory(3, 6, torch.float64)
    assert not memory.read().any() and memory.nbytes == 0
    vectors = random(41, 3)
    for start, stop in ((0, 1), (1, 1), (1, 6), (6, 30), (30, 41)):
        memory.add(vectors[start:stop])
        assert len(memory) <= 6 and float(memory.weights.sum()) == stop
        torch.testing.assert_close(memory.read(), vectors[:stop].mean(0), rtol=1e-12, atol=1e-14)
    query = random(3, seed=1)
    weights = memory.weights * ((memory.vectors @ query) / 3**0.5).exp()
    torch.testing.assert_close(memory.read(query), weights @ memory.vectors / weights.sum())
    single = WorkingMemory(3, 1, torch.float64)
    single.add(vectors[:5])
    assert len(single) == 1
    torch.testing.assert_close(single.vectors[0], vectors[:5].mean(0))
    with pytest.raises(ValueError, match=r"summaries of shape \(2, 4\)"):
        memory.add(torch.zeros(2, 4))


SHAPE = MemoryShape(dim=6, slots=4, working=8)


def act(memory: AgentMemory, seed: int) -> None:
    """A few random calls, of every kind."""
    chance, vectors = draws.Random(seed), torch.randn(12, 6, generator=torch.Generator().manual_seed(seed))
    for step, vector in enumerate(vectors):
        call = chance.choice(("summarize", "write", "retrieve", "splice"))
        if call == "summarize":
            memory.summarize(vectors[: 1 + step % 3])
        elif call == "write":
            memory.write(vector, [seed, step] * (1 + step % 2))
        elif call == "retrieve":
            memory.retrieve(vector, 2)
        else:
            memory.splice(3)


@pytest.mark.parametrize("search", SEARCHES)
def test_branches_are_serial_runs(search: str) -> None:
    """N branches of one memory, their calls mixed: each is what it would be alone; commit and rollback."""
    shape = MemoryShape(6, 4, 8, search)
    begun, alone = AgentMemory(shape), []
    act(begun, 0)
    before = begun.digest()
    for seed in range(1, 5):
        serial = AgentMemory(shape)
        act(serial, 0)
        act(serial, seed)
        act(serial, seed + 10)
        alone.append(serial.digest())
    assert len({before, *alone}) == 5
    branches = [begun.fork() for _ in range(4)]
    assert {branch.digest() for branch in branches} == {before}
    for offset in (0, 10):
        for seed, branch in enumerate(branches, 1):
            act(branch, seed + offset)
    assert [branch.digest() for branch in branches] == alone and begun.digest() == before
    branches[1].commit()
    assert begun.digest() == branches[1].digest() == alone[1]
    branches[1].commit()
    assert begun.digest() == alone[1]
    with pytest.raises(ValueError, match="the parent has changed since this branch began"):
        branches[0].commit()
    branches[0].rollback()
    branches[0].rollback()
    assert branches[0].digest() == before
    branches[0].commit()  # it has done nothing
    act(branches[1], 77)
    branches[1].rollback()
    assert begun.digest() == branches[1].digest() == alone[1]
    act(branches[1], 77)
    branches[1].commit()
    assert begun.digest() == branches[1].digest() != alone[1]
    for call in (begun.commit, begun.rollback):
        with pytest.raises(ValueError, match="this memory is no branch"):
            call()


def test_branches_share_what_they_do_not_write() -> None:
    index = EpisodicIndex(4, 3 * PAGE)
    for key in torch.randn(2 * PAGE + 3, 4):
        index.write(key, [1])
    branch = index.fork()
    branch.write(torch.ones(4), [2])
    shared = [
        ours.keys.data_ptr() == theirs.keys.data_ptr() for ours, theirs in zip(index._pages, branch._pages, strict=True)
    ]
    assert shared == [True, True, False] and len(branch) == len(index) + 1


def test_a_saved_memory_goes_on_alike() -> None:
    memory = AgentMemory(SHAPE)
    act(memory, 3)
    again = AgentMemory(SHAPE)
    again.load_state({name: tensor.clone() for name, tensor in memory.state().items()})
    assert again.digest() == memory.digest() and again.staged == memory.staged
    for one in (memory, again):
        act(one, 4)
    assert again.digest() == memory.digest()
    empty = AgentMemory(SHAPE)
    again.load_state(empty.state())
    assert again.digest() == empty.digest() and again.entries == again.summaries == again.evicted == 0
    for shape, found in ((MemoryShape(7, 4), "--memory-dim 7"), (MemoryShape(6, 1), "--memory-slots 1")):
        with pytest.raises(UserError, match=found):
            AgentMemory(shape).load_state(memory.state())


def test_staged_entries_are_spliced_whole_as_far_as_they_fit() -> None:
    memory = AgentMemory(SHAPE)
    empty = memory.nbytes
    for number, key in enumerate(torch.eye(6)[:3]):
        memory.write(key, [number] * (number + 2))
    assert memory.nbytes > empty and memory.retrieve(torch.tensor([3.0, 2, 1, 0, 0, 0]), 3) == [
        (0, 0),
        (1, 1, 1),
        (2, 2, 2, 2),
    ]
    assert memory.splice(1) == () and len(memory.staged) == 3
    assert memory.splice(6) == (0, 0, 1, 1, 1) and memory.staged == ((2, 2, 2, 2),)
    assert memory.splice(4) == (2, 2, 2, 2) and memory.splice(4) == () == memory.staged


def test_token_lists_come_back() -> None:
    for lists in ([], [()], [(1, 2), (), (3,)]):
        assert split(*joined(lists)) == lists


STRIDE, LENGTHS = 4, ((9, 1, 6), (16,))


def summarised(tp: int, cp: int, sequence_parallel: bool) -> dict[str, Any]:
    """Loss, gradients and summaries of two packed sequences."""
    ctx = ParallelContext.create(tp=tp, cp=cp)
    module = Summariser(6, 3, ctx, stride=STRIDE, dtype=torch.float64)
    name_parameters(module)
    initialize_parameters(module, ctx, seed=1)
    region, shard = TensorParallelRegion(ctx, sequence_parallel), ContextParallelShard(ctx.cp)
    starts = torch.zeros(2, 16, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        starts[row, np.cumsum([0, *lengths[:-1]])] = True
    info = PackedSequence(2, 16, torch.device("cpu"), starts, 0, shard)
    x = info.local(random(2, 16, 6)).transpose(0, 1)
    only = info.local(random(2, 16, seed=5) > -1).t()
    reducer = GradientReducer(module, ctx)
    reducer.zero_grad()
    loss = module.loss(region.own(x), info, region, only)
    loss.backward()
    reducer.finish_grad_sync()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total, group=ctx.cp.group) if cp > 1 else None
    strides = module.strides(region.own(x), info, region, only)
    grads = {spec.name: parameter.main_grad.clone() for spec, parameter in named_specs(module)}
    return {"loss": float(total), "means": strides.means, "tokens": strides.tokens_BK, **grads}


def by_hand() -> dict[str, Any]:
    """Each stride of each document by itself."""
    module = Summariser(6, 3, ParallelContext.single(), stride=STRIDE, dtype=torch.float64)
    name_parameters(module)
    initialize_parameters(module, ParallelContext.single(), seed=1)
    x, only, total, means = random(2, 16, 6), random(2, 16, seed=5) > -1, 0.0, []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            for first in range(start, start + length, STRIDE):
                chosen = [at for at in range(first, min(first + STRIDE, start + length)) if only[row, at]]
                mean = x[row, chosen].mean(0) if chosen else torch.zeros(6, dtype=torch.float64)
                means.append(mean)
                again = module.up.weight @ (module.down.weight @ mean)
                total = total + len(chosen) * (again - mean).square().sum() / 6
            start += length
    assert isinstance(total, Tensor)
    total.backward()
    return {"loss": total.item(), "means": means, **{spec.name: p.grad for spec, p in named_specs(module)}}


def test_summaries_and_their_loss_are_by_hand_at_every_layout(ranks: RankPool) -> None:
    expected = by_hand()
    layouts = [(2, 1, False), (2, 2, True)]
    for layout in layouts:
        for found in ranks.run(layout[0] * layout[1], summarised, *layout):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
            for name in ("down.weight", "up.weight"):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-13)
            means = [*found["means"][0, :6], *found["means"][1, :4]]
            torch.testing.assert_close(torch.stack(means), torch.stack(expected["means"]), rtol=1e-12, atol=1e-14)


def test_strides_of_a_document_are_found() -> None:
    module = Summariser(6, 3, ParallelContext.single(), stride=STRIDE, dtype=torch.float64)
    starts = torch.zeros(1, 16, dtype=torch.bool)
    starts[0, [0, 9, 10]] = True
    info = PackedSequence(1, 16, torch.device("cpu"), starts)
    only = torch.ones(16, 1, dtype=torch.bool)
    only[4:8] = False
    found = module.strides(random(16, 1, 6), info, TensorParallelRegion(ParallelContext.single(), False), only)
    assert [found.of(0, document).tolist() for document in range(3)] == [[0, 2], [3], [4, 5]]


def test_it_learns_to_make_the_means_again() -> None:
    """Means of rank 2 in 6 dimensions are kept whole by two numbers."""
    ctx = ParallelContext.single()
    module = Summariser(6, 2, ctx, stride=STRIDE, dtype=torch.float64)
    name_parameters(module)
    initialize_parameters(module, ctx, seed=1)
    x = random(64, 2, 2) @ random(2, 6, seed=1)
    info, region = PackedSequence(2, 64, torch.device("cpu")), TensorParallelRegion(ctx, False)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        loss = module.loss(x, info, region)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
