"""The simulator and the program check refuse what is incomplete, out of order or could wait forever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Action, ActionKind, Schedule, parse_schedule
from megaforge.parallel.pipeline.program import (
    P2PBatch,
    Program,
    Transfer,
    build_program,
    check_program,
    output_transfer,
)
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.parallel.pipeline.simulator import Costs, needs, simulate
from megaforge.parallel.pipeline.stage_tensors import StageTensor, crossing_names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("F0.0 B0.0\nF1.0", "rank 1: stage 1, microbatch 0 runs 'F'"),
        ("F0.0 F0.0 B0.0\nF1.0 B1.0", "F0.0 occurs 2 times"),
        ("B0.0 F0.0\nF1.0 B1.0", "runs 'BF'"),
        ("F0.0 W0.0 I0.0\nF1.0 B1.0", "runs 'FWI'"),
        ("F0.0 B0.0 F1.0 B1.0\n F1.0 B1.0", "rank 0: F1.0 is out of place"),
        (
            "F0.0 B0.0 F0.1 B0.1\nF1.1 B1.1 F1.0 B1.0",
            "deadlocks: rank 0 waits before B0.0 for B1.0; rank 1 waits before F1.1",
        ),
        ("F0.0 X0.0", "'X0.0' is not an action"),
        ("# nothing", "no actions"),
    ],
)
def test_bad_schedules_are_refused(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        simulate(parse_schedule(text, "mine"))


def naive_program(schedule: Schedule) -> Program:
    """What one writes first: receive right before use, send right after."""
    split = {(a.stage, a.microbatch) for rank in schedule.actions for a in rank if a.kind is ActionKind.BACKWARD_INPUT}
    program = []
    for rank, actions in enumerate(schedule.actions):
        steps: list[Action | P2PBatch] = []
        for action in actions:
            for before in needs(schedule, action, (action.stage + 1, action.microbatch) in split):
                transfer = output_transfer(schedule, before)
                if schedule.rank_of(before.stage) != rank and transfer:
                    steps.append(P2PBatch((transfer,)))
            steps.append(action)
            if transfer := output_transfer(schedule, action):
                steps.append(P2PBatch((transfer,)))
        program.append(tuple(steps))
    return tuple(program)


@pytest.mark.parametrize(("name", "vpp"), [("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("zb-v", 2)])
def test_naive_order_of_communication_deadlocks_when_sends_block(name: str, vpp: int) -> None:
    schedule = build_schedule(name, pp=4, vpp=vpp, microbatches=8)
    check_program(schedule, naive_program(schedule), buffered=True)
    with pytest.raises(UserError, match="deadlocks with blocking sends and receives: rank 0 waits for the"):
        check_program(schedule, naive_program(schedule))


def test_computation_before_its_input_is_refused() -> None:
    schedule = parse_schedule("F0.0 B0.0\nF1.0 B1.0", "mine")
    forward, backward = P2PBatch((Transfer(0, 1, 0),)), P2PBatch((Transfer(1, 0, 0),))
    f0, b0 = schedule.actions[0]
    f1, b1 = schedule.actions[1]
    check_program(schedule, ((f0, forward, backward, b0), (forward, f1, b1, backward)))
    with pytest.raises(UserError, match="rank 0: B0.0 comes before its input, B1.0"):
        check_program(schedule, ((f0, forward, b0, backward), (forward, f1, b1, backward)))


@st.composite
def random_schedules(draw: st.DrawFn) -> Schedule:
    """Any valid schedule: repeatedly, some rank runs some action whose inputs are there."""
    ranks, chunks, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    placement = draw(st.sampled_from(["loop", "v"]))
    empty = Schedule("random", ranks, chunks, microbatches, tuple(() for _ in range(ranks)), placement)
    pairs = [(stage, microbatch) for stage in range(ranks * chunks) for microbatch in range(microbatches)]
    split = {pair for pair in pairs if draw(st.booleans())}
    todo = [Action(ActionKind.FORWARD, *pair) for pair in pairs]
    for pair in pairs:
        todo += [
            Action(k, *pair)
            for k in (
                (ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT) if pair in split else (ActionKind.BACKWARD,)
            )
        ]
    done: set[Action] = set()
    actions: list[list[Action]] = [[] for _ in range(ranks)]
    random = draw(st.randoms(use_true_random=False))
    while todo:
        possible = [a for a in todo if all(b in done for b in needs(empty, a, (a.stage + 1, a.microbatch) in split))]
        chosen = random.choice(possible)
        todo.remove(chosen)
        done.add(chosen)
        actions[empty.rank_of(chosen.stage)].append(chosen)
    return Schedule("random", ranks, chunks, microbatches, tuple(map(tuple, actions)), placement)


@given(random_schedules(), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 3))
@settings(max_examples=80, deadline=None)
def test_every_valid_schedule_gets_a_program_that_cannot_deadlock(
    schedule: Schedule, f: float, i: float, c: float
) -> None:
    program = build_program(schedule, Costs(f, i, 1.0, c))
    check_program(schedule, program)
    check_program(schedule, program, buffered=True)
    for rank, steps in enumerate(program):
        assert tuple(step for step in steps if isinstance(step, Action)) == schedule.actions[rank]


def test_costs_of_stages_and_communication() -> None:
    schedule = build_schedule("gpipe", pp=2, vpp=1, microbatches=1)
    timeline = simulate(schedule, Costs(1.0, 2.0, 3.0, communication=0.5, stage_scale=(1.0, 2.0)))
    assert [(span.start, span.end) for span in timeline.spans[0]] == [(0, 1), (14, 19)]
    assert [(span.start, span.end) for span in timeline.spans[1]] == [(1.5, 3.5), (3.5, 13.5)]
    assert timeline.makespan == 19
    assert timeline.bubble_share(0) == pytest.approx(13 / 19)
    assert timeline.window_bubble(1) == 0


def test_peak_of_live_activations_counts_what_is_kept_between_the_halves() -> None:
    schedule = parse_schedule("F0.0 F0.1 I0.0 F0.2 I0.1 I0.2 W0.0 W0.1 W0.2", "mine")
    assert simulate(schedule).peak_live(0) == 3
    assert simulate(schedule, Costs(kept_after_input=0.25)).peak_live(0) == 2.25


@pytest.mark.parametrize(
    ("name", "vpp", "made_by", "expected"),
    [
        ("interleaved", 2, 0, ["hc", "hc", "h", "h", "h"]),
        ("zb-v", 2, 0, ["hc", "hc", "h", "h", "h"]),
        ("interleaved", 2, 1, ["h", "hc", "hc", "h", "h"]),
        ("zb-v", 2, 1, ["h", "hc", "h", "h", "hc"]),
        ("1f1b", 1, 0, ["hc", "hc"]),
    ],
)
def test_carried_tensors_cross_once_per_rank(name: str, vpp: int, made_by: int, expected: list[str]) -> None:
    import torch

    payload = {
        "c": StageTensor((1,), torch.float32, carried=True, made_by=made_by),
        "h": StageTensor((1,), torch.float32),
    }
    schedule = build_schedule(name, pp=3, vpp=vpp, microbatches=3)
    assert ["".join(sorted(names, reverse=True)) for names in crossing_names(schedule, payload)] == expected
