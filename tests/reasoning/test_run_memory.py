"""A run's own memory: what is beneath an index, what accepted episodes leave, its archive, and a run that is killed."""

from __future__ import annotations

import json
import os
import random as draws
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge import fault_points
from megaforge.checkpoint.checkpoint import read_meta
from megaforge.checkpoint.directory import list_steps
from megaforge.config.run_memory_config import RunMemoryConfig
from megaforge.errors import UserError
from megaforge.monitor.names import known
from megaforge.parallel.context import ParallelContext
from megaforge.reasoning.agent.algorithms import Judged
from megaforge.reasoning.agent.run_memory import RunMemory, index_of_run
from megaforge.reasoning.memory import archive
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.memory.archive import append, go_back, read_archive
from megaforge.reasoning.memory.episodic import Entry, EpisodicIndex
from megaforge.registry import MEMORY_SEARCHES
from megaforge.training.metrics import StepMetrics
from tests.inference.text_model import restored
from tests.reasoning.test_agent_parity import agent_arguments
from tests.reasoning.test_asking import printed, tool
from tests.training.tiny import make_config, make_trainer, record, weights


def key(*numbers: float) -> Tensor:
    return torch.tensor(numbers)


@pytest.mark.parametrize("search", MEMORY_SEARCHES.names())
def test_what_is_beneath_is_found_too_and_only_read(search: str) -> None:
    """Beside one index that has all entries in their order; ties, and two below each other."""
    random = torch.Generator().manual_seed(3)
    whole = EpisodicIndex(3, 99, search)
    layers = [EpisodicIndex(3, 99, search)]
    for _ in range(2):
        layers.append(EpisodicIndex(3, 99, search, layers[-1]))
    for number in range(15):
        drawn = torch.randn(3, generator=random) if number % 4 else key(1, 1, 1)
        for index in (whole, layers[number // 5]):
            assert index.write(drawn, [number]) is None
    before = [layer.state() for layer in layers[:2]]
    for k in (1, 4, 15, 40):
        query = torch.randn(3, generator=random)
        assert layers[2].retrieve(query, k) == whole.retrieve(query, k)
        assert layers[2].retrieve(key(1, 1, 1), k) == whole.retrieve(key(1, 1, 1), k)
    for layer, was in zip(layers, before, strict=False):
        assert all(torch.equal(x, was[name]) for name, x in layer.state().items()), "it is only read"
    uses = [one.uses for one in whole.entries()]
    assert [layers[2].used_beneath[slot] for slot in range(5)] == uses[5:10]
    assert [one.uses for one in layers[2].entries()] == uses[10:] and not layers[1].used_beneath
    fork = layers[2].fork()
    fork.retrieve(key(1, 1, 1), 9)
    assert layers[2].used_beneath.total() == sum(uses[5:10]) < fork.used_beneath.total()
    layers[1].count_uses(layers[2].used_beneath)
    assert [one.uses for one in layers[1].entries()] == uses[5:10]
    empty = EpisodicIndex(3, 2, search, EpisodicIndex(3, 2, search))
    assert empty.retrieve(key(1, 2, 3), 4) == [] and len(layers[2]) == 5


def test_what_is_given_up_is_told() -> None:
    index = EpisodicIndex(2, 2)
    index.write(key(1, 0), [1])
    index.write(key(0, 1), [2])
    index.retrieve(key(1, 0), 1)
    lost = index.write(key(3, 3), [3])
    assert lost is not None and lost.tokens == (2,) and lost.key.tolist() == [0, 1] and lost.uses == 0
    assert [one.tokens for one in index.entries()] == [(1,), (3,)]


def test_the_disk_has_what_an_archive_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "archive.jsonl", list[tuple[Path, int]]()
    monkeypatch.setattr(archive, "sync_path", lambda one: synced.append((one, path.read_text().count("\n"))))
    entry = Entry(torch.ones(2), (7,), 0)
    append(path, 1, [entry, entry])
    append(path, 2, [entry])
    assert synced == [(path, 2), (tmp_path, 2), (path, 3)], "a new file's name, too"


def test_an_archive_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "archive.jsonl"
    assert go_back(path, 3) is None
    for iteration in (2, 5, 5, 7):
        append(path, iteration, [Entry(key(iteration, 0.1), (iteration, 9), 1)])
    index = read_archive(path, 2)
    assert [one.tokens for one in index.entries()] == [(2, 9), (5, 9), (5, 9), (7, 9)]
    assert torch.equal(index.entries()[0].key, key(2, 0.1)), "to the bit"
    notice = go_back(path, 4)
    assert notice is not None and "3 chunks that were given up after iteration 4" in notice
    assert len(path.with_name("archive.jsonl.abandoned").read_text().splitlines()) == 3
    with path.open("a") as file:
        file.write('{"iteration": 5, "us')  # a kill
    assert len(read_archive(path, 2)) == 1 and go_back(path, 9) is None
    assert len(path.read_bytes().splitlines()) == 1
    with pytest.raises(UserError, match="its keys are of size 2, and this model's memory has 3"):
        read_archive(path, 3)
    with pytest.raises(UserError, match="there is no such file"):
        read_archive(tmp_path / "none", 3)
    path.write_text('{"kind": "step"}\n')
    with pytest.raises(UserError, match="line 1 is not a chunk that a run gave up, so the file is left alone"):
        go_back(path, 0)
    with pytest.raises(UserError, match="it cannot be written"):
        append(path / "below", 1, [Entry(key(1), (1,), 0)])


def fake(words: Path, *more: str) -> tuple[Any, RunMemory]:
    trainer = SimpleNamespace(config=make_config(agent_arguments(words, "--agent-memory", "run", *more)))
    trainer.ctx, trainer.iteration = ParallelContext.single(), 0
    return trainer, RunMemory(trainer)  # type: ignore[arg-type]


def episodes(memory: RunMemory, writes: dict[int, list[int]]) -> list[Any]:
    made = []
    for sample, tokens in writes.items():
        own = AgentMemory(MemoryShape(8, 9), beneath=memory.index)
        for token in tokens:
            own.write(torch.full((8,), float(sample)), [token])
        made.append(SimpleNamespace(sample=sample, memory=own))
    return made


def step_end(memory: RunMemory, trainer: Any, iteration: int) -> dict[str, float]:
    metrics = StepMetrics(iteration, 1.0, 1.0, 1.0, 1, 1, 1, extra={})
    memory.on_step_end(trainer, metrics)
    return metrics.extra


def test_accepted_episodes_leave_their_entries(words: Path, tmp_path: Path) -> None:
    """By hand: groups of four; the third's rewards are alike, in a way that no binary mean of floats is."""
    path = tmp_path / "archive.jsonl"
    flags = ("--agent-memory-capacity", "4", "--agent-memory-archive", str(path))
    trainer, memory = fake(words, *flags)
    rewards = [1.0, 0.0, 1.0, 0.0, 0.5, 0.7, 0.6, 0.6, *[0.1 * 0.7] * 4]
    judged = {sample: Judged(reward, (), (), 1.0, False) for sample, reward in enumerate(rewards)}
    played = episodes(memory, {0: [10, 11], 1: [12], 2: [11, 13], 5: [14], 6: [10], 8: [15], 11: [15]})
    memory.take(trainer.ctx, played[::-1], judged)
    assert memory.index is not None and len(memory.index) == 0, "not before the step's end"
    extra = step_end(memory, trainer, 1)
    accepted = {0, 2, 5, 6, 7, 8, 9, 10, 11}
    assert extra["episodes_accepted"] == len(accepted) / 12
    # In the order of samples, of a group's chunks each once; room for four.
    told = [(0, 10), (0, 11), (2, 13), (5, 14), (6, 10), (8, 15)]
    left = [(int(one.key[0]), *one.tokens) for one in memory.index.entries()]
    assert left == told[2:] and extra["run_memory_evicted"] == 2 and extra["run_memory_entries"] == 4
    assert extra["run_memory_bytes"] == 4 * (8 * 4 + 3 * 8)
    assert [one.tokens for one in read_archive(path, 8).entries()] == [(10,), (11,)]
    # What was found by an accepted episode stays longer than what is as old.
    [finder, other] = episodes(memory, {0: [20], 1: [21]})
    finder.memory.retrieve(torch.full((8,), 1.0), 1)
    other.memory.retrieve(torch.full((8,), -1.0), 1)
    memory.take(trainer.ctx, [finder, other], {0: judged[0], 1: judged[1], 2: judged[1], 3: judged[1]})
    step_end(memory, trainer, 2)
    assert [one.tokens for one in memory.index.entries()] == [(14,), (10,), (15,), (20,)]
    assert [one.uses for one in memory.index.entries()] == [0, 0, 1, 0], "of a rejected one nothing is left"
    assert all(known("step", name) for name in extra)
    trainer.iteration = 1
    memory.on_rollback(trainer)
    assert len(read_archive(path, 8)) == 2


def test_a_run_without_a_memory_keeps_none(words: Path) -> None:
    trainer = SimpleNamespace(config=make_config(agent_arguments(words)))
    memory = RunMemory(trainer)  # type: ignore[arg-type]
    assert (memory.index, memory.state_name, memory.state(), list(memory.tensors())) == (None, None, {}, [])
    assert step_end(memory, trainer, 1) == {}


def test_what_a_checkpoint_keeps(words: Path) -> None:
    _, memory = fake(words, "--agent-memory-capacity", "2000")
    assert memory.index is not None
    for number in range(1100):
        memory.index.write(torch.full((8,), number / 7), [number, 3][: number % 3])
    memory.index.retrieve(torch.ones(8), 3)
    _, other = fake(words, "--agent-memory-capacity", "1100")
    other.load_state(json.loads(json.dumps(memory.state())))
    for (name, _, ours), (same, _, theirs) in zip(other.tensors(), memory.tensors(), strict=True):
        assert name == same
        ours.copy_(theirs)
    assert other.index is not None
    assert all(torch.equal(x, other.index.state()[name]) for name, x in memory.index.state().items())
    assert other.index.retrieve(torch.ones(8), 5) == memory.index.retrieve(torch.ones(8), 5)
    _, small = fake(words, "--agent-memory-capacity", "1099")
    with pytest.raises(UserError, match="--agent-memory-capacity 1099, .* has 1100 chunks"):
        small.load_state(memory.state())


RUN = ("--agent-memory", "run", "--agent-memory-capacity", "9", "--rl-epochs", "2", "--train-iters", "6")


def dies_at(call: Callable[[], None], point: str, iteration: int) -> int:
    """The status of a process that does ``call``, and is killed when it comes to ``point`` in this iteration."""
    child = os.fork()
    if not child:
        try:

            def strike(reached: str, where: dict[str, Any]) -> None:
                if reached == point and where["iteration"] == iteration:
                    os.kill(os.getpid(), signal.SIGKILL)

            fault_points.arm(strike)
            call()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(run: Path) -> dict[str, Any]:
    """Of a run's newest checkpoint: what it says, and the bytes of its files."""
    path = list_steps(run)[0][1]
    state = read_meta(path)["state"]
    return {"state": state, **{file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}}


def test_a_run_that_is_killed_goes_on_to_the_same_bits(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in a step, in a save and before a checkpoint has its name; weights, episodes that a second epoch learns
    from, the index and the archive are those of a run that nothing happened to."""

    def argv(run: Path) -> list[str]:
        more = ("--save", str(run), "--load", str(run), "--save-interval", "1", "--num-workers", "0")
        return agent_arguments(words, *RUN, *more, "--agent-memory-archive", str(run / "archive.jsonl"))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainer = make_trainer(argv(whole))
    told = record(trainer)
    trainer.train()
    last = told.records[-1]
    assert last["run_memory_entries"] == 9 and last["run_memory_evicted"] > 0
    seed = draws.Random(20261127)
    # After the third and the fifth step the archive has what no checkpoint knows of.
    for point, iteration in (("gradients", seed.randint(1, 2)), ("write", 3), ("rename", 5), ("gradients", 6)):
        status = dies_at(lambda: make_trainer(argv(killed)).train(), point, iteration)
        assert status == -signal.SIGKILL, point
    make_trainer(argv(killed)).train()
    ours, expected = content(killed), content(whole)
    assert ours.keys() == expected.keys() and len(expected) > 1
    for name, value in expected.items():
        assert ours[name] == value, name
    archive = (whole / "archive.jsonl").read_bytes()
    assert archive and (killed / "archive.jsonl").read_bytes() == archive
    config, path = make_config(argv(whole)), list_steps(whole)[-1][1]
    index = index_of_run(config, read_meta(path), path, ParallelContext.single())
    assert index is not None and len(index) == 9 and any(one.key.any() for one in index.entries())
    other = make_trainer(argv(killed))
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, weights(other)[name]), name
    asks_with_it(whole, capsys)


def asks_with_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tools/agent.py finds the run's memory by itself, and its archive where it is told."""
    trained, archive = restored(str(run)), str(run / "archive.jsonl")
    arguments = ("--task", "kv_chunks", "--examples", "1", "--max-new-tokens", "1", "--json")
    printed(trained, capsys, *arguments)
    assert trained.config.run_memory.kept

    def looked_up(*more: str) -> tuple[list[int], str]:
        module = tool()
        desk = module.AgentDesk(module.parse_arguments(["--load", "run", *arguments, *more]), trained)
        index, sizes = desk.asker.root.memory.index.beneath, []
        while index is not None:
            index = sizes.append(len(index)) or index.beneath
        return sizes, capsys.readouterr().err

    lost = len(Path(archive).read_text().splitlines())
    sizes, said = looked_up()
    assert sizes == [9] and "the 9 chunks of the run's memory are looked up too" in said
    assert looked_up("--agent-memory-archive", archive)[0] == [9, lost]
    assert looked_up("--agent-memory-archive", archive, "--agent-memory", "episode")[0] == [lost]
    assert looked_up("--agent-memory", "episode") == ([], "")
    del trained.meta["state"]["callbacks.run_memory"]
    with pytest.raises(UserError, match="keeps no memory of its run; train with --agent-memory run"):
        looked_up()


def test_flags_of_the_memory() -> None:
    assert not RunMemoryConfig().kept and RunMemoryConfig(agent_memory="run").kept
    with pytest.raises(UserError, match="--agent-memory-archive '': give the name of a file"):
        RunMemoryConfig(agent_memory_archive="").validate()
