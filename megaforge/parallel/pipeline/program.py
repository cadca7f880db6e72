"""From a schedule to what a rank really does: its computations, and between them posts of sends and receives.

All transfers are put into one total order, that of the simulated moments at which they become possible, and every rank
posts its ends of them in that order. The earliest unfinished transfer is therefore always posted, or about to be, on
both of its ranks: no rank can wait forever, even if each post blocked until its partners had come (rendezvous), as a
send may on NCCL. :func:`check_program` proves it for one program under exactly that strict semantics.
:class:`~megaforge.parallel.pipeline.executor.PipelineExecutor` posts without blocking and waits for a receive only
where it is used and for a send a few posts later, which can only finish earlier.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Action, Kind, Schedule
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


class Post(NamedTuple):
    """Sends and receives that a rank starts together (one batched isend/irecv)."""

    transfers: tuple[Transfer, ...]


Program = tuple[tuple[Action | Post, ...], ...]


def output_transfer(schedule: Schedule, action: Action) -> Transfer | None:
    """What ``action`` has to send to another rank."""
    if action.kind is Kind.BACKWARD_WEIGHT:
        return None
    target = action.stage + (1 if action.kind is Kind.FORWARD else -1)
    if not 0 <= target < schedule.num_stages or schedule.rank_of(target) == schedule.rank_of(action.stage):
        return None
    return Transfer(action.stage, target, action.microbatch)


def build_program(schedule: Schedule, costs: Costs | None = None, *, forward_only: bool = False) -> Program:
    """Every rank's computations and posts, in order.

    A send is posted right after its computation, its receive at the same simulated moment: before the computation
    that the receiver is busy with then, so that data arrives while it computes.

    Raises:
        UserError: the schedule is incomplete or deadlocks.
    """
    timeline = simulate(schedule, costs, forward_only=forward_only)
    return tuple(_rank_program(timeline, rank, transfers) for rank, transfers in enumerate(_transfers(timeline)))


def _transfers(timeline: Timeline) -> list[list[tuple[float, Transfer]]]:
    """Each rank's transfers, a projection of one total order."""
    schedule = timeline.schedule
    found = []
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            transfer = output_transfer(schedule, span.action)
            if transfer:
                found.append((span.end, rank, transfer))
    by_rank: list[list[tuple[float, Transfer]]] = [[] for _ in timeline.spans]
    for time, sender, transfer in sorted(found):
        by_rank[sender].append((time, transfer))
        by_rank[schedule.rank_of(transfer.target_stage)].append((time, transfer))
    return by_rank


def _rank_program(timeline: Timeline, rank: int, transfers: list[tuple[float, Transfer]]) -> tuple[Action | Post, ...]:
    spans = timeline.spans[rank]
    steps: list[Action | Post] = []
    together: list[Transfer] = []
    done = 0
    for time, transfer in transfers:
        ended = done
        while ended < len(spans) and spans[ended].end <= time:
            ended += 1
        if ended > done and together:
            steps.append(Post(tuple(together)))
            together = []
        steps += [span.action for span in spans[done:ended]]
        done = ended
        together.append(transfer)
    if together:
        steps.append(Post(tuple(together)))
    return (*steps, *(span.action for span in spans[done:]))


def check_program(schedule: Schedule, program: Program, *, buffered: bool = False) -> None:
    """Runs ``program`` with posts that block until all their transfers are done.

    Args:
        buffered: sends finish at once (as on a transport with unlimited buffers); otherwise a transfer is done when
            both of its ranks have come to it (rendezvous), which is the stricter and what NCCL may need.

    Raises:
        UserError: some ranks wait forever, or a computation comes before its inputs; the message names the steps.
    """
    check = _BlockingRun(schedule, program, buffered)
    while check.runnable:
        check.advance(check.runnable.pop())
    stuck = [f"rank {rank} waits for the {min(missing)}" for rank, missing in enumerate(check.missing) if missing]
    if stuck:
        raise UserError(
            f"pipeline schedule '{schedule.name}' deadlocks with blocking sends and receives: {'; '.join(stuck)}"
        )


class _BlockingRun:
    """Where every rank of a program stands, when each post blocks."""

    def __init__(self, schedule: Schedule, program: Program, buffered: bool) -> None:
        self.schedule = schedule
        self.program = program
        self.buffered = buffered
        self.split = {
            (a.stage, a.microbatch) for rank in schedule.actions for a in rank if a.kind is Kind.BACKWARD_INPUT
        }
        self.position = [0] * len(program)
        self.runnable = list(range(len(program)))
        self.missing: list[set[Transfer]] = [set() for _ in program]
        self.offered: dict[Transfer, set[int]] = defaultdict(set)
        self.received: list[set[Transfer]] = [set() for _ in program]
        self.computed: set[Action] = set()

    def advance(self, rank: int) -> None:
        """Runs ``rank`` until a post blocks it or its program ends."""
        for step in self.program[rank][self.position[rank] :]:
            self.position[rank] += 1
            if isinstance(step, Action):
                self._compute(rank, step)
            else:
                self._post(rank, step)
                if self.missing[rank]:
                    return

    def _post(self, rank: int, post: Post) -> None:
        for transfer in post.transfers:
            self.offered[transfer].add(rank)
            sends = self.schedule.rank_of(transfer.source_stage) == rank
            if not sends:
                self.received[rank].add(transfer)
            if len(self.offered[transfer]) < 2 and not (self.buffered and sends):
                self.missing[rank].add(transfer)
        for transfer in post.transfers:
            for other in {
                self.schedule.rank_of(transfer.source_stage),
                self.schedule.rank_of(transfer.target_stage),
            } - {rank}:
                if transfer in self.missing[other]:
                    self.missing[other].discard(transfer)
                    if not self.missing[other]:
                        self.runnable.append(other)

    def _compute(self, rank: int, action: Action) -> None:
        for before in needs(self.schedule, action, (action.stage + 1, action.microbatch) in self.split):
            transfer = output_transfer(self.schedule, before) if self.schedule.rank_of(before.stage) != rank else None
            if before not in self.computed if transfer is None else transfer not in self.received[rank]:
                raise UserError(
                    f"pipeline schedule '{self.schedule.name}', rank {rank}: {action} comes before its input, {before}"
                )
        self.computed.add(action)
