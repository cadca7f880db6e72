"""Every schedule on real ranks against the whole model in one process."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from megaforge.parallel.context import Axis
from megaforge.parallel.pipeline.executor import PipelineExecutor, StageOutput
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.parallel.pipeline.stage_tensors import StageTensor
from tests.parallel.pipeline.toy import HIDDEN, TOKENS, VALUES, ToyRun, oracle, run_toy
from tests.parallel.pool import RankPool

LAYERS = 8
SCHEDULES = [
    *[(name, pp, 1, microbatches) for name in ("gpipe", "1f1b", "zb-h1") for pp, microbatches in ((2, 5), (4, 6))],
    ("interleaved", 2, 2, 4),
    ("interleaved", 4, 2, 8),
    ("zb-v", 2, 2, 5),
    ("zb-v", 4, 2, 9),
    ("zb-v", 4, 2, 3),
]


def run(ranks: RankPool, name: str, pp: int, *args: object) -> list[ToyRun]:
    if pp == 1:
        return [run_toy(name, pp, *args)]
    return ranks.run(pp, run_toy, name, pp, *args)


def assert_matches_oracle(results: list[ToyRun], num_layers: int, microbatches: int, tied: bool = False) -> None:
    loss, expected = oracle(num_layers, microbatches, tied)
    total = sum(value for result in results for value in result.losses.values())
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-12)
    found = set()
    for result in results:
        assert result.executed == result.planned
        assert result.losses == result.evaluation
        for name, gradient in result.gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-12, msg=name)
            found.add(name)
    assert found == set(expected)


@pytest.mark.parametrize(("name", "pp", "vpp", "microbatches"), SCHEDULES)
def test_loss_and_every_gradient_equal_the_oracle(
    ranks: RankPool, name: str, pp: int, vpp: int, microbatches: int
) -> None:
    results = run(ranks, name, pp, vpp, microbatches, LAYERS, (), False)
    assert_matches_oracle(results, LAYERS, microbatches)
    for result in results:
        assert set(result.hook_calls.values()) == {microbatches}
        assert [chunk for chunk, last in result.announced if last] == sorted(range(vpp), reverse=True) or name == "zb-v"
        assert sorted(chunk for chunk, last in result.announced if last) == list(range(vpp))
        assert len(result.announced) == vpp * microbatches


@pytest.mark.parametrize(("name", "vpp"), [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 3), ("zb-v", 2)])
def test_one_rank(ranks: RankPool, name: str, vpp: int) -> None:
    assert_matches_oracle(run(ranks, name, 1, vpp, 3, 4, (), False), 4, 3)


@pytest.mark.parametrize(
    ("name", "pp", "vpp"), [("1f1b", 4, 1), ("interleaved", 2, 2), ("zb-v", 2, 2), ("interleaved", 2, 4)]
)
def test_carried_tensors_travel_once_to_every_rank(ranks: RankPool, name: str, pp: int, vpp: int) -> None:
    microbatches = 4
    results = run(ranks, name, pp, vpp, microbatches, LAYERS, (), False)
    sent = [shape for result in results for shape in result.sent]
    # Forward to every other rank and, for the differentiable one, its gradient back.
    assert sent.count((TOKENS, VALUES)) == 2 * (pp - 1) * microbatches
    assert sent.count((TOKENS,)) == (pp - 1) * microbatches
    crossings = (pp - 1) * vpp if name == "zb-v" else pp * vpp - 1
    assert sent.count((TOKENS, HIDDEN)) == 2 * crossings * microbatches


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("layer_cuts", [(1, 1, 2), (2, 3, 3), (0, 1, 2)], ids=["middle", "head-only", "embedding-only"])
def test_stage_without_layers(ranks: RankPool, name: str, layer_cuts: tuple[int, ...]) -> None:
    results = run(ranks, name, 4, 1, 4, 3, layer_cuts, False)
    assert_matches_oracle(results, 3, 4)


@pytest.mark.parametrize(
    ("name", "pp", "vpp"), [("1f1b", 2, 1), ("zb-h1", 4, 1), ("interleaved", 2, 2), ("zb-v", 2, 2)]
)
def test_weight_tied_over_first_and_last_stage(ranks: RankPool, name: str, pp: int, vpp: int) -> None:
    results = run(ranks, name, pp, vpp, 4, 4, (), True)
    for result in results:
        if "head" in result.gradients:
            result.gradients["embedding"] = result.gradients.pop("head")
    assert_matches_oracle(results, 4, 4, tied=True)
    copies = [result.gradients["embedding"] for result in results if "embedding" in result.gradients]
    assert all(torch.equal(copy, copies[0]) for copy in copies)


def test_sent_output_is_not_kept_for_the_backward_pass() -> None:
    """Between its passes a stage keeps its graph, but not the storage of what it handed on."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def step(chunk: nn.Module, _: None, payload: dict[str, torch.Tensor]) -> StageOutput:
        if not payload:
            hidden = chunk(torch.ones(1, 2))
            made.append(weakref.ref(hidden))
            return StageOutput({"hidden": hidden})
        alive.append(made[-1]() is not None)
        return StageOutput(loss=chunk(payload["hidden"]).sum())

    schedule = build_schedule("zb-v", pp=1, vpp=2, microbatches=1)
    payload = {"hidden": StageTensor((1, 2), torch.float32)}
    PipelineExecutor(schedule, Axis("pp"), [nn.Linear(2, 2), nn.Linear(2, 2)], payload).run([None], step)
    assert alive == [False]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"hidden": torch.ones(2, 2), "c": torch.ones(1)}, r"'hidden' as \(2, 2\) torch.float32; declared is \(1, 2\)"),
        ({"hidden": torch.ones(1, 2).double(), "c": torch.ones(1)}, "torch.float64"),
        ({"hidden": torch.ones(1, 2)}, "stage 0 did not return the payload tensor 'c'"),
        (
            {"hidden": torch.ones(1, 2), "c": torch.ones(1)},
            "stage 1 changed the carried payload tensor 'c', made by",
        ),
    ],
)
def test_payload_that_is_not_as_declared_is_an_error(output: dict[str, torch.Tensor], expected: str) -> None:
    schedule = build_schedule("interleaved", pp=1, vpp=3, microbatches=1)
    payload = {
        "hidden": StageTensor((1, 2), torch.float32),
        "c": StageTensor((1,), torch.float32, carried=True),
    }
    executor = PipelineExecutor(schedule, Axis("pp"), [nn.Identity()] * 3, payload)
    with pytest.raises(ValueError, match=expected):
        executor.run([None], lambda *_: StageOutput(output), gradients=False)


def test_loss_scale_multiplies_gradients_only() -> None:
    def step(chunk: nn.Module, x: torch.Tensor, _: object) -> StageOutput:
        loss = chunk(x).sum()
        return StageOutput(loss=loss, report=loss.item())

    found = []
    for scale in (1.0, 8.0):
        stage = nn.Linear(2, 1)
        nn.init.constant_(stage.weight, 0.5)
        nn.init.zeros_(stage.bias)
        schedule = build_schedule("zb-h1", pp=1, vpp=1, microbatches=2)
        executor = PipelineExecutor(schedule, Axis("pp"), [stage], {})
        losses = executor.run([torch.ones(1, 2)] * 2, step, loss_scale=scale)
        found.append((sum(losses.values()), stage.weight.grad[0, 0].item()))
    assert found == [(2.0, 2.0), (2.0, 16.0)]
