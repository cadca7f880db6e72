"""Pipeline schedules: pure functions from (ranks, rank, chunks, microbatches) to the rank's list of actions.

Each is one row of the registry ``megaforge.registry.SCHEDULES``, a :class:`ScheduleRule`; a user's own file registers
another. Bubbles below are shares of the whole time for stages of equal cost, with p ranks, v chunks, m microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megaforge.config.fields import either
from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Action, ActionKind, Schedule
from megaforge.registry import SCHEDULES

F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT  # noqa: E741


@dataclass(frozen=True)
class ScheduleRule:
    """A schedule for any number of ranks and microbatches.

    Attributes:
        text: what it does, for ``--help``.
        actions: ``actions(num_ranks, rank, num_chunks, num_microbatches)``, what a rank does in order.
        least_chunks, most_chunks: the stages per rank (``--vpp``) for which it is defined; None: any from least on.
            Without ``--vpp`` there are least_chunks.
        searched: the stages per rank that ``plan.py memory --search`` tries; none where another schedule is never
            worse.
        placement: as in :class:`Schedule`.
        whole_rounds: whether the microbatches must be a multiple of the ranks.
    """

    text: str
    actions: Callable[[int, int, int, int], list[Action]]
    least_chunks: int = 1
    most_chunks: int | None = 1
    searched: tuple[int, ...] = (1,)
    placement: str = "loop"
    whole_rounds: bool = False

    def takes(self, chunks: int) -> bool:
        """Whether it is defined for ``chunks`` stages per rank."""
        return self.least_chunks <= chunks and (self.most_chunks is None or chunks <= self.most_chunks)


def gpipe(num_ranks: int, rank: int, num_chunks: int, num_microbatches: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965). Bubble (p-1)/(m+p-1); m live activations."""
    return [Action(kind, rank, i) for kind in (F, B) for i in range(num_microbatches)]


def one_f_one_b(num_ranks: int, rank: int, num_chunks: int, num_microbatches: int) -> list[Action]:
    """1F1B (PipeDream-Flush; Narayanan et al., arXiv 2006.09503): after p-1-r warm-up forwards rank r alternates.

    Bubble (p-1)/(m+p-1) as in GPipe, but only min(m, p-r) live activations on rank r.
    """
    warmup = min(num_ranks - 1 - rank, num_microbatches)
    actions = [Action(F, rank, i) for i in range(warmup)]
    for i in range(num_microbatches - warmup):
        actions += [Action(F, rank, warmup + i), Action(B, rank, i)]
    return actions + [Action(B, rank, i) for i in range(num_microbatches - warmup, num_microbatches)]


def interleaved(num_ranks: int, rank: int, num_chunks: int, num_microbatches: int) -> list[Action]:
    """Interleaved 1F1B in Megatron-LM's order (Narayanan et al., arXiv 2104.04473; ``schedules.py`` of Megatron-LM).

    Rank r holds stages r, r+p, ...; microbatches pass in groups of p through one chunk, then the next.
    Bubble (p-1)/(vm+p-1).
    """
    total = num_chunks * num_microbatches
    warmup = min((num_ranks - 1 - rank) * 2 + (num_chunks - 1) * num_ranks, total)

    def nth(kind: ActionKind, count: int) -> Action:
        group, place = divmod(count, num_ranks * num_chunks)
        chunk, within = divmod(place, num_ranks)
        if kind is B:
            chunk = num_chunks - 1 - chunk
        return Action(kind, chunk * num_ranks + rank, group * num_ranks + within)

    actions = [nth(F, i) for i in range(warmup)]
    for i in range(total - warmup):
        actions += [nth(F, warmup + i), nth(B, i)]
    return actions + [nth(B, i) for i in range(total - warmup, total)]


def zb_h1(num_ranks: int, rank: int, num_chunks: int, num_microbatches: int) -> list[Action]:
    """ZB-H1 (Qi et al., arXiv 2401.10241): 1F1B with the weight half of the backward pass put off into the bubble.

    Rank r lags its weight halves by r microbatches, so every rank keeps at most min(m, p) activations, 1F1B's maximum.
    With F, I and W of equal cost and m >= p the bubble is (p-1)(F+I-W) against 1F1B's (p-1)(F+I+W): one third.
    """
    weights_done = 0
    actions: list[Action] = []
    for action in one_f_one_b(num_ranks, rank, num_chunks, num_microbatches):
        if action.kind is F:
            actions.append(action)
            continue
        actions.append(Action(I, rank, action.microbatch))
        if action.microbatch >= rank:
            actions.append(Action(W, rank, weights_done))
            weights_done += 1
    return actions + [Action(W, rank, i) for i in range(weights_done, num_microbatches)]


def zb_v(num_ranks: int, rank: int, num_chunks: int, num_microbatches: int) -> list[Action]:
    """ZB-V (Qi et al., arXiv 2401.10241, section 6): two chunks laid out as a V, so that rank 0 holds the loss too.

    With F, I and W of equal cost no rank idles between its first and its last action once m >= 2p-1, and none keeps
    more than 2p chunk activations, the p whole ones of 1F1B. For fewer microbatches the order is that of 2p-1 with
    the absent ones left out.

    Preferred to DualPipe-V (github.com/deepseek-ai/DualPipe). By the simulator, for p = 4 and m = 8, that has the same
    bubble share at equal costs (5.9%), a larger one at I = 1.2 F, W = 0.8 F (8.0% against 7.0%), one more live chunk
    activation, and it needs m >= 2p. Its gain, one microbatch's forward pass hiding the communication of another's
    backward pass inside one action, is not for an executor that runs one action at a time.
    """
    full = max(num_microbatches, 2 * num_ranks - 1)
    return [action for action in _zb_v(num_ranks, rank, full) if action.microbatch < num_microbatches]


class _Counter:
    """Writes a rank's actions down; microbatches of one kind and chunk follow each other."""

    def __init__(self, stages: tuple[int, int]) -> None:
        self.stages = stages
        self.next = {(kind, chunk): 0 for kind in (F, I, W) for chunk in (0, 1)}
        self.actions: list[Action] = []

    def add(self, *steps: tuple[ActionKind, int]) -> None:
        for kind, chunk in steps:
            self.actions.append(Action(kind, self.stages[chunk], self.next[kind, chunk]))
            self.next[kind, chunk] += 1


def _zb_v(num_ranks: int, rank: int, num_microbatches: int) -> list[Action]:
    out = _Counter((rank, 2 * num_ranks - 1 - rank))
    count = out.next
    out.add(*[(F, 0)] * (2 * (num_ranks - rank) - 1))
    out.add(*[(F, 1), (F, 0)] * rank)
    out.add(*[(F, 1), (I, 1), (W, 1)] * (num_ranks - rank))
    while count[F, 1] < num_microbatches:
        if count[F, 0] < num_microbatches:
            out.add((F, 0))
        out.add((I, 0), (W, 0), (F, 1), (I, 1), (W, 1))
    out.add(*[(I, 0), (I, 1)] * rank)
    out.add(*[(I, 0), (W, 0)] * (num_ranks - rank))
    out.add(*[(W, 1)] * (count[I, 1] - count[W, 1]))
    out.add(*[(W, 0)] * (count[I, 0] - count[W, 0]))
    return out.actions


GPIPE = ScheduleRule("all forwards, then all backwards", gpipe, searched=())
ONE_F_ONE_B = ScheduleRule("one forward, one backward", one_f_one_b)
INTERLEAVED = ScheduleRule(
    "1F1B over several chunks per rank (--vpp 2 or more)",
    interleaved,
    least_chunks=2,
    most_chunks=None,
    searched=(2, 4),
    whole_rounds=True,
)
ZB_H1 = ScheduleRule("1F1B whose weight gradients fill a part of the bubble", zb_h1)
ZB_V = ScheduleRule(
    "two chunks per rank laid out as a V (--vpp 2), no bubble between a rank's first and last action",
    zb_v,
    least_chunks=2,
    most_chunks=2,
    searched=(2,),
    placement="v",
)


def check_schedule(name: str, *, pp: int, vpp: int, microbatches: int) -> ScheduleRule:
    """The rule ``name``, where it is defined for these numbers.

    Raises:
        UserError: the name is unknown, or the schedule is not defined for these numbers; names what would be.
    """
    rule: ScheduleRule = SCHEDULES.get(name)
    for flag, value in (("--pp", pp), ("--vpp", vpp), ("the number of microbatches", microbatches)):
        if value < 1:
            raise UserError(f"{flag} is {value}, but must be at least 1")
    if not rule.takes(vpp):
        chunks = f"{rule.least_chunks} or more" if rule.most_chunks is None else rule.least_chunks
        others = [other for other in SCHEDULES.names() if SCHEDULES.get(other).takes(vpp)]
        raise UserError(
            f"--pipeline-schedule {name} with --vpp {vpp} is not defined; use --vpp {chunks}, or {either(others)}"
        )
    if rule.whole_rounds and microbatches % pp:
        below = microbatches // pp * pp
        near = f"{below} or {below + pp}" if below else f"{pp} or any multiple of it"
        raise UserError(
            f"--pipeline-schedule {name} with --pp {pp} and --vpp {vpp}: {microbatches} "
            f"microbatches (global batch size / micro batch size / dp) are not a multiple of --pp; valid here: {near}"
        )
    return rule


def build_schedule(name: str, *, pp: int, vpp: int, microbatches: int) -> Schedule:
    """The schedule ``name`` for ``pp`` ranks, ``vpp`` chunks per rank and ``microbatches``.

    Raises:
        UserError: as :func:`check_schedule`.
    """
    rule = check_schedule(name, pp=pp, vpp=vpp, microbatches=microbatches)
    actions = tuple(tuple(rule.actions(pp, rank, vpp, microbatches)) for rank in range(pp))
    return Schedule(name, pp, vpp, microbatches, actions, rule.placement)
