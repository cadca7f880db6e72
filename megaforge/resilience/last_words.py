"""What a rank can tell of itself when the run hangs, and what the ranks' words together say of the cause."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from megaforge.monitor.wait_sampler import waits_for_others
from megaforge.parallel.context import AXES, ParallelContext

_FRAMES = 4  # of the main thread, in the short form
_NAMED = 8  # ranks that a line names


@dataclass(frozen=True)
class Collective:
    """The newest collective of one group that a rank has begun.

    Attributes:
        axis: which ranks the group has, as ``dp``, and these ranks.
        number: how many the rank has begun in this group, this one included.
        name: what it is, with the shapes that go in, as ``all_reduce [3, 4]``.
        done: whether the rank is through with it.
    """

    axis: str
    ranks: tuple[int, ...]
    number: int
    name: str
    done: bool


@dataclass(frozen=True)
class LastWords:
    """Where a rank is.

    Attributes:
        phase: what it does, as ``step 12: forward and backward``.
        collectives: by the group's name.
        newest: the group of the newest of all, or None.
        stack: where the main thread is, innermost first.
        waits: whether it is in a collective or waits for another rank.
    """

    rank: int
    host: str
    phase: str
    collectives: Mapping[str, Collective] = field(default_factory=dict)
    newest: str | None = None
    stack: tuple[str, ...] = ()
    waits: bool = True

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> LastWords:
        """What :meth:`dumps` wrote."""
        read = json.loads(text)
        known = {
            name: Collective(**(one | {"ranks": tuple(one["ranks"])})) for name, one in read.pop("collectives").items()
        }
        return cls(**(read | {"stack": tuple(read["stack"]), "collectives": known}))

    def line(self) -> str:
        """One line for people."""
        newest = self.collectives.get(self.newest or "")
        last = "none that was recorded"
        if newest is not None:
            state = "done" if newest.done else "not done"
            last = f"{newest.name}, number {newest.number} over {newest.axis} of {_ranks(newest.ranks)}, {state}"
        where = " < ".join(self.stack) or "unknown"
        return f"rank {self.rank} on {self.host}: {self.phase}; last collective: {last}; at {where}"


def last_words(ctx: ParallelContext, phase: str) -> LastWords:
    """This rank's, now; from any thread."""
    collectives, newest = recorded_collectives(ctx)
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = frame is None or waits_for_others(frame)
    return LastWords(ctx.world.rank, socket.gethostname(), phase, collectives, newest, main_stack(), waits)


def recorded_collectives(ctx: ParallelContext) -> tuple[dict[str, Collective], str | None]:
    """The newest collective of each group, by the group's name, from torch's flight recorder; and which of them is the
    newest of all. Nothing where the recorder is off (``TORCH_FR_BUFFER_SIZE=0``) or knows nothing of the backend."""
    if ctx.world.size == 1:
        return {}, None
    known = _groups(ctx)
    found: dict[str, Collective] = {}
    newest = None
    for entry in _recorder(collectives=True).get("entries", ()):
        group = str(entry["process_group"][0])
        if entry["is_p2p"]:
            continue
        axis, ranks = known.get(group, (f"group {group}", ()))
        shapes = " ".join(str(size) for size in entry["input_sizes"])
        name = f"{entry['profiling_name'].partition(':')[2] or entry['profiling_name']} {shapes}".strip()
        found[group] = Collective(axis, ranks, entry["collective_seq_id"], name, bool(entry["retired"]))
        newest = group
    return found, newest


def begun_collectives() -> int:
    """A number that grows with every collective that begins or ends in this process."""
    status = _recorder(collectives=False).get("pg_status", {})
    return sum(int(one["last_enqueued_collective"]) + int(one["last_completed_collective"]) for one in status.values())


def main_stack() -> tuple[str, ...]:
    """Where the main thread is: ``file:line function``, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ()
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=_FRAMES, lookup_lines=False)
    return tuple(f"{_short(one.filename)}:{one.lineno} {one.name}" for one in stack)


def write_recorder(folder: Path, rank: int) -> list[Path]:
    """Writes torch's flight recorder as ``folder/recorder_RANK.json``; with NCCL also as ``folder/nccl_RANK``, which
    ``torchfrtrace`` reads (of gloo's groups its reader, in torch 2.13, knows nothing).

    Raises:
        OSError: it could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"recorder_{rank}.json"
    path.write_text(json.dumps(_recorder(collectives=True), indent=1) + "\n")
    if not dist.is_initialized() or "nccl" not in dist.get_backend() or not hasattr(c10d, "_dump_fr_trace"):
        return [path]
    beside = folder / f"nccl_{rank}"
    beside.write_bytes(c10d._dump_fr_trace(True, True, False))
    return [path, beside]


def _recorder(*, collectives: bool) -> dict[str, Any]:
    """The flight recorder's state, with what it holds of each of the newest ``collectives``; of a torch before it
    recorded gloo, nothing."""
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    return {} if dump is None else dict(json.loads(dump(collectives, False)))


def verdict(words: Mapping[int, LastWords], world_size: int) -> list[str]:
    """What the words of those ranks that said something tell of the cause: a sentence each, the surest first."""
    silent = [rank for rank in range(world_size) if rank not in words]
    said = []
    if silent:
        said.append(f"{_ranks(silent)} {_gives(silent)} no sign of life: stopped, or the machine is gone")
    late: dict[str, None] = {}
    for group in dict.fromkeys(name for one in words.values() for name in one.collectives):
        begun = {rank: one.collectives[group].number for rank, one in words.items() if group in one.collectives}
        most = max(begun.values())
        first = next(words[rank].collectives[group] for rank, number in begun.items() if number == most)
        members = first.ranks or tuple(begun)
        missing = [rank for rank in members if rank in words and begun.get(rank, 0) < most]
        if missing and not first.done:
            late[f"{_ranks(missing)} did not come to {first.name}, number {most} over {first.axis}"] = None
    said += late
    busy = [rank for rank, one in words.items() if not one.waits]
    if 0 < len(busy) < len(words):
        said += [
            f"rank {rank} waits for no other, as the rest do: it is at {_place(words[rank])}" for rank in busy[:_NAMED]
        ]
    phases = Counter(one.phase for one in words.values())
    common = phases.most_common(1)[0][0] if phases else ""
    for phase in sorted(phases.keys() - {common}):
        others = [rank for rank, one in words.items() if one.phase == phase]
        said.append(f"{_ranks(others)} {'is' if len(others) == 1 else 'are'} in '{phase}', others in '{common}'")
    return said or [f"{f'all {world_size} ranks wait' if world_size > 1 else 'it waits'} in '{common}'"]


def _place(words: LastWords) -> str:
    return " < ".join(words.stack[:2]) or "an unknown place"


def _gives(ranks: list[int]) -> str:
    return "gives" if len(ranks) == 1 else "give"


def _ranks(ranks: Iterable[int]) -> str:
    """``ranks 1, 2, 3``; of many the first ones and how many there are."""
    each = sorted(ranks)
    if len(each) == 1:
        return f"rank {each[0]}"
    more = f" and {len(each) - _NAMED} more" if len(each) > _NAMED else ""
    return f"ranks {', '.join(map(str, each[:_NAMED]))}{more}"


def _groups(ctx: ParallelContext) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Group's name -> axis and its ranks; of one that serves several axes, the first."""
    groups = {axis: ctx.axis(axis).group for axis in ("world", *AXES)} | {"control": ctx.control}
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    for axis, group in groups.items():
        if group is not None:
            known.setdefault(group.group_name, (axis, tuple(dist.get_process_group_ranks(group))))
    return known


def _short(path: str) -> str:
    """The last two parts of a file's path."""
    return os.sep.join(path.split(os.sep)[-2:])
