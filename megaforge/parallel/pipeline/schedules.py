"""Pipeline schedules: pure functions from (ranks, chunks, microbatches) to every rank's list of actions.

Bubbles below are shares of the whole time for stages of equal cost, with p ranks, v chunks and m microbatches.
"""

from __future__ import annotations

from collections.abc import Callable

from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Action, ActionKind, Schedule

F, B, I, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT  # noqa: E741


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965). Bubble (p-1)/(m+p-1); m live activations."""
    order = range(num_microbatches)
    actions = tuple(
        tuple([Action(F, rank, i) for i in order] + [Action(B, rank, i) for i in order]) for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_ranks, 1, num_microbatches, actions)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B (PipeDream-Flush; Narayanan et al., arXiv 2006.09503): after p-1-r warm-up forwards rank r alternates.

    Bubble (p-1)/(m+p-1) as in GPipe, but only min(m, p-r) live activations on rank r.
    """
    return Schedule(
        "1f1b",
        num_ranks,
        1,
        num_microbatches,
        tuple(tuple(_one_f_one_b_rank(num_ranks, rank, num_microbatches)) for rank in range(num_ranks)),
    )


def _one_f_one_b_rank(num_ranks: int, rank: int, num_microbatches: int) -> list[Action]:
    warmup = min(num_ranks - 1 - rank, num_microbatches)
    actions = [Action(F, rank, i) for i in range(warmup)]
    for i in range(num_microbatches - warmup):
        actions += [Action(F, rank, warmup + i), Action(B, rank, i)]
    return actions + [Action(B, rank, i) for i in range(num_microbatches - warmup, num_microbatches)]


def interleaved(num_ranks: int, num_chunks: int, num_microbatches: int) -> Schedule:
    """Interleaved 1F1B in Megatron-LM's order (Narayanan et al., arXiv 2104.04473; ``schedules.py`` of Megatron-LM).

    Rank r holds stages r, r+p, ...; microbatches pass in groups of p through one chunk, then the next.
    Bubble (p-1)/(vm+p-1).

    Raises:
        UserError: the number of microbatches is not a multiple of p.
    """
    if num_microbatches % num_ranks:
        below = num_microbatches // num_ranks * num_ranks
        near = f"{below} or {below + num_ranks}" if below else f"{num_ranks} or any multiple of it"
        raise UserError(
            f"--pipeline-schedule interleaved with --pp {num_ranks} and --vpp {num_chunks}: {num_microbatches} "
            f"microbatches (global batch size / micro batch size / dp) are not a multiple of --pp; valid here: {near}"
        )
    actions = tuple(tuple(_interleaved_rank(num_ranks, r, num_chunks, num_microbatches)) for r in range(num_ranks))
    return Schedule("interleaved", num_ranks, num_chunks, num_microbatches, actions)


def _interleaved_rank(num_ranks: int, rank: int, num_chunks: int, num_microbatches: int) -> list[Action]:
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


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1 (Qi et al., arXiv 2401.10241): 1F1B with the weight half of the backward pass put off into the bubble.

    Rank r lags its weight halves by r microbatches, so every rank keeps at most min(m, p) activations, 1F1B's maximum.
    With F, I and W of equal cost and m >= p the bubble is (p-1)(F+I-W) against 1F1B's (p-1)(F+I+W): one third.
    """
    return Schedule(
        "zb-h1",
        num_ranks,
        1,
        num_microbatches,
        tuple(tuple(_zb_h1_rank(num_ranks, rank, num_microbatches)) for rank in range(num_ranks)),
    )


def _zb_h1_rank(num_ranks: int, rank: int, num_microbatches: int) -> list[Action]:
    weights_done = 0
    actions: list[Action] = []
    for action in _one_f_one_b_rank(num_ranks, rank, num_microbatches):
        if action.kind is F:
            actions.append(action)
            continue
        actions.append(Action(I, rank, action.microbatch))
        if action.microbatch >= rank:
            actions.append(Action(W, rank, weights_done))
            weights_done += 1
    return actions + [Action(W, rank, i) for i in range(weights_done, num_microbatches)]


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
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
    actions = tuple(
        tuple(a for a in _zb_v_rank(num_ranks, rank, full) if a.microbatch < num_microbatches)
        for rank in range(num_ranks)
    )
    return Schedule("zb-v", num_ranks, 2, num_microbatches, actions, "v")


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


def _zb_v_rank(num_ranks: int, rank: int, num_microbatches: int) -> list[Action]:
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


SCHEDULES: dict[str, str] = {
    "gpipe": "all forwards, then all backwards",
    "1f1b": "one forward, one backward",
    "interleaved": "1F1B over several chunks per rank (--vpp 2 or more)",
    "zb-h1": "1F1B whose weight gradients fill a part of the bubble",
    "zb-v": "two chunks per rank laid out as a V (--vpp 2), no bubble between a rank's first and last action",
}


def build_schedule(name: str, *, pp: int, vpp: int, microbatches: int) -> Schedule:
    """The schedule ``name`` for ``pp`` ranks, ``vpp`` chunks per rank and ``microbatches``.

    Raises:
        UserError: the name is unknown, or the schedule is not defined for these numbers; names what would be.
    """
    if name not in SCHEDULES:
        raise UserError(f"--pipeline-schedule {name} is unknown; valid: {', '.join(SCHEDULES)}")
    for flag, value in (("--pp", pp), ("--vpp", vpp), ("the number of microbatches", microbatches)):
        if value < 1:
            raise UserError(f"{flag} is {value}, but must be at least 1")
    if name == "interleaved":
        if vpp == 1:
            raise UserError(
                "--pipeline-schedule interleaved with --vpp 1 has nothing to interleave; use 1f1b, or --vpp 2 or more"
            )
        return interleaved(pp, vpp, microbatches)
    if name == "zb-v":
        if vpp != 2:
            raise UserError(f"--pipeline-schedule zb-v with --vpp {vpp} is not defined; use --vpp 2")
        return zb_v(pp, microbatches)
    if vpp != 1:
        raise UserError(
            f"--pipeline-schedule {name} with --vpp {vpp} is not defined; use --vpp 1, or interleaved"
            + (" or zb-v" if vpp == 2 else "")
        )
    builders: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h1": zb_h1}
    return builders[name](pp, microbatches)
