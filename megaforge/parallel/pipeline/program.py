"""From a schedule to what a rank really does: its computations, and between them posts of sends and receives.

All transfers are put into one total order, that of the simulated moments at which they become possible, and every rank
posts its ends of them in that order. A post is one group of point-to-point operations, which NCCL may finish only as a
whole and which it defines only where both sides group alike: so a post holds transfers between the same two ranks, and
both post the same ones together. Posts inherit the total order, whose earliest unfinished one is therefore always
posted, or about to be, on both of its ranks: no rank can wait forever, even if each post blocked until its partner had
come (rendezvous), as a send may on NCCL. :func:`check_program` proves it for one program under exactly that strict
semantics. :class:`~megaforge.parallel.pipeline.executor.PipelineExecutor` posts without blocking and waits for a
receive only where it is used and for a send a few posts later, which can only finish earlier.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Action, ActionKind, Schedule
from megaforge.parallel.pipeline.simulator import Costs, Timeline, needs, simulate


class Transfer(NamedTuple):
    """The result of ``source_stage`` for ``microbatch`` on its way to a neighbouring stage on another rank: an
    activation when the target comes after it, a gradient when before."""

    source_stage: int
    target_stage: int
    microbatch: int

    def __str__(self) -> str:
        what = "activation" if self.target_stage > self.source_stage else "gradient"
        return f"{what} of microbatch {self.microbatch} from stage {self.source_stage} to stage {self.target_stage}"


class P2PBatch(NamedTuple):
    """Transfers between two ranks that both start together (one batched isend/irecv on either)."""

    transfers: tuple[Transfer, ...]


Program = tuple[tuple[Action | P2PBatch, ...], ...]


def output_transfer(schedule: Schedule, action: Action) -> Transfer | None:
    """What ``action`` has to send to another rank."""
    if action.kind is ActionKind.BACKWARD_WEIGHT:
        return None
    target = action.stage + (1 if action.kind is ActionKind.FORWARD else -1)
    if not 0 <= target < schedule.num_stages or schedule.rank_of(target) == schedule.rank_of(action.stage):
        return None
    return Transfer(action.stage, target, action.microbatch)


def build_program(schedule: Schedule, costs: Costs | None = None, *, forward_only: bool = False) -> Program:
    """Every rank's computations and posts, in order.

    A send is posted right after its computation, its receive at the same simulated moment: before the computation
    that the receiver is busy with then, so that data arrives while it computes. What two ranks have for each other
    at one moment (1F1B: an activation and a gradient) is one post, unless either computes or posts something between.

    Raises:
        UserError: the schedule is incomplete or deadlocks.
    """
    timeline = simulate(schedule, costs, forward_only=forward_only)
    ends = _ends_of_transfers(timeline)
    # A transfer has two ends: neighbours on both ranks are what these two ranks can post together.
    neighbours = Counter(pair for rank in ends for pair in _neighbours(rank))
    together = {pair for pair, times in neighbours.items() if times == 2}
    return tuple(_rank_program(actions, rank, together) for actions, rank in zip(schedule.actions, ends, strict=True))


class _End(NamedTuple):
    """A rank's part in ``transfer``, which it posts after its first ``after`` actions."""

    after: int
    transfer: Transfer


def _ends_of_transfers(timeline: Timeline) -> list[list[_End]]:
    """Each rank's ends of transfers, a projection of one total order."""
    schedule = timeline.schedule
    found = []
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            transfer = output_transfer(schedule, span.action)
            if transfer:
                found.append((span.end, _round(schedule, transfer), rank, transfer))
    by_rank: list[list[_End]] = [[] for _ in timeline.spans]
    done = [0] * len(by_rank)
    for time, _, sender, transfer in sorted(found):
        for rank in (sender, schedule.rank_of(transfer.target_stage)):
            spans = timeline.spans[rank]
            while done[rank] < len(spans) and spans[done[rank]].end <= time:
                done[rank] += 1
            by_rank[rank].append(_End(done[rank], transfer))
    return by_rank


def _round(schedule: Schedule, transfer: Transfer) -> tuple[int, int]:
    """Where ``transfer`` stands among those of its moment.

    Interleaved chunks make a ring of the ranks, each of which often has something for the next at one moment: in the
    order of ranks each would wait for the one before. In rounds, in which a rank takes part in one transfer, two are
    enough (three for an odd number of ranks).
    """
    low, high = sorted(_ranks_of(schedule, transfer))
    if schedule.placement != "loop" or schedule.num_chunks == 1:
        return 0, low
    return (1 + schedule.num_ranks % 2 if high - low > 1 else low % 2), low


def _neighbours(ends: list[_End]) -> list[tuple[Transfer, Transfer]]:
    """Transfers that follow each other on a rank with no action between."""
    return [(first.transfer, second.transfer) for first, second in pairwise(ends) if first.after == second.after]


def _rank_program(
    actions: tuple[Action, ...], ends: list[_End], together: set[tuple[Transfer, Transfer]]
) -> tuple[Action | P2PBatch, ...]:
    steps: list[Action | P2PBatch] = []
    done = 0
    for after, transfer in ends:
        steps += actions[done:after]
        done = after
        last = steps[-1] if steps else None
        if isinstance(last, P2PBatch) and (last.transfers[-1], transfer) in together:
            steps[-1] = P2PBatch((*last.transfers, transfer))
        else:
            steps.append(P2PBatch((transfer,)))
    return (*steps, *actions[done:])


def check_program(schedule: Schedule, program: Program, *, buffered: bool = False) -> None:
    """Runs ``program`` with posts that block until all their transfers are done, which they are only together.

    Args:
        buffered: posts that only send finish at once (as on a transport with unlimited buffers); otherwise a post is
            done when both of its ranks have come to it (rendezvous), which is the stricter and what NCCL may need.

    Raises:
        UserError: two ranks group their transfers differently, some ranks wait forever, or a computation or a send
            comes before what it needs; the message names the steps.
    """
    _check_groups(schedule, program)
    check = _BlockingRun(schedule, program, buffered)
    while check.runnable:
        check.advance(check.runnable.pop())
    stuck = [f"rank {rank} waits for the {min(post)}" for rank, post in enumerate(check.waiting) if post]
    if stuck:
        raise UserError(
            f"pipeline schedule '{schedule.name}' deadlocks with blocking sends and receives: {'; '.join(stuck)}"
        )


def _check_groups(schedule: Schedule, program: Program) -> None:
    """Every transfer is posted once on each of its two ranks and nowhere else, in the same company.

    NCCL does not define groups that differ between partners (github.com/NVIDIA/nccl/issues/1279)."""
    groups: dict[Transfer, dict[int, set[Transfer]]] = {}
    for rank, steps in enumerate(program):
        for post in (step for step in steps if isinstance(step, P2PBatch)):
            for transfer in post.transfers:
                where = f"pipeline schedule '{schedule.name}', rank {rank}: the {transfer}"
                if rank not in _ranks_of(schedule, transfer):
                    raise UserError(f"{where} is not this rank's to post")
                if rank in groups.setdefault(transfer, {}):
                    raise UserError(f"{where} is posted twice")
                groups[transfer][rank] = set(post.transfers)
    for transfer, by_rank in groups.items():
        groupings = [by_rank.get(rank, set()) for rank in _ranks_of(schedule, transfer)]
        if groupings[0] != groupings[1]:
            companies = (
                f"rank {rank} " + (f"in a group of {len(group)}" if group else "not at all")
                for rank, group in zip(_ranks_of(schedule, transfer), groupings, strict=True)
            )
            raise UserError(
                f"pipeline schedule '{schedule.name}': the {transfer} is posted by {' and by '.join(companies)}; "
                "both ranks must post the same transfers together"
            )


def _ranks_of(schedule: Schedule, transfer: Transfer) -> tuple[int, int]:
    return schedule.rank_of(transfer.source_stage), schedule.rank_of(transfer.target_stage)


class _BlockingRun:
    """Where every rank of a program stands, when each post blocks. Both ranks of a post have the same one, by set."""

    def __init__(self, schedule: Schedule, program: Program, buffered: bool) -> None:
        self.schedule = schedule
        self.program = program
        self.buffered = buffered
        self.split = {
            (a.stage, a.microbatch) for rank in schedule.actions for a in rank if a.kind is ActionKind.BACKWARD_INPUT
        }
        self.position = [0] * len(program)
        self.runnable = list(range(len(program)))
        self.waiting: list[frozenset[Transfer]] = [frozenset() for _ in program]
        self.posted: set[frozenset[Transfer]] = set()
        self.received: list[set[Transfer]] = [set() for _ in program]
        self.computed: set[Action] = set()
        self.made: set[Transfer] = set()

    def advance(self, rank: int) -> None:
        """Runs ``rank`` until a post blocks it or its program ends."""
        for step in self.program[rank][self.position[rank] :]:
            self.position[rank] += 1
            if isinstance(step, Action):
                self._compute(rank, step)
            else:
                self._post(rank, frozenset(step.transfers))
                if self.waiting[rank]:
                    return

    def _post(self, rank: int, post: frozenset[Transfer]) -> None:
        receives = {transfer for transfer in post if self.schedule.rank_of(transfer.target_stage) == rank}
        self.received[rank] |= receives
        if not post - receives <= self.made:
            raise UserError(
                f"pipeline schedule '{self.schedule.name}', rank {rank}: the {min(post - receives - self.made)} is "
                "posted before it is made"
            )
        if post not in self.posted:
            self.posted.add(post)
            self.waiting[rank] = post if receives or not self.buffered else frozenset()
            return
        for other in _ranks_of(self.schedule, min(post)):
            if self.waiting[other] == post:
                self.waiting[other] = frozenset()
                self.runnable.append(other)

    def _compute(self, rank: int, action: Action) -> None:
        for before in needs(self.schedule, action, (action.stage + 1, action.microbatch) in self.split):
            transfer = output_transfer(self.schedule, before) if self.schedule.rank_of(before.stage) != rank else None
            if before not in self.computed if transfer is None else transfer not in self.received[rank]:
                raise UserError(
                    f"pipeline schedule '{self.schedule.name}', rank {rank}: {action} comes before its input, {before}"
                )
        self.computed.add(action)
        result = output_transfer(self.schedule, action)
        if result:
            self.made.add(result)
