"""Megatron-LM's ``--ckpt-format torch``: one ``mp_rank_*`` directory for each model-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megaforge.checkpoint.megatron.files import MegatronFiles, Piece, Stored, arguments_of, listed, plain_name
from megaforge.checkpoint.megatron.pickles import read_torch
from megaforge.checkpoint.sources import TensorInfo
from megaforge.errors import UserError
from megaforge.parallel.param_spec import Box

FILES = ("model_optim_rng.pt", "model_rng.pt")
_DIRECTORY = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(?:_(\d\d\d))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
# How a tensor is split over tp: rows of these, columns of those; all others are whole on every rank.
_ROWS = (
    *("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias"),
    *("word_embeddings.weight", "output_layer.weight"),
)
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


class _Rank(NamedTuple):
    tp: int
    pp: int
    ep: int


class _Entry(NamedTuple):
    rank: _Rank
    chunk: str
    key: str


class MpRankFiles(MegatronFiles):
    """
    Raises:
        UserError: it is damaged or incomplete, holds code, or does not say which model it is of.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = _ranks(path, pipelined=True)
        first = read_torch(next(iter(found.values())))
        if not isinstance(first, dict):
            raise UserError(f"{next(iter(found.values()))}: holds something else than Megatron-LM's state")
        self.iteration, self.args = int(first.get("iteration", 0)), arguments_of(path, first.get("args"))
        self.tp, self.pp, self.ep = (
            int(self.args.get(f"{name}_model_parallel_size") or 1) for name in ("tensor", "pipeline", "expert")
        )
        given = self.args.get("expert_tensor_parallel_size")
        self.etp = self.tp if given is None else int(given)
        if self.tp % self.etp:
            raise UserError(
                f"{path}: its experts are split over more ranks (--expert-tensor-parallel-size {self.etp}) than tp "
                f"({self.tp}), which these files do not number; save it with --ckpt-format torch_dist"
            )
        found = _ranks(path, pipelined=self.pp > 1)
        self._check_ranks(set(found))
        self._states = {rank: read_torch(file) for rank, file in found.items()}
        self.tensors = self._tensors()
        self.check_whole()

    def _check_ranks(self, found: set[_Rank]) -> None:
        dense = {(rank.tp, rank.pp) for rank in found}
        experts = {(rank.tp % self.etp, rank.pp, rank.ep) for rank in found}

        def name(tp: int, pp: int) -> str:
            return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else "")

        places = [(tp, pp) for pp in range(self.pp) for tp in range(self.tp)]
        missing = [name(*place) for place in places if place not in dense]
        for tp, pp in places if self.ep > 1 else []:
            missing += [
                f"mp_rank_??_{pp:03d}_{ep:03d}"
                for ep in range(self.ep)
                if tp < self.etp and (tp, pp) in dense and (tp, pp, ep) not in experts
            ]
        if missing:
            raise UserError(
                f"{self.path}: ranks are missing of tp {self.tp}, pp {self.pp}, ep {self.ep}: {listed(missing)}"
            )

    def load(self, entry: _Entry) -> Tensor:
        value: Tensor = self._states[entry.rank][entry.chunk][entry.key]
        return value

    def _tensors(self) -> dict[str, Stored]:
        held: dict[str, dict[int, tuple[_Entry, Tensor]]] = {}
        starts = self._first_layers()
        for rank, state in sorted(self._states.items()):
            for chunk in _chunks(state):
                for key, value in state[chunk].items():
                    if isinstance(value, Tensor) and not key.endswith("_extra_state"):
                        name = self._global_name(key, rank, starts[rank.pp, chunk])
                        split = self.etp if _EXPERT.search(name) else self.tp
                        held.setdefault(name, {}).setdefault(rank.tp % split, (_Entry(rank, chunk, key), value))
        return {name: self._joined(name, parts) for name, parts in held.items()}

    def _first_layers(self) -> dict[tuple[int, str], int]:
        """The number of the first layer of each part of the model: all first chunks come before all second ones."""
        stages = {rank.pp: state for rank, state in self._states.items()}
        starts, first = {}, 0
        for chunk in _chunks(next(iter(self._states.values()))):
            for pp in range(self.pp):
                starts[pp, chunk] = first
                found = [int(match[1]) for key in stages[pp].get(chunk, ()) if (match := _LAYER.match(key))]
                first += max(found, default=-1) + 1
        return starts

    def _global_name(self, key: str, rank: _Rank, first: int) -> str:
        name = plain_name(key.replace("mlp.experts.local_experts.", "mlp.experts."))
        own = int(self.args.get("num_experts") or 0) // self.ep
        name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first}.", name)
        return _EXPERT.sub(lambda match: f".mlp.experts.{int(match[1]) + rank.ep * own}.", name)

    def _joined(self, name: str, parts: Mapping[int, tuple[_Entry, Tensor]]) -> Stored:
        entry, tensor = parts[0]
        along = 0 if name.endswith(_ROWS) else 1 if name.endswith(_COLUMNS) else None
        shape = list(tensor.shape)
        if along is None:
            return Stored(TensorInfo(tensor.dtype, tuple(shape)), (Piece(_box(shape, 0, 0, shape[0]), entry),))
        shape[along] = sum(part.shape[along] for _, part in parts.values())
        halves = 2 if self.args.get("swiglu") and "linear_fc1." in name else 1
        pieces, ends = [], [half * shape[along] // halves for half in range(halves)]
        for _, (entry, part) in sorted(parts.items()):
            size = part.shape[along] // halves
            for half in range(halves):
                rows = (half * size, (half + 1) * size) if halves > 1 else None
                pieces.append(Piece(_box(shape, along, ends[half], ends[half] + size), entry, (), rows))
                ends[half] += size
        return Stored(TensorInfo(tensor.dtype, tuple(shape)), tuple(pieces))


def _box(shape: list[int], along: int, start: int, end: int) -> Box:
    return tuple((start, end) if dim == along else (0, size) for dim, size in enumerate(shape))


def _chunks(state: Mapping[str, Any]) -> list[str]:
    """The keys of a rank's parts of the model: one, or one for each virtual stage."""
    return sorted(
        (key for key in state if re.fullmatch(r"model\d*", key)), key=lambda key: int(key.removeprefix("model") or 0)
    )


def _ranks(path: Path, *, pipelined: bool) -> dict[_Rank, Path]:
    """The file of each rank; without pipeline stages a second number is that of the expert rank."""
    found = {}
    for directory in sorted(path.glob("mp_rank_*")):
        match = _DIRECTORY.fullmatch(directory.name)
        file = next((directory / name for name in FILES if (directory / name).is_file()), None)
        if match and file is not None:
            tp, second, third = (int(number or 0) for number in match.groups())
            found[_Rank(tp, second, third) if pipelined else _Rank(tp, 0, second)] = file
    if not found:
        raise UserError(f"{path}: there is no {FILES[0]} in its mp_rank_* directories")
    return found
