"""Which matrices get adapters: the logical matrices of a model's linear layers, by our names and by others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from megaforge.errors import UserError
from megaforge.parallel.layers import Linear, is_whole, linears
from megaforge.parallel.param_spec import ParamSpec, spec_of

# Matrices that others keep apart: the last name of the layer's path, and what its parts are called.
FUSED: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "up": ("gate", "up")}
# What a logical matrix is called by Hugging Face's models and Megatron-LM: (last name of the path, part) -> names.
ALIASES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("qkv", "q"): ("q_proj", "linear_qkv", "query_key_value"),
    ("qkv", "k"): ("k_proj", "linear_qkv", "query_key_value"),
    ("qkv", "v"): ("v_proj", "linear_qkv", "query_key_value"),
    ("up", "gate"): ("gate_proj", "linear_fc1", "w1"),
    ("up", "up"): ("up_proj", "linear_fc1", "w3"),
    ("up", ""): ("up_proj", "linear_fc1"),
    ("down", ""): ("down_proj", "linear_fc2", "w2"),
    ("output", ""): ("o_proj", "out_proj", "linear_proj"),
    ("input", ""): ("in_proj",),
    ("receptance", ""): ("r_proj",),
    ("key", ""): ("k_proj",),
    ("value", ""): ("v_proj",),
}
ALL = "all-linear"
_ENDS = frozenset({"embedding", "head", "router"})


class Target(NamedTuple):
    """One logical matrix.

    Attributes:
        path: of its layer: ``layers.3.mixer.qkv``.
        layer: the layer.
        part: its name among the matrices that are fused there, or nothing.
        number: its place among them.
    """

    path: str
    layer: Linear
    part: str = ""
    number: int = 0

    @property
    def spec(self) -> ParamSpec:
        return spec_of(self.layer.weight)

    @property
    def rows(self) -> tuple[int, int]:
        """(start, stop) of its output features among those of the whole matrix of the layer."""
        if not self.part:
            return 0, self.layer.out_features
        start = sum(self.spec.parts[: self.number])
        return start, start + self.spec.parts[self.number]

    @property
    def name(self) -> str:
        """For people: ``layers.3.mixer.qkv.q``."""
        return f"{self.path}.{self.part}" if self.part else self.path

    def matches(self, pattern: str) -> bool:
        """Whether ``pattern`` names it: ``all-linear``, its kind, an end of its path, or another program's name."""
        names = self.name.split(".")
        ends = [".".join(names[start:]) for start in range(len(names))]
        if self.part:
            names = self.path.split(".")
            ends += [".".join(names[start:]) for start in range(len(names))]
        if pattern == ALL:  # low-rank maps are small already
            return self.spec.update == "matrix"
        others = ALIASES.get((self.path.rpartition(".")[2], self.part), ())
        return pattern == self.spec.kind or pattern in others or any(fnmatchcase(end, pattern) for end in ends)


def targets_of(model: nn.Module) -> list[Target]:
    """Every logical matrix that an adapter can stand beside: not the head, the embedding and routers."""
    found = []
    for path, layer in linears(model):
        spec = spec_of(layer.weight)
        if spec.role != "matrix" or spec.kind in _ENDS:
            continue
        names = FUSED.get(path.rpartition(".")[2], ())
        if names and len(names) == len(spec.parts):
            found += [Target(path, layer, name, number) for number, name in enumerate(names)]
        else:
            found.append(Target(path, layer))
    return found


def chosen(model: nn.Module, flag: str, patterns: Sequence[str]) -> list[Target]:
    """Those of :func:`targets_of` that ``patterns`` name.

    Raises:
        UserError: a pattern names nothing of a whole model.
    """
    able = targets_of(model)
    if is_whole(model):
        for pattern in patterns:
            if not any(target.matches(pattern) for target in able):
                raise UserError(f"{flag} {pattern}: {_there_are(able)}")
    return [target for target in able if any(target.matches(pattern) for pattern in patterns)]


def _there_are(able: Sequence[Target]) -> str:
    kinds = ", ".join(dict.fromkeys(target.spec.kind for target in able))
    ends = ", ".join(dict.fromkeys(".".join(target.name.split(".")[2:]) for target in able))
    others = ", ".join(
        dict.fromkeys(name for t in able for name in ALIASES.get((t.path.rpartition(".")[2], t.part), ()))
    )
    return (
        f"no matrix of this model has such a kind, path or name; use {ALL}, a kind ({kinds}), what a path ends with "
        f"({ends}), with * and ?, or {others}"
    )
