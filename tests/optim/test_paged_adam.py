"""AdamW with its moments in host memory: the numbers of AdamW, whatever the chunks, and who waits for whom."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.errors import UserError
from megaforge.optim import Optimizer, paged_adam
from megaforge.optim.paged_adam import BUFFERS, PagedAdam
from megaforge.parallel.context import ParallelContext
from megaforge.planning.gpus import GPUS
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.report import plan_text
from megaforge.planning.stages import model_parts
from tests.optim.small_model import SPECS, SmallModel, global_gradients, set_gradients


@pytest.fixture(autouse=True)
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is our own; bitsandbytes may be installed for others."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)


RATES = (1e-2, 2e-2, 5e-3)
ELEMENTS = sum(spec.numel for spec in SPECS)


def config(rule: str) -> OptimizerConfig:
    return OptimizerConfig(optimizer=rule, weight_decay=0.1)


def run(rule: str, dtype: torch.dtype) -> tuple[Optimizer, dict[str, torch.Tensor]]:
    ctx = ParallelContext.single()
    model = SmallModel(ctx, dtype)
    optimizer = Optimizer(config(rule), model, ctx)
    for step, rate in enumerate(RATES):
        set_gradients(model, ctx, global_gradients(step))
        optimizer.decay_factor = 0.5 if step == 1 else 1.0
        optimizer.step(rate)
    return optimizer, {name: tensor.clone() for name, _, tensor in optimizer.entries()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_cpu_it_is_adam_bit_for_bit(dtype: torch.dtype) -> None:
    optimizer, found = run("paged_adam", dtype)
    for name, tensor in run("adam", dtype)[1].items():
        assert torch.equal(found[name], tensor), name
    assert optimizer.implementation == "torch fused AdamW, moments in host memory"
    assert optimizer.host_bytes == 2 * ELEMENTS * (8 if dtype == torch.float64 else 4)
    assert run("adam", dtype)[0].host_bytes == 0


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(paged_adam, "_moves", lambda masters: True)
    monkeypatch.setattr(PagedAdam, "chunk", chunk)
    optimizer, found = run("paged_adam", dtype)
    assert optimizer.implementation.endswith("moved in chunks")
    for name, tensor in run("adam", dtype)[1].items():
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


class Noted:
    """A queue that notes what is started in it, and behind what."""

    nodes: list[tuple[str, set[int]]]  # of all queues: which queue, and what surely came before
    last: dict[str, int]
    names: Iterator[str]

    def __init__(self, device: torch.device, current: bool = False) -> None:
        self.name = "compute" if current else next(Noted.names)

    @contextmanager
    def after(self, *marks: int | None) -> Iterator[None]:
        before = {mark for mark in (*marks, Noted.last.get(self.name)) if mark is not None}
        before |= {earlier for mark in before for earlier in Noted.nodes[mark][1]}
        Noted.last[self.name] = len(Noted.nodes)
        Noted.nodes.append((self.name, before))
        yield

    def mark(self) -> int | None:
        return Noted.last.get(self.name)


def test_no_buffer_is_filled_before_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_adam, "_moves", lambda masters: True)
    monkeypatch.setattr(paged_adam, "Queue", Noted)
    monkeypatch.setattr(PagedAdam, "chunk", 16)
    Noted.nodes, Noted.last, Noted.names = [], {}, iter(["arrive", "leave"] * 3)
    run("paged_adam", torch.float32)
    of: dict[str, list[int]] = {name: [] for name in ("arrive", "compute", "leave")}
    for place, (name, _) in enumerate(Noted.nodes):
        of[name].append(place)
    chunks = len(of["arrive"]) // len(RATES)
    assert chunks > 2 * BUFFERS and len(of["compute"]) == len(RATES) * (chunks + 1)

    def before(first: int, second: int) -> bool:
        return first in Noted.nodes[second][1]

    for step in range(len(RATES)):
        arrive, leave = (of[name][step * chunks : (step + 1) * chunks] for name in ("arrive", "leave"))
        *compute, end = of["compute"][step * (chunks + 1) : (step + 1) * (chunks + 1)]
        for index in range(chunks):
            assert before(arrive[index], compute[index]) and before(compute[index], leave[index])
            assert before(leave[index], end)
            if index >= BUFFERS:
                assert before(leave[index - BUFFERS], arrive[index])
            if 0 < index < chunks - 1:  # and what could overlap is not made to wait
                assert not before(compute[index], arrive[index + 1]) and not before(leave[index - 1], arrive[index + 1])
        if step:
            assert before(of["leave"][step * chunks - 1], arrive[0])


def test_the_plan_names_what_lies_in_host_memory() -> None:
    flags = ["--config", "cdrmix-core-1b", "--bf16", "--optimizer"]

    def text(rule: str) -> str:
        plan = parse_config([*flags, rule]).config
        layout: PlannedLayout = planned_layout(plan, 8)
        return plan_text(model_parts(plan.model, layout.dtype), layout, GPUS["h100-80g"], "x")

    told = "optimizer state in host memory: "
    assert told in text("paged_adam") and told not in text("adam")


@pytest.mark.parametrize("line", ["--optimizer-cpu-offload", "--optimizer-offload-fraction 0.5"])
def test_megatrons_flags_are_told_what_to_write(line: str) -> None:
    with pytest.raises(UserError, match="write --optimizer paged_adam"):
        parse_config(line.split())


def test_numbers_that_are_not_finite_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_adam, "_moves", lambda masters: True)
    monkeypatch.setattr(PagedAdam, "chunk", 5)
    ctx, bad = ParallelContext.single(), global_gradients(0)
    bad["row.weight"][1, 2] = float("nan")
    bad["mix"][:] = 0.0
    model = SmallModel(ctx)
    optimizer: Any = Optimizer(config("paged_adam"), model, ctx)
    set_gradients(model, ctx, bad)
    optimizer.step(1e-2)
    found = {name: tensor for name, _, tensor in optimizer.weight_entries()}
    assert int(found["row.weight"].isnan().sum()) == 1 and bool(found["row.weight"][1, 2].isnan())
    assert bool(found["column.weight"].isfinite().all()) and bool(found["mix"].isfinite().all())


class PagedStandIn(torch.optim.Optimizer):
    """What bitsandbytes' PagedAdamW32bit is seen to do: moments by other names in its own buffers, an integer step."""

    def __init__(self, params: list, lr: float, betas: tuple, eps: float, weight_decay: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def init_state(self, group: dict, p: torch.Tensor, gindex: int, pindex: int) -> None:
        assert self.param_groups[gindex]["params"][pindex] is p
        self.state[p] = {"step": 0, "state1": torch.zeros_like(p), "state2": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                state["step"] += 1
                state["state1"].lerp_(p.grad, 1 - beta1)
                state["state2"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                unbiased = (state["state2"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] * (state["state1"] / (1 - beta1 ** state["step"])) / unbiased)


def test_bitsandbytes_is_told_everything_and_its_buffers_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_adam, "_moves", lambda masters: True)
    monkeypatch.setattr(paged_adam, "_bitsandbytes", lambda: PagedStandIn)
    ctx = ParallelContext.single()
    model, peer_model = SmallModel(ctx), SmallModel(ctx)
    optimizer, peer = Optimizer(config("paged_adam"), model, ctx), Optimizer(config("adam"), peer_model, ctx)
    for step, rate in enumerate(RATES):
        if step == 2:  # a run that is continued
            resumed = Optimizer(config("paged_adam"), model, ctx)
            for (_, _, new), (_, _, old) in zip(resumed.entries(), optimizer.entries(), strict=True):
                new.copy_(old)
            resumed.load_state(optimizer.state())
            optimizer = resumed
        for each, of in ((optimizer, model), (peer, peer_model)):
            set_gradients(of, ctx, global_gradients(step))
            each.step(rate)
    assert optimizer.implementation == "bitsandbytes PagedAdamW32bit"
    for (name, _, one), (_, _, two) in zip(optimizer.entries(), peer.entries(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)
    assert "moved in chunks" in Optimizer(config("paged_adam"), SmallModel(ctx, torch.float64), ctx).implementation


def test_without_bitsandbytes_moments_are_moved_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", broken := types.ModuleType("bitsandbytes"))
    broken.__spec__ = types.SimpleNamespace(name="bitsandbytes")  # type: ignore[assignment]
    assert paged_adam._bitsandbytes() is None  # it is there, but has no optimizers
