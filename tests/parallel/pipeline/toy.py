"""A residual stack whose first layer makes a tensor that all later ones read, like RWKV-7's v_first; and its oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.parallel.context import Axis
from megaforge.parallel.pipeline.actions import Action
from megaforge.parallel.pipeline.executor import PipelineExecutor, StageOutput, _GlobalBatch
from megaforge.parallel.pipeline.partition import partition_layers
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.parallel.pipeline.stage_tensors import StageTensor
from megaforge.parallel.pipeline.tied import sum_tied_gradient, tied_ranks

TOKENS, HIDDEN, VALUES, VOCAB = 3, 4, 5, 7


def make_stage_tensors(v_first_made_by: int) -> dict[str, StageTensor]:
    return {
        "hidden": StageTensor((TOKENS, HIDDEN), torch.float64),
        "v_first": StageTensor((TOKENS, VALUES), torch.float64, carried=True, made_by=v_first_made_by),
        "documents": StageTensor((TOKENS,), torch.int64, carried=True, differentiable=False),
    }


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Product(torch.autograd.Function):
    """x W^T by a node written in Python, whose life autograd does not tie to the Python object."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


class ToyLayer(nn.Module):
    """x + f(norm(x), v_first), with weights behind matmuls, in elementwise products, and one used twice."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.is_first = index == 0
        self.norm = nn.Parameter(1 + 0.1 * randn(10 * index, HIDDEN))
        self.mix = nn.Parameter(randn(10 * index + 1, HIDDEN))
        self.value = nn.Parameter(0.5 * randn(10 * index + 2, VALUES, HIDDEN))
        self.gate = nn.Parameter(randn(10 * index + 3, VALUES))
        self.out = nn.Parameter(0.5 * randn(10 * index + 4, HIDDEN, VALUES))
        self.twice = nn.Parameter(0.5 * randn(10 * index + 5, HIDDEN, HIDDEN))

    def forward(self, x: Tensor, v_first: Tensor | None, documents: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.layer_norm(x, (HIDDEN,), self.norm)
        shifted = torch.roll(y, 1, 0) * (documents == torch.roll(documents, 1, 0)).unsqueeze(1)
        value = (y + (shifted - y) * self.mix) @ self.value.T
        if self.is_first:
            v_first = value
        else:
            assert v_first is not None
            value = value + (v_first - value) * torch.sigmoid(self.gate)
        x = x + Product.apply(torch.tanh(value), self.out)
        return x + torch.tanh(x @ self.twice) @ self.twice, v_first


class ToyStage(nn.Module):
    """Some layers; the first stage also embeds, the last also has the head. Either may be all there is."""

    def __init__(
        self, layers: range, is_first: bool, is_last: bool, embedding: nn.Parameter | None, head: nn.Parameter | None
    ):
        super().__init__()
        self.names = [str(index) for index in layers]
        self.layers = nn.ModuleDict({name: ToyLayer(int(name)) for name in self.names})
        self.is_first, self.is_last = is_first, is_last
        self.embedding = embedding
        self.head = head

    def forward(self, batch: dict[str, Tensor], payload: dict[str, Tensor]) -> StageOutput:
        hidden, v_first, documents = (payload.get(name) for name in ("hidden", "v_first", "documents"))
        if self.is_first:
            documents = batch["documents"]
            hidden = self.embedding[batch["tokens"]]
        auxiliary = []
        for name in self.names:
            hidden, v_first = self.layers[name](hidden, v_first, documents)
            auxiliary.append(hidden.square().mean() * 0.01)
        loss = sum(auxiliary) if auxiliary else None
        if self.is_last:
            main = nn.functional.cross_entropy(hidden @ self.head.T, batch["labels"])
            loss = main if loss is None else main + loss
        out = {"hidden": hidden, "v_first": v_first} | ({"documents": documents} if self.is_first else {})
        return StageOutput(out, loss, report=None if loss is None else loss.detach())


def forward_step(chunk: nn.Module, batch: dict[str, Tensor], payload: dict[str, Tensor]) -> StageOutput:
    return chunk(batch, payload)


def make_stage(layers: range, stage: int, num_stages: int, weights: dict[str, nn.Parameter], tied: bool) -> ToyStage:
    is_first, is_last = stage == 0, stage + 1 == num_stages
    if is_first and "embedding" not in weights:
        weights["embedding"] = nn.Parameter(randn(1000, VOCAB, HIDDEN))
    if is_last:
        same = tied and "embedding" in weights
        weights["head"] = weights["embedding"] if same else nn.Parameter(randn(1000, VOCAB, HIDDEN))
    return ToyStage(
        layers, is_first, is_last, weights["embedding"] if is_first else None, weights["head"] if is_last else None
    )


def make_batches(count: int) -> list[dict[str, Tensor]]:
    batches = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCAB, (TOKENS + 1,), generator=generator)
        documents = torch.randint(2, (TOKENS,), generator=generator)
        batches.append({"tokens": tokens[:-1], "labels": tokens[1:], "documents": documents})
    return batches


@dataclass
class ToyRun:
    """What a rank found: gradients by global name, losses by (microbatch, stage), what it did and sent."""

    gradients: dict[str, Tensor]
    losses: dict[tuple[int, int], Tensor]
    executed: tuple[Action, ...]
    planned: tuple[Action, ...]
    sent: list[tuple[int, ...]]
    hook_calls: dict[str, int]
    announced: list[tuple[int, bool]]
    evaluation: dict[tuple[int, int], Tensor]


def gradients_of(stages: list[ToyStage]) -> dict[str, Tensor]:
    found = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad
    return found


def oracle(num_layers: int, microbatches: int, tied: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and all gradients of the whole model in one piece, by plain autograd."""
    stage = make_stage(range(num_layers), 0, 1, {}, tied)
    total = sum(stage(batch, {}).loss for batch in make_batches(microbatches))
    total.backward()
    return total.detach(), gradients_of([stage])


def run_toy(
    name: str, pp: int, vpp: int, microbatches: int, num_layers: int, layer_cuts: tuple[int, ...], tied: bool
) -> ToyRun:
    """One rank's part of the toy under a schedule; in a world of one, everything."""
    axis = Axis("pp", pp, dist.get_rank(), dist.group.WORLD) if pp > 1 else Axis("pp")
    schedule = build_schedule(name, pp=pp, vpp=vpp, microbatches=microbatches)
    # Cuts at the same place make an empty stage, which the partition itself would refuse.
    bounds = [0, *layer_cuts, num_layers]
    parts = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)] if layer_cuts else None
    parts = parts or partition_layers([1.0] * num_layers, pp * vpp)
    weights: dict[str, nn.Parameter] = {}
    stages = [make_stage(parts[s], s, pp * vpp, weights, tied) for s in schedule.stages_of(axis.rank)]
    hook_calls: dict[str, int] = {}
    for stage in stages:
        for parameter_name, parameter in stage.named_parameters():

            def count(_: Tensor, parameter_name: str = parameter_name) -> None:
                hook_calls[parameter_name] = hook_calls.get(parameter_name, 0) + 1

            parameter.register_post_accumulate_grad_hook(count)
    announced: list[tuple[int, bool]] = []
    payload = make_stage_tensors(next(stage for stage, part in enumerate(parts) if 0 in part))
    executor = PipelineExecutor(
        schedule, axis, stages, payload, before_weight_gradients=lambda *call: announced.append(call)
    )
    sent = _record_sends()
    with mock.patch.object(_GlobalBatch, "step", autospec=True, side_effect=_GlobalBatch.step) as steps:
        losses = executor.run(make_batches(microbatches), forward_step)
    executed = tuple(call.args[1] for call in steps.mock_calls if isinstance(call.args[1], Action))
    recorded = list(sent)
    evaluation = executor.run(make_batches(microbatches), forward_step, gradients=False)
    dist.batch_isend_irecv = sent.original
    if tied and axis.rank in tied_ranks(schedule):
        sum_tied_gradient(weights["embedding" if "embedding" in weights else "head"].grad, schedule, axis)
    return ToyRun(
        gradients_of(stages),
        losses,
        executed,
        schedule.actions[axis.rank],
        recorded,
        hook_calls,
        announced,
        evaluation,
    )


class _Sends(list[tuple[int, ...]]):
    original: Any


def _record_sends() -> _Sends:
    """Notes the shape of every tensor sent."""
    sent = _Sends()
    sent.original = dist.batch_isend_irecv

    def spy(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(tuple(op.tensor.shape) for op in operations if op.op is dist.isend)
        return sent.original(operations)

    dist.batch_isend_irecv = spy
    return sent
