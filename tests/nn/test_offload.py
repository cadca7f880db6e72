"""Activations in host memory, by the host's side of it: what goes, in which order it comes back, who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import megaforge.nn.offload as offload
from megaforge.nn.offload import AHEAD, HostMemory


class Queues:
    """Stand-ins of a device's queues, which note what is done in which; a mark is a place in one of them."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.made = 0

    def __call__(self, device: torch.device, *, current: bool = False) -> _Queue:
        if not current:
            self.made += 1
        return _Queue(self, "current" if current else ("out", "back")[(self.made - 1) % 2])


class _Queue:
    def __init__(self, queues: Queues, name: str) -> None:
        self.queues, self.name = queues, name

    @contextmanager
    def after(self, *marks: Any) -> Iterator[None]:
        self.queues.log.append((self.name, marks))
        yield

    def wait(self, mark: Any) -> None:
        self.queues.log.append((f"{self.name} waits", mark))

    def mark(self) -> Any:
        return self.name, len(self.queues.log)


def chain(x: Tensor, layers: int) -> Tensor:
    for _ in range(layers):
        x = x.sin()  # keeps its input
    return x


def test_gradients_are_the_same_and_weights_stay() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(5, 8)

    def loss() -> Tensor:
        return chain(chain(x @ weight, 3) @ weight.t(), 2).sum()

    expected = torch.autograd.grad(loss(), weight)
    memory = HostMemory([weight], "cpu")
    with memory:
        kept = loss()
    assert memory.moved == 4 * 5 * 8 * (2 + 3 + 2)  # the inputs of both products and of each sine; weights stay
    for again in (True, False):
        assert torch.equal(torch.autograd.grad(kept, weight, retain_graph=again)[0], expected[0])
    assert memory.ahead == 4 * 5 * 8 * AHEAD, "as many of them as may be on their way at once"
    assert HostMemory([weight]).moved == HostMemory([weight]).ahead == 0


@pytest.mark.parametrize("layers", [1, AHEAD, 10])
def test_few_tensors_are_on_their_way_and_each_is_waited_for(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    queues = Queues()
    monkeypatch.setattr(offload, "Queue", queues)
    memory, x = HostMemory([], "cpu"), torch.randn(4, requires_grad=True)
    with memory:
        y = chain(x, layers)
        assert len(memory._going) == min(layers, AHEAD)
    out = [entry for entry in queues.log if entry[0] == "out"]
    assert len(out) == layers and all(mark[0] == "current" for (_, (mark,)) in out)
    assert sum(name == "current waits" for name, _ in queues.log) == max(0, layers - AHEAD)
    queues.log.clear()
    y.sum().backward()
    assert not memory._going
    waited = [mark for name, mark in queues.log if name == "current waits" and mark[0] == "back"]
    assert len(waited) == layers == len(set(waited))
    started = [place for place, (name, _) in enumerate(queues.log) if name == "back"]
    asked = [place for place, (name, mark) in enumerate(queues.log) if name == "current waits" and mark[0] == "back"]
    for number, place in enumerate(asked):  # those that follow are on their way when one is asked for
        assert sum(one < place for one in started) == min(number + 1 + AHEAD, layers)
    assert x.grad is not None and torch.equal(x.grad, torch.autograd.grad(chain(x, layers).sum(), x)[0])


def test_what_comes_back_for_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    queues = Queues()
    monkeypatch.setattr(offload, "Queue", queues)
    memory, x = HostMemory([], "cpu"), torch.randn(4, requires_grad=True)
    with memory:
        first = x.sin()
        second = x.cos()
    second.sum().backward()  # the other's input is on its way, too
    queues.log.clear()
    del first
    assert [name for name, _ in queues.log] == ["current waits"]
