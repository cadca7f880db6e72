"""What a pipeline rank does, as data: actions on (stage, microbatch), and a schedule as one list of them per rank."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megaforge.errors import UserError


class ActionKind(enum.StrEnum):
    """The four computations of a stage; their letters are those of the zero-bubble paper (arXiv 2401.10241), where the
    input half of the backward pass is B and is written I here, because B stands for the whole backward pass."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Action(NamedTuple):
    """One computation: ``kind`` of global ``stage`` (0 is nearest to the input) for ``microbatch``."""

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """Who holds which stage, and each rank's actions in order.

    Attributes:
        name: as in ``--pipeline-schedule``.
        num_ranks: pipeline ranks (pp).
        num_chunks: stages per rank (vpp); there are ``num_ranks * num_chunks`` stages.
        num_microbatches: microbatches of a global batch on one data-parallel replica.
        actions: ``actions[rank]`` in the order of execution. Sends and receives follow from them
            (:mod:`megaforge.parallel.pipeline.program`).
        placement: "loop" puts stage s on rank s mod pp; "v" lets every second round of stages run backwards over the
            ranks, so that with two chunks rank 0 holds the first and the last stage.
    """

    name: str
    num_ranks: int
    num_chunks: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    placement: str = "loop"

    @property
    def num_stages(self) -> int:
        """Stages in total, pp * vpp."""
        return self.num_ranks * self.num_chunks

    @cached_property
    def stage_ranks(self) -> tuple[int, ...]:
        """The pipeline rank of every stage."""
        return tuple(stage_rank(stage, self.num_ranks, self.placement) for stage in range(self.num_stages))

    @cached_property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed apart (zero bubble)."""
        return any(action.kind is ActionKind.BACKWARD_INPUT for rank in self.actions for action in rank)

    @cached_property
    def turns_back(self) -> bool:
        """Whether every micro-batch's backward pass begins right behind its forward pass, and is in one piece: what the
        last stage makes for it need not be kept for other micro-batches meanwhile."""
        last = self.num_stages - 1
        actions = self.actions[self.rank_of(last)]
        return all(
            following == Action(ActionKind.BACKWARD, last, action.microbatch)
            for action, following in zip(actions, (*actions[1:], None), strict=True)
            if action.kind is ActionKind.FORWARD and action.stage == last
        )

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that holds ``stage``."""
        return self.stage_ranks[stage]

    def chunk_of(self, stage: int) -> int:
        """The place of ``stage`` among the stages of its rank."""
        return stage // self.num_ranks

    def stages_of(self, rank: int) -> list[int]:
        """The stages on ``rank``, by chunk."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]

    def forward_only(self) -> Schedule:
        """The forward half, for evaluation."""
        actions = tuple(tuple(a for a in rank if a.kind is ActionKind.FORWARD) for rank in self.actions)
        sizes = (self.num_ranks, self.num_chunks, self.num_microbatches)
        return Schedule(f"{self.name} forward", *sizes, actions, self.placement)


def stage_rank(stage: int, num_ranks: int, placement: str) -> int:
    """The pipeline rank of ``stage`` under ``placement`` "loop" or "v"."""
    chunk, rank = divmod(stage, num_ranks)
    return num_ranks - 1 - rank if placement == "v" and chunk % 2 else rank


def format_schedule(schedule: Schedule) -> str:
    """One line per rank, e.g. ``F0.0 F0.1 B0.0 B0.1``: kind, stage, dot, microbatch."""
    return "\n".join(" ".join(map(str, rank)) for rank in schedule.actions)


def parse_schedule(text: str, source: str, num_chunks: int = 1, placement: str = "loop") -> Schedule:
    """Reads what :func:`format_schedule` writes; blank lines and lines starting with # are skipped.

    Raises:
        UserError: naming ``source`` and the word that is not an action.
    """
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    actions = tuple(tuple(_parse_action(word, source) for word in line) for line in lines)
    microbatches = 1 + max((action.microbatch for rank in actions for action in rank), default=-1)
    if not microbatches:
        raise UserError(f"{source}: no actions; write one line per pipeline rank, such as: F0.0 F0.1 B0.0 B0.1")
    return Schedule(source, len(actions), num_chunks, microbatches, actions, placement)


def _parse_action(word: str, source: str) -> Action:
    match = re.fullmatch(r"([FBIW])(\d+)\.(\d+)", word)
    if not match:
        raise UserError(f"{source}: '{word}' is not an action; write F, B, I or W, stage, dot, microbatch: F0.3")
    return Action(ActionKind(match[1]), int(match[2]), int(match[3]))
