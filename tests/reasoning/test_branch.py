"""Branches of a reading: recurrent states, caches, fast weights and memory, against runs of their own."""

from __future__ import annotations

import random as draws

import pytest
import torch

from megaforge.inference.staged import StagedModel
from megaforge.models.generation_state import GenerationState
from megaforge.models.hybrid import HybridModel
from megaforge.nn.mixture_of_depths import DepthState, _Sequence
from megaforge.nn.rwkv7 import RWKV7State
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.reasoning.branch import Branch
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from tests.nn.support import perturb
from tests.training.tiny import VOCAB, arguments, make_config

# Recurrent states, caches, fast weights beside all of them; blocks that see some tokens alone.
KINDS = {
    "plastic": ("--hybrid-layer-pattern", "R-*-M-", "--peft", "plastic", "--plastic-rank", "3", "--plastic-chunk", "4"),
    "depths": ("--hybrid-layer-pattern", "R-*-R-*-", "--mod-capacity-factor", "0.5"),
}
SIZES = ("--mamba-state-dim", "8", "--mamba-head-dim", "8", "--mamba-num-groups", "4", "--vocab-size", str(VOCAB))


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request: pytest.FixtureRequest) -> StagedModel:
    cfg = make_config(arguments("none", *SIZES, *KINDS[request.param])).model
    ctx = ParallelContext.single()
    built = HybridModel(make_layer_context(cfg, ctx, dtype=torch.float64))
    initialize_parameters(built, ctx, seed=1)
    perturb(built, ctx, 0.05)
    return StagedModel(built.eval())


def new(model: StagedModel) -> Branch:
    return Branch(model, AgentMemory(MemoryShape(6, 3, 8), torch.float64))


def act(branch: Branch, seed: int) -> None:
    """Reads and remembers, in pieces of 1 to 6 tokens."""
    chance = draws.Random(seed)
    for _ in range(4):
        tokens = [chance.randrange(VOCAB) for _ in range(chance.randrange(1, 7))]
        scores = branch.read(tokens)
        assert scores is not None
        branch.memory.write(scores[0, :6], tokens)
        branch.memory.summarize(scores[:, 6:12])
        branch.memory.retrieve(scores[0, 6:12], 2)


def after(model: StagedModel, *seeds: int) -> str:
    alone = new(model)
    for seed in seeds:
        act(alone, seed)
    return alone.digest()


def test_branches_are_serial_runs(model: StagedModel) -> None:
    """From nothing and from a text that was read: what they do is mixed, and each is what it would be alone."""
    for beginning in ((), (0,)):
        root = new(model)
        for seed in beginning:
            act(root, seed)
        before = root.digest()
        branches = [root.fork() for _ in range(3)]
        for offset in (0, 10):
            for number, branch in enumerate(branches, 1):
                act(branch, number + offset)
        expected = [after(model, *beginning, number, number + 10) for number in (1, 2, 3)]
        assert [branch.digest() for branch in branches] == expected and len({before, *expected}) == 4
        assert root.digest() == before
        branches[1].commit()
        branches[1].commit()
        assert root.digest() == expected[1] == branches[1].digest()
        with pytest.raises(ValueError, match="the parent has changed since this branch began"):
            branches[0].commit()
        branches[0].rollback()
        branches[0].rollback()
        assert branches[0].digest() == before and root.digest() == expected[1]
        act(branches[1], 5)
        assert root.digest() == expected[1]
        branches[1].rollback()
        assert branches[1].digest() == expected[1]
        act(root, 6)
        assert branches[1].digest() == expected[1]


def test_either_half_alone_makes_a_parent_another(model: StagedModel) -> None:
    """The model's state or the memory: a branch that changed one is refused where the parent changed the other."""
    for first, second in ((lambda b: b.read([1]), lambda b: b.memory.summarize(torch.ones(1, 6))),) * 2:
        root = new(model)
        one, two = root.fork(), root.fork()
        first(one)
        second(two)
        one.commit()
        before = root.digest()
        with pytest.raises(ValueError, match="the parent has changed"):
            two.commit()
        assert root.digest() == before
        first, second = second, first
    root.fork().commit()
    for call in (root.commit, root.rollback):
        with pytest.raises(ValueError, match="this is no branch"):
            call()


def test_what_is_shared_is_not_copied_before_it_changes(model: StagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy = [], GenerationState.copy
    monkeypatch.setattr(GenerationState, "copy", lambda state: copies.append(1) or copy(state))
    root = new(model)
    act(root, 0)
    assert not copies and root.nbytes > 0 and root.length > 0
    branches = [root.fork() for _ in range(5)]
    for branch in branches:
        branch.rollback()
        assert branch.nbytes == root.nbytes and branch.length == root.length
    assert not copies
    act(branches[0], 1)
    assert len(copies) == 1


def test_a_block_that_took_nothing_yet_is_not_shared() -> None:
    """Two sequences made of one whose tokens all went past a block: each has that block's memory for itself."""
    layer = RWKV7State()
    one = DepthState([_Sequence([layer])])
    first, second = (one.select(torch.zeros(1, dtype=torch.long)).sequences[0].layers[0] for _ in range(2))
    assert first is not layer and second is not layer and first is not second
