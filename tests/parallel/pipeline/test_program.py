"""What ranks post together: the same on both sides, whatever the schedule, and never in each other's way."""

from __future__ import annotations

import dataclasses

import pytest

from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Action, Schedule, parse_schedule
from megaforge.parallel.pipeline.program import P2PBatch, Program, Transfer, build_program, check_program
from megaforge.parallel.pipeline.schedules import build_schedule

CASES = [
    (name, pp, vpp)
    for pp in range(2, 9)
    for name, vpp in [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("interleaved", 2), ("interleaved", 3)]
]


def posts(program: Program, rank: int) -> list[P2PBatch]:
    return [step for step in program[rank] if isinstance(step, P2PBatch)]


def ranks_of(schedule: Schedule, transfer: Transfer) -> set[int]:
    return {schedule.rank_of(transfer.source_stage), schedule.rank_of(transfer.target_stage)}


def run_with_blocking_posts(program: Program) -> list[int]:
    """How far each rank comes when a post ends for both of its ranks at once, as soon as both have come to it."""
    place = [0] * len(program)
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(program):
            while place[rank] < len(steps) and isinstance(steps[place[rank]], Action):
                place[rank] += 1
                moved = True
        heads = [steps[place[rank]] if place[rank] < len(steps) else None for rank, steps in enumerate(program)]
        for rank, head in enumerate(heads):
            if isinstance(head, P2PBatch) and heads.count(head) == 2:
                place[rank] += 1
                moved = True
    return place


@pytest.mark.parametrize(("name", "pp", "vpp"), CASES)
def test_both_sides_of_a_transfer_post_the_same_group_and_none_waits_forever(name: str, pp: int, vpp: int) -> None:
    crossings = 2 * pp - 2 if name == "zb-v" else pp * vpp - 1  # the turn of the V stays on its rank
    for number in {"interleaved": (pp, 3 * pp)}.get(name, (1, 2, pp, 2 * pp + 1)):
        schedule = build_schedule(name, pp=pp, vpp=vpp, microbatches=number)
        for forward_only in (False, True):
            variant = schedule.forward_only() if forward_only else schedule
            program = build_program(variant, forward_only=forward_only)
            groups = [
                {transfer: post for post in posts(program, rank) for transfer in post.transfers} for rank in range(pp)
            ]
            transfers = {transfer for group in groups for transfer in group}
            assert len(transfers) == crossings * number * (1 if forward_only else 2)
            for transfer in transfers:
                held = [rank for rank in range(pp) if transfer in groups[rank]]
                assert set(held) == ranks_of(variant, transfer)
                first, second = (groups[rank][transfer] for rank in held)
                assert first == second, f"{name} {pp} {vpp} {number}: {transfer}"
                assert all(ranks_of(variant, other) == set(held) for other in first.transfers)
            assert run_with_blocking_posts(program) == [len(steps) for steps in program]
            check_program(variant, program)


def test_what_two_ranks_have_for_each_other_at_one_moment_travels_together() -> None:
    """In 1F1B's steady state an activation meets a gradient: not one after the other."""
    program = build_program(build_schedule("1f1b", pp=4, vpp=1, microbatches=8))
    for rank in range(4):
        assert sum(len(post.transfers) == 2 for post in posts(program, rank)) >= 4
        assert all(len(post.transfers) <= 2 for post in posts(program, rank))


@pytest.mark.parametrize("pp", [4, 8])
def test_a_ring_of_ranks_does_not_post_one_after_the_other(pp: int) -> None:
    """Interleaved chunks, forward: every rank sends and receives at every moment. Counted in rounds, in each of which
    every post that both of its ranks have come to is done."""
    schedule = build_schedule("interleaved", pp=pp, vpp=2, microbatches=4 * pp).forward_only()
    program = build_program(schedule, forward_only=True)
    left = [posts(program, rank) for rank in range(pp)]
    most, rounds = max(map(len, left)), 0
    while any(left):
        heads = [own[0] if own else None for own in left]
        left = [own[1:] if own and heads.count(own[0]) == 2 else own for own in left]
        rounds += 1
    assert rounds < most + 2 * pp  # in the order of ranks: 1.5 times as many with 4 ranks, 2.6 with 8


@pytest.fixture
def schedule() -> Schedule:
    return parse_schedule("F0.0 F0.1 B0.0 B0.1\nF1.0 B1.0 F1.1 B1.1", "mine")


def both(schedule: Schedule, first: list[str], second: list[str]) -> Program:
    """Two ranks' programs, from names of actions and of posts: ``a0+g1`` posts activation 0 and gradient 1."""

    def step(word: str) -> Action | P2PBatch:
        if word[0] in "ag":
            ends = {"a": (0, 1), "g": (1, 0)}
            return P2PBatch(tuple(Transfer(*ends[part[0]], int(part[1:])) for part in word.split("+")))
        return next(action for rank in schedule.actions for action in rank if str(action) == word)

    return tuple(map(step, first)), tuple(map(step, second))


def test_groups_are_checked(schedule: Schedule) -> None:
    fine = "F0.0 a0 F0.1 a1+g0 B0.0 g1 B0.1".split(), "a0 F1.0 B1.0 a1+g0 F1.1 B1.1 g1".split()
    check_program(schedule, both(schedule, *fine))
    faults = {
        "activation of microbatch 1 .* is posted by rank 0 in a group of 2 and by rank 1 in a group of 1": (
            fine[0],
            "a0 F1.0 a1 B1.0 g0 F1.1 B1.1 g1".split(),
        ),
        "gradient of microbatch 1 .* is posted by rank 1 in a group of 1 and by rank 0 not at all": (
            fine[0][:5] + fine[0][6:],
            fine[1],
        ),
        "rank 1: the activation of microbatch 0 .* is posted twice": (fine[0], ["a0", *fine[1]]),
        "rank 1: the gradient of microbatch 0 .* is posted before it is made": (
            fine[0],
            "a0 F1.0 a1+g0 B1.0 F1.1 B1.1 g1".split(),
        ),
    }
    for message, programs in faults.items():
        with pytest.raises(UserError, match=message):
            check_program(schedule, both(schedule, *programs))


def test_a_transfer_between_others_is_refused() -> None:
    """A group that spans three ranks cannot be the same on all its sides."""
    schedule = parse_schedule("F0.0\nF1.0\nF2.0", "mine").forward_only()
    schedule = dataclasses.replace(schedule, num_ranks=3)
    (f0,), (f1,), (f2,) = schedule.actions
    first, second = Transfer(0, 1, 0), Transfer(1, 2, 0)
    check_program(
        schedule, ((f0, P2PBatch((first,))), (P2PBatch((first,)), f1, P2PBatch((second,))), (P2PBatch((second,)), f2))
    )
    with pytest.raises(UserError, match="rank 0: the activation .* from stage 1 to stage 2 is not this rank's to post"):
        check_program(
            schedule, ((f0, P2PBatch((first, second))), (P2PBatch((first, second)), f1), (P2PBatch((second,)), f2))
        )


def test_equal_groups_in_another_order_deadlock(schedule: Schedule) -> None:
    program = both(schedule, "F0.0 F0.1 a1 a0 g0 B0.0 g1 B0.1".split(), "a0 F1.0 B1.0 a1 g0 F1.1 B1.1 g1".split())
    with pytest.raises(UserError, match="deadlocks .* rank 0 waits for the activation of microbatch 1"):
        check_program(schedule, program)
    check_program(schedule, program, buffered=True)
