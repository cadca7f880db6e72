"""``tools/plan.py memory``, its search, and the predictions behind them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import parse_config
from megaforge.config.run_config import default_expert_tensor_parallel_size
from megaforge.errors import UserError
from megaforge.planning.communication import bandwidth, gradient_traffic, step_traffic
from megaforge.planning.costs import stage_cost
from megaforge.planning.counting_group import ring
from megaforge.planning.gpus import GPUS, Efficiency
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.memory import least_memory, rank_memory
from megaforge.planning.plan_command import run
from megaforge.planning.search import _bound as search_bound
from megaforge.planning.search import candidates, search, worst_rank
from megaforge.planning.stages import ModelParts, StagePart, cut_stages, model_parts, stage_parameters
from megaforge.planning.time import step_time

H100 = GPUS["h100-80g"]
SMALL = ["--config", "cdrmix-test", "--vocab-size", "500", "--global-batch-size", "16", "--micro-batch-size", "1"]


def test_memory_of_one_layout_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run("--config cdrmix-core-40b --tp 8 --pp 4 --ep 8 --dp 4 --zero 1 --gpu h100-80g".split())
    text = capsys.readouterr().out
    assert text.startswith("cdrmix-core-40b on 128 x h100-80g: --tp 8 --pp 4 --pipeline-schedule 1f1b --ep 8 --etp 4")
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit() or line.startswith("pp rank")]
    assert [row[0] for row in rows] == ["pp", "0", "1", "2", "3"] * 2
    for word in ("fullest rank", "bubble", "MFU", "assumed:", "tokens/s"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--gpu h100", "--gpu h100 is unknown; choose a100-80g"),
        ("--search", "--search needs --gpus"),
        ("--tp 3 --dp 1", "--tp 3 does not divide"),
        ("--ep 3 --dp 4", "--ep 3 does not divide both --num-experts 4"),
        ("--tp 4 --ep 4 --etp 4 --dp 2", "use --ep 1 or 2"),
        ("--pp 8 --dp 1", "use at most 4 stages"),
        ("--dp 3 --tp 1", "is not divisible by --micro-batch-size 1 x dp 3 = 3; use --global-batch-size 15"),
        ("--dp 1 --recompute some", "--recompute some"),
        ("--dp 2 --zero 2 --grad-compression bf16", "--grad-compression bf16 needs whole gradients"),
        ("--pp 2 --vpp 2 --pipeline-schedule 1f1b --dp 1", "--pipeline-schedule 1f1b with --vpp 2"),
        ("--gpus 6 --tp 4", "--tp 4 does not divide the 6 ranks"),
    ],
)
def test_impossible_plans_are_refused_by_name(arguments: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        run([*SMALL, *arguments.split()])
    assert words in str(refused.value)


def test_experts_get_the_tensor_parallelism_that_leaves_room() -> None:
    assert [
        default_expert_tensor_parallel_size(8, 8, 32),
        default_expert_tensor_parallel_size(8, 1, 32),
        default_expert_tensor_parallel_size(8, 4, 32),
        default_expert_tensor_parallel_size(2, 3, 8),
    ] == [4, 8, 8, 1]
    layout = layout_of(parse_config([*SMALL, "--tp", "4", "--ep", "4"]).config, 8)
    assert (layout.etp, layout.dp) == (2, 2)


def test_search_lists_the_fastest_that_fit() -> None:
    config = parse_config([*SMALL, "--bf16"]).config
    found = search(config, 4, H100, count=5)
    assert [item.time.total for item in found] == sorted(item.time.total for item in found)
    assert len({item.layout for item in found}) == 5
    for item in found:
        words = item.layout.describe().split()
        check_layout(parse_config([*SMALL, "--bf16", *words]).config, 4)
        assert item.memory.total <= 0.9 * H100.memory
    # Everything but the libraries would have to go: nothing fits, and nothing is listed.
    tight = dataclasses.replace(H100, memory=2e9)
    assert search(config, 4, tight) == []


@pytest.mark.parametrize("tight", [False, True])
def test_search_finds_what_trying_everything_finds(tight: bool) -> None:
    """Neither bound that saves work, on time and on memory, may throw the best away."""
    config = parse_config([*SMALL, "--bf16"]).config
    parts = model_parts(config.model, torch.bfloat16)
    layouts = [(layout, cut_stages(parts, layout)) for layout in candidates(config, 4)]
    gpu = H100
    if tight:  # a quarter fits as it is, and some more when they compute something again
        totals = sorted(worst_rank(parts, layout, stages).total for layout, stages in layouts)
        gpu = dataclasses.replace(H100, memory=totals[len(totals) // 4] / 0.9)
    times = {}
    for plain, stages in layouts:
        for recompute in ("none", "selective", "moe", "full"):
            layout = dataclasses.replace(plain, recompute=recompute)
            memory = worst_rank(parts, layout, stages).total
            assert all(least_memory(parts, layout, stages, rank) <= memory for rank in range(layout.pp))
            if memory <= 0.9 * gpu.memory:
                times[layout] = step_time(parts, layout, stages, gpu).total
                assert search_bound(parts, layout, stages, gpu, Efficiency()) <= times[layout]
                break
    assert any(layout.recompute != "none" for layout in times) == tight
    found = [item.time.total for item in search(config, 4, gpu, count=len(times))]
    assert found == pytest.approx(sorted(times.values()), rel=0.01)


def test_traffic_of_every_axis() -> None:
    config = parse_config(SMALL).config
    parts = model_parts(config.model, torch.bfloat16)
    middle, whole = StagePart(range(1, 2), False, False), StagePart(range(4), True, True)
    tokens, width = 64, 64

    def sent(**sizes: int | bool) -> dict[str, float]:
        layout = PlannedLayout(8, **({"etp": 1} | sizes), sequence_length=tokens, global_batch_size=8)  # type: ignore[arg-type]
        cost = stage_cost(parts, layout, middle)
        return {axis: cost.sent(axis) for axis in ("tp", "sp", "cp", "ep", "etp")}

    inside = tokens * width * 2
    reduce = inside  # a ring of two: each rank sends half of it twice
    # Two sublayers, each an all-reduce forward and one backward; the same bytes as gathers and scatters.
    assert sent(tp=2, etp=2) == {"tp": 4 * reduce, "sp": 0, "cp": 0, "ep": 0, "etp": 0}
    assert sent(tp=2, etp=2, sequence_parallel=True) == {"tp": 0, "sp": 4 * reduce, "cp": 0, "ep": 0, "etp": 0}
    # Two experts a token: rows go out and come back, forward and backward; their fp32 weights go out, and the gradients
    # of these come back; before, each rank says how many rows it has for each of the four experts.
    assert sent(ep=4)["ep"] == (4 * 2 * inside + 2 * 2 * tokens * 4 + 4 * 8) * 3 / 4
    assert sent(cp=2)["cp"] > 0
    layout = PlannedLayout(8, ep=2, sequence_length=tokens, global_batch_size=8)
    held = stage_parameters(parts, [whole])
    experts = sum(h.spec.numel * count / 2 for h, count in held if h.spec.expert_dim is not None)
    dense = sum(h.spec.numel * count for h, count in held if h.spec.expert_dim is None)
    reduced = gradient_traffic(held, layout).reduced
    assert reduced == pytest.approx(2 * 4 * (ring(dense, 8) + ring(experts, 4)))
    shared = gradient_traffic(held, dataclasses.replace(layout, zero=1))
    assert shared.reduced == reduced / 2 and 0 < shared.gathered < shared.reduced


def test_recomputation_costs_time_and_a_pipeline_has_a_bubble() -> None:
    config = parse_config(["--config", "cdrmix-core-40b"]).config
    parts = model_parts(config.model, torch.bfloat16)
    plain = PlannedLayout(
        128, tp=8, etp=8, sequence_parallel=True, pp=4, zero=1, sequence_length=2048, global_batch_size=64
    )
    stages = cut_stages(parts, plain)
    times = {
        name: step_time(parts, dataclasses.replace(plain, recompute=name), stages, H100)
        for name in ("none", "selective", "moe", "full")
    }
    assert times["none"].total < times["selective"].total < times["full"].total
    assert times["none"].total < times["moe"].total < times["full"].total
    # 16 micro-batches on 4 stages: (p - 1) / (m + p - 1), and a little for unequal stages and transfers.
    assert 3 / 19 <= times["none"].bubble < 3 / 19 + 0.05
    assert 0.05 < times["none"].mfu < Efficiency().matmul


def small_plan(*flags: str) -> tuple[ModelParts, PlannedLayout, tuple[StagePart, ...]]:
    config = parse_config(flags).config
    layout = layout_of(config, 1)
    parts = model_parts(config.model, layout.dtype)
    return parts, layout, cut_stages(parts, layout)


def test_copies_to_host_memory_take_time(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_config(["--config", "cdrmix-core-1b", "--bf16", "--zero", "1", "--optimizer", "paged_adam"]).config
    parts, layout = model_parts(config.model, torch.bfloat16), layout_of(config, 8)
    stages, speed = cut_stages(parts, layout), H100.host_bandwidth * Efficiency().host
    moments = rank_memory(parts, layout, stages, 0).state.host
    paged = step_time(parts, layout, stages, H100)
    assert paged.optimizer == pytest.approx(moments / speed), "they come and go at once"
    fast = dataclasses.replace(H100, host_bandwidth=1e15)
    assert 0 < step_time(parts, layout, stages, fast).optimizer < paged.optimizer / 2
    offloaded = dataclasses.replace(layout, offload=True)
    memory = rank_memory(parts, offloaded, stages, 0)
    slower = step_time(parts, offloaded, stages, H100).pipeline - paged.pipeline
    assert slower == pytest.approx(2 * layout.micro_batches * memory.host / speed)
    run("--config cdrmix-core-1b --bf16 --dp 8 --cpu-offload-activations".split())
    assert f"activations in host memory: {memory.host / 1e9:.2f} GB a rank" in capsys.readouterr().out
    run("--config cdrmix-test --vocab-size 500 --train-tokens 8640000000".split())
    days = 1e5 / step_time(*small_plan("--config", "cdrmix-test", "--vocab-size", "500"), H100).tokens_per_second
    assert f"--train-tokens 8,640,000,000: {days:,.1f} days of 1 x h100-80g" in capsys.readouterr().out


def test_orthogonalization_takes_time_that_replicas_share() -> None:
    rates = {}
    for rule, zero in (("adam", 0), ("muon", 0), ("muon", 1)):
        flags = ["--config", "cdrmix-core-1b", "--bf16", "--zero", str(zero), "--optimizer", rule]
        config = parse_config(flags).config
        parts, layout = model_parts(config.model, torch.bfloat16), layout_of(config, 8)
        without = dataclasses.replace(H100, memory_bandwidth=1e30)  # what is left are products
        rates[rule, zero] = step_time(parts, layout, cut_stages(parts, layout), without).optimizer
    assert rates["adam", 0] < 1e-9 and rates["muon", 1] == pytest.approx(rates["muon", 0] / 8)
    # Five steps of 1.5 m^2 n + 0.5 m^3 multiply-adds for matrices of the hidden size, 2,048, squared or longer.
    least = 2 * 5 * 2 * 2048 * 3.5e9 / (H100.matmul * Efficiency().grouped_matmul)
    assert least * 0.5 < rates["muon", 0] < least * 3


def test_groups_that_leave_the_server_are_slower() -> None:
    layout = PlannedLayout(128, tp=8, pp=4, ep=8, etp=1, global_batch_size=128)
    speed = {axis: bandwidth(layout, axis, H100, Efficiency()) for axis in ("tp", "ep", "dp", "pp")}
    assert speed["tp"] == speed["ep"] == H100.node_bandwidth * Efficiency().node
    assert speed["dp"] == speed["pp"] == H100.network_bandwidth * Efficiency().network
    alone = PlannedLayout(128, global_batch_size=128)  # eight ranks of the ring in a server share its eight links
    assert bandwidth(alone, "dp", H100, Efficiency()) == min(8 * speed["dp"], speed["tp"])


def test_every_rank_of_a_pipeline_is_planned() -> None:
    config = parse_config([*SMALL, "--bf16", "--pp", "2"]).config
    layout = layout_of(config, 4)
    parts = model_parts(config.model, torch.bfloat16)
    stages = cut_stages(parts, layout)
    first, last = (rank_memory(parts, layout, stages, rank) for rank in (0, 1))
    assert (first.in_flight, last.in_flight) == (2, 1)
    assert step_traffic(parts, layout, stages, 0)["pp"] == step_traffic(parts, layout, stages, 1)["pp"] > 0
