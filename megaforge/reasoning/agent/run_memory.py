"""``--agent-memory run``: what accepted episodes wrote stays, for the episodes of later steps.

Each episode looks up what the run's index holds besides what it writes itself, and only reads it: of a step's episodes
none sees what another writes. At the step's end the accepted ones, whose reward beside their group's mean is at least
``--agent-accept-threshold``, leave their entries in the run's index, in the order of samples; a chunk of a group's text
once. Every rank has the same index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megaforge.checkpoint.checkpoint import load_checkpoint
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.errors import UserError
from megaforge.parallel.agree import exchange, from_first_rank
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import Entry as TensorEntry
from megaforge.reasoning.advantages import over_mean
from megaforge.reasoning.agent.algorithms import Judged
from megaforge.reasoning.agent.episode import Episode
from megaforge.reasoning.memory.archive import append, go_back
from megaforge.reasoning.memory.episodic import Entry, EpisodicIndex
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

STATE_NAME = "run_memory"


class _Left(NamedTuple):
    """What an accepted episode leaves behind: entries, the oldest first; and how often it found each of the run's."""

    entries: list[Entry]
    uses: Counter[int]


class RunMemory(Callback):
    """
    Attributes:
        index: what the run remembers; None: nothing, each episode begins empty.
    """

    place = Place.BEFORE

    def __init__(self, trainer: Trainer) -> None:
        flags = trainer.config.run_memory
        self.index = _empty(trainer.config) if flags.kept else None
        self.state_name = STATE_NAME if flags.kept else None
        self._archive = None if flags.agent_memory_archive is None else Path(flags.agent_memory_archive)
        self._threshold, self._size = flags.agent_accept_threshold, trainer.config.rl.rl_group_size
        self._left: dict[int, _Left] = {}
        self._accepted = 0.0

    def take(self, ctx: ParallelContext, episodes: Sequence[Episode], judged: Mapping[int, Judged]) -> None:
        """Keeps what the accepted ones of this rank's ``episodes`` leave, and of all others, until the step's end.
        Collective.

        Args:
            judged: of all the global batch's episodes, by their numbers.
        """
        if self.index is None:
            return
        accepted = _accepted(judged, self._size, self._threshold)
        own = {
            one.sample: _Left(one.memory.index.entries(), one.memory.index.used_beneath)
            for one in episodes
            if one.sample in accepted
        }
        told = {sample: left for ranks in exchange(ctx, own) for sample, left in ranks.items()}
        self._left = dict(sorted(told.items()))
        self._accepted = len(accepted) / len(judged)

    def on_train_start(self, trainer: Trainer) -> None:
        self._cut_archive(trainer)

    def on_rollback(self, trainer: Trainer) -> None:
        self._left = {}
        self._cut_archive(trainer)

    def _cut_archive(self, trainer: Trainer) -> None:
        path, iteration = self._archive, trainer.iteration
        if path is not None and (notice := from_first_rank(trainer.ctx, lambda: go_back(path, iteration))) is not None:
            print_rank_0(notice)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        index, path = self.index, self._archive
        if index is None:
            return
        gone = self._write(index)
        if path is not None and gone:
            from_first_rank(trainer.ctx, lambda: append(path, metrics.iteration, gone))
        metrics.extra["run_memory_entries"] = float(len(index))
        metrics.extra["run_memory_evicted"] = float(index.evicted)
        metrics.extra["run_memory_bytes"] = float(index.nbytes)
        metrics.extra["episodes_accepted"] = self._accepted

    def _write(self, index: EpisodicIndex) -> list[Entry]:
        """Gives ``index`` what was left; returns what that gives up."""
        for left in self._left.values():  # before any slot has another entry
            index.count_uses(left.uses)
        gone, known = [], set[tuple[int, tuple[int, ...]]]()
        for sample, left in self._left.items():
            for entry in left.entries:
                if (which := (sample // self._size, entry.tokens)) in known:
                    continue
                known.add(which)
                lost = index.write(entry.key, entry.tokens)
                gone += [] if lost is None else [lost]
        self._left = {}
        return gone

    def state(self) -> dict[str, Any]:
        index = self.index
        if index is None:
            return {}
        numbers = {name: x.tolist() for name, x in index.state().items() if name != "keys"}
        return {**numbers, "dim": index.dim, "accepted": self._accepted}

    def load_state(self, state: Mapping[str, Any]) -> None:
        assert self.index is not None
        _fill(self.index, state)
        self._accepted, self._left = state["accepted"], {}

    def tensors(self) -> Iterable[TensorEntry]:
        return [] if self.index is None else _tensors(self.index)


def _empty(config: Config) -> EpisodicIndex:
    capacity = config.run_memory.agent_memory_capacity
    return EpisodicIndex(config.model.memory_dim, capacity, config.rl.memory_index)


def _accepted(judged: Mapping[int, Judged], size: int, threshold: float) -> set[int]:
    """Numbers of the episodes that are accepted: by their reward, less the mean of their group of ``size``."""
    groups: dict[int, list[int]] = {}
    for sample in judged:
        groups.setdefault(sample // size, []).append(sample)
    above = {
        sample: value
        for group in groups.values()
        for sample, value in zip(group, over_mean([judged[sample].reward for sample in group]), strict=True)
    }
    return {sample for sample, value in above.items() if value >= threshold}


def _fill(index: EpisodicIndex, state: Mapping[str, Any]) -> None:
    """All but the keys, of which there is room.

    Raises:
        UserError: it is of another size, or has no room.
    """
    number = len(state["uses"])
    if state["dim"] != index.dim or number > index.capacity:
        raise UserError(
            f"--agent-memory-capacity {index.capacity}, --memory-dim {index.dim}: the run's memory has {number} chunks "
            f"with keys of size {state['dim']}; use its size and at least as much room"
        )
    types = {"longest": torch.float64}
    names = ("uses", "written", "tokens", "lengths", "counts", "longest")
    tensors = {name: torch.tensor(state[name], dtype=types.get(name, torch.long)) for name in names}
    index.load_state({**tensors, "keys": torch.zeros(number, index.dim)})


def _tensors(index: EpisodicIndex) -> list[TensorEntry]:
    return [(f"keys.{page}", None, keys) for page, keys in enumerate(index.keys)]


def index_of_run(
    config: Config, meta: Mapping[str, Any], path: Path, ctx: ParallelContext, beneath: EpisodicIndex | None = None
) -> EpisodicIndex | None:
    """What the run of a checkpoint remembered; None: it had no memory of its own. Collective.

    Args:
        meta, path: of the checkpoint.
        beneath: what is found as well.
    """
    name = f"callbacks.{STATE_NAME}"
    state = meta.get("state", {}).get(name)
    if state is None:
        return None
    index = _empty(config)
    index.beneath = beneath
    _fill(index, state)
    entries = [(f"{name}.{key}", declared, tensor) for key, declared, tensor in _tensors(index)]
    _ = load_checkpoint(path, entries, ctx, verify=False, allow_extra=("",))
    return index
