"""Schedules: valid at every size where they are defined, with the published bubbles and peaks of live activations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Action, ActionKind, Schedule, format_schedule, parse_schedule
from megaforge.parallel.pipeline.program import build_program, check_program
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.parallel.pipeline.simulator import Costs, simulate
from megaforge.registry import SCHEDULES


def defined(name: str, pp: int) -> list[Schedule]:
    """All schedules ``name`` for vpp 1..4 and 1..32 microbatches."""
    found = []
    for vpp in range(1, 5):
        for microbatches in range(1, 33):
            try:
                found.append(build_schedule(name, pp=pp, vpp=vpp, microbatches=microbatches))
            except UserError:
                continue
    return found


@pytest.mark.parametrize("pp", range(1, 9))
@pytest.mark.parametrize("name", SCHEDULES.names())
def test_valid_and_free_of_deadlock_wherever_defined(name: str, pp: int) -> None:
    schedules = defined(name, pp)
    expected = {"interleaved": 3 * (32 // pp)}.get(name, 32)
    assert len(schedules) == expected
    for schedule in schedules:
        check_program(schedule, build_program(schedule))
        if schedule.num_microbatches <= 2 * pp:
            forward = schedule.forward_only()
            check_program(forward, build_program(forward, forward_only=True))


@pytest.mark.parametrize("pp", range(1, 9))
@pytest.mark.parametrize("costs", [Costs(), Costs(1.0, 1.4, 0.7)], ids=["equal", "unequal"])
def test_bubble_of_gpipe_and_1f1b_is_the_published_one(pp: int, costs: Costs) -> None:
    for name in ("gpipe", "1f1b"):
        for m in (1, 2, 3, 5, 8, 16, 32):
            timeline = simulate(build_schedule(name, pp=pp, vpp=1, microbatches=m), costs)
            for rank in range(pp):
                assert timeline.bubble_share(rank) == pytest.approx((pp - 1) / (m + pp - 1))


@pytest.mark.parametrize("pp", range(1, 9))
@pytest.mark.parametrize("vpp", [2, 3, 4])
def test_bubble_and_peak_of_interleaved_are_the_published_ones(pp: int, vpp: int) -> None:
    for m in range(pp, 33, pp):
        timeline = simulate(build_schedule("interleaved", pp=pp, vpp=vpp, microbatches=m))
        for rank in range(pp):
            assert timeline.bubble_share(rank) == pytest.approx((pp - 1) / (vpp * m + pp - 1))
            assert timeline.peak_live(rank) == min(2 * (pp - 1 - rank) + (vpp - 1) * pp + 1, vpp * m)


@pytest.mark.parametrize("pp", range(1, 9))
def test_zb_h1_has_a_third_of_the_bubble_of_1f1b_and_its_peak(pp: int) -> None:
    """Table 2 of arXiv 2401.10241: (p-1)(F+I-W) against (p-1)(F+I+W), here with F = I = W."""
    for m in range(pp, 33):
        zero_bubble = simulate(build_schedule("zb-h1", pp=pp, vpp=1, microbatches=m))
        plain = simulate(build_schedule("1f1b", pp=pp, vpp=1, microbatches=m))
        assert plain.makespan - 3 * m == 3 * (pp - 1)
        assert zero_bubble.makespan - 3 * m == pp - 1
        assert {zero_bubble.peak_live(rank) for rank in range(pp)} == {pp} == {plain.peak_live(0)}


@pytest.mark.parametrize("costs", [(1.0, 1.2, 0.8), (1.0, 1.0, 0.5), (2.0, 2.5, 2.0)])
def test_zb_h1_bubble_follows_its_costs(costs: tuple[float, float, float]) -> None:
    forward, backward_input, backward_weight = costs
    for pp in (2, 4, 8):
        m = 3 * pp
        timeline = simulate(build_schedule("zb-h1", pp=pp, vpp=1, microbatches=m), Costs(*costs))
        bubble = (pp - 1) * (forward + backward_input - backward_weight)
        assert timeline.makespan - m * sum(costs) == pytest.approx(bubble)


@pytest.mark.parametrize("pp", range(1, 9))
def test_zb_v_never_idles_inside_a_rank_and_keeps_no_more_than_1f1b(pp: int) -> None:
    for m in range(1, 33):
        timeline = simulate(build_schedule("zb-v", pp=pp, vpp=2, microbatches=m))
        for rank in range(pp):
            assert timeline.peak_live(rank) <= 2 * pp
            if m >= 2 * pp - 1:
                assert timeline.window_bubble(rank) == 0
                assert timeline.peak_live(rank) == 2 * pp
        if m >= 2 * pp - 1:
            assert timeline.makespan == 6 * m + pp - 1


def test_zero_bubble_beats_the_others_in_the_simulator() -> None:
    sizes = {"1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}
    shares = {
        name: simulate(build_schedule(name, pp=4, vpp=vpp, microbatches=8)).bubble_share()
        for name, vpp in sizes.items()
    }
    assert shares == pytest.approx({"1f1b": 3 / 11, "interleaved": 3 / 19, "zb-h1": 3 / 27, "zb-v": 3 / 51})


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 1), (2, 4), (4, 3), (4, 8), (5, 20)])
def test_zb_v_is_the_order_of_torch(pp: int, microbatches: int) -> None:
    schedule = build_schedule("zb-v", pp=pp, vpp=2, microbatches=microbatches)
    owner = SimpleNamespace(pp_group_size=pp, num_stages=2 * pp, _n_microbatches=microbatches)
    for rank in range(pp):
        theirs = torch_schedules.ScheduleZBVZeroBubble._calculate_single_rank_operations(owner, rank)
        assert schedule.actions[rank] == tuple(from_torch(a) for a in theirs if a is not None)


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 4), (3, 4, 9)])
def test_interleaved_is_the_order_of_torch(pp: int, vpp: int, microbatches: int) -> None:
    schedule = build_schedule("interleaved", pp=pp, vpp=vpp, microbatches=microbatches)
    owner = SimpleNamespace(
        pp_group_size=pp,
        n_local_stages=vpp,
        _n_microbatches=microbatches,
        microbatches_per_round=pp,
        number_of_rounds=microbatches // pp,
    )
    for rank in range(pp):
        theirs = torch_schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations(owner, rank)
        assert schedule.actions[rank] == tuple(from_torch(a) for a in theirs if a is not None)


def from_torch(action: torch_schedules._Action) -> Action:
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    return Action(ActionKind(kinds[action.computation_type.name]), action.stage_index, action.microbatch_index)


def test_written_orders() -> None:
    assert format_schedule(build_schedule("1f1b", pp=2, vpp=1, microbatches=3)) == (
        "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2\nF1.0 B1.0 F1.1 B1.1 F1.2 B1.2"
    )
    assert format_schedule(build_schedule("interleaved", pp=2, vpp=2, microbatches=2)) == (
        "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1\nF1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1"
    )
    assert (
        format_schedule(build_schedule("zb-h1", pp=2, vpp=1, microbatches=2)).splitlines()[1]
        == "F1.0 I1.0 F1.1 I1.1 W1.0 W1.1"
    )


def test_text_round_trip() -> None:
    schedule = build_schedule("zb-v", pp=3, vpp=2, microbatches=4)
    assert parse_schedule("# a comment\n" + format_schedule(schedule), "zb-v", 2, "v") == schedule


@pytest.mark.parametrize(
    ("name", "pp", "vpp", "microbatches", "expected"),
    [
        ("interleaved", 4, 2, 3, "multiple of --pp; valid here: 4"),
        ("interleaved", 4, 2, 10, "multiple of --pp; valid here: 8 or 12"),
        ("interleaved", 4, 1, 8, "--vpp 1 is not defined; use --vpp 2 or more, or gpipe, 1f1b or zb-h1"),
        ("zb-v", 4, 3, 8, "use --vpp 2"),
        ("zb-h1", 4, 2, 8, "--vpp 1, or interleaved or zb-v"),
        ("1f1b", 4, 3, 8, "--vpp 1, or interleaved"),
        ("1f1b", 0, 1, 8, "--pp is 0"),
        ("1f1b", 1, 1, 0, "number of microbatches is 0"),
        ("zbv", 1, 1, 1, "there are gpipe, 1f1b, interleaved, zb-h1, zb-v"),
    ],
)
def test_undefined_sizes_are_refused_by_name(name: str, pp: int, vpp: int, microbatches: int, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        build_schedule(name, pp=pp, vpp=vpp, microbatches=microbatches)


@pytest.mark.parametrize(
    ("name", "pp", "vpp", "microbatches", "turns"),
    [
        ("1f1b", 1, 1, 4, True), ("1f1b", 4, 1, 8, True), ("interleaved", 2, 2, 4, True),
        ("gpipe", 2, 1, 1, True), ("gpipe", 2, 1, 4, False), ("zb-h1", 2, 1, 4, False), ("zb-v", 2, 2, 4, False),
    ],
)  # fmt: skip
def test_where_the_last_stage_turns_back_at_once(name: str, pp: int, vpp: int, microbatches: int, turns: bool) -> None:
    assert build_schedule(name, pp=pp, vpp=vpp, microbatches=microbatches).turns_back == turns
