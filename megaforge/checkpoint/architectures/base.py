"""What an architecture that others publish tells of itself. Each is one file here and one row of
:data:`megaforge.registry.ARCHITECTURES`; reading and writing files know none of them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import ahead_of, blocks_of
from megaforge.errors import UserError
from megaforge.parallel.param_spec import Box, ParamSpec
from megaforge.registry import LAYER_KINDS

_SHOWN = 3


class Objection(NamedTuple):
    """What a model has that an architecture lacks, and the flags of a model that it would hold."""

    has: str
    instead: str


@dataclass(frozen=True)
class Part:
    """One of their tensors, as the part of a parameter of ours that it is.

    Attributes:
        theirs: its name there.
        ours: the parameter's.
        box: where it lies in the parameter.
        shape: theirs.
        transposed: whether rows there are columns here.
        number: its number among the parameter's logical matrices.
        layer: its block; None of the model's ends.
    """

    theirs: str
    ours: str
    box: Box
    shape: tuple[int, ...]
    transposed: bool = False
    number: int = 0
    layer: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(end - start for start, end in self.box)

    def to_theirs(self, value: Tensor) -> Tensor:
        """The content of the box -> their tensor."""
        return (value.t() if self.transposed else value).reshape(self.shape).contiguous()

    def to_ours(self, value: Tensor) -> Tensor:
        """Their tensor -> the content of the box."""
        return value.reshape(self.sizes[::-1]).t() if self.transposed else value.reshape(self.sizes)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether their tensor may have this ``shape``; sizes of 1 do not count."""
        return [size for size in shape if size != 1] == [size for size in self.shape if size != 1]


class Given:
    """A ``config.json``, where what is missing has the architecture's own default.

    Attributes:
        path: its directory.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.path, self._values, self._defaults = path, values, defaults

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return self._defaults.get(name, default) if value is None else value

    def odd(self, name: str) -> UserError:
        return UserError(f"{self.path}: its config.json lacks or has an odd {name}: {self._values.get(name)!r}")

    def size(self, name: str) -> int:
        """A positive whole number."""
        value = self.get(name)
        if type(value) is not int or value < 1:
            raise self.odd(name)
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if type(value) not in (int, float):
            raise self.odd(name)
        return float(value)

    def demand(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        """
        Raises:
            UserError: ``name`` is there and none of ``allowed``.
        """
        value = self._values[name] if name in self._values else self._defaults.get(name, allowed[0])
        if value is None and None not in allowed:
            value = self._defaults.get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"{self.path}: {name} {value!r}: {why}")


class Architecture(ABC):
    """A registered instance knows one ``model_type`` of Hugging Face's.

    Attributes:
        name: the ``model_type``.
        class_name: what transformers builds.
        mixer, ffn: the letters of its layers.
        quantizable: whether transformers' BitNet quantizer finds its matrices.
        defaults: of ``config.json``, where they matter.
        unread: ends of names of tensors that carry nothing.
        optional_prefix: of names of tensors, which some files leave out.
    """

    name: ClassVar[str]
    class_name: ClassVar[str]
    mixer: ClassVar[str] = "*"
    ffn: ClassVar[str] = "-"
    quantizable: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {}
    unread: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    optional_prefix: ClassVar[str] = ""

    @abstractmethod
    def objections(self, cfg: ModelConfig) -> list[Objection]:
        """What keeps it from computing what ``cfg``, which has its layers, does."""

    @abstractmethod
    def config(self, cfg: ModelConfig) -> dict[str, Any]:
        """Its settings in ``config.json``, but for what files of every architecture have."""

    @abstractmethod
    def model(self, given: Given) -> ModelConfig:
        """The model that a ``config.json`` describes.

        Raises:
            UserError: it is one that we do not have.
        """

    @abstractmethod
    def parts(self, cfg: ModelConfig, specs: Mapping[str, ParamSpec]) -> Iterator[Part]:
        """Every tensor of theirs, where ``specs`` are the parameters of ``cfg``."""

    @property
    def layers(self) -> str:
        """For people."""
        return f"{LAYER_KINDS.get(self.mixer).title}s, each with a {LAYER_KINDS.get(self.ffn).title}"


def choose(cfg: ModelConfig, whose: str, wanted: str, known: Sequence[Architecture]) -> Architecture:
    """The one of ``known`` that computes what ``cfg`` does.

    Args:
        whose: what messages call the model.
        wanted: what it is asked for, for messages: ``--to hf``.

    Raises:
        UserError: there is none; with what would have to be otherwise for the nearest.
    """
    if ahead_of(cfg):
        raise UserError(
            f"{wanted}: {whose} predicts {len(ahead_of(cfg))} further tokens (--mtp-num-layers), for which its formats "
            "have no place; give --save FILE.safetensors, which holds every model"
        )
    blocks = set(blocks_of(cfg))
    if cfg.mod_capacity_factor is not None:
        raise UserError(
            f"{wanted}: {whose} has blocks that not every token goes through (--mod-capacity-factor "
            f"{cfg.mod_capacity_factor:g}), which none of its architectures knows; give --save FILE.safetensors, which "
            "holds every model"
        )
    kinds = {(block.mixer, block.ffn) for block in blocks}
    fitting = [one for one in known if kinds == {(LAYER_KINDS.get(one.mixer), LAYER_KINDS.get(one.ffn))}]
    if not fitting:
        has = sorted(f"{mixer.title}s {f'with a {ffn.title}' if ffn else 'without an FFN'}" for mixer, ffn in kinds)
        held = [
            f"{layers} ({', '.join(one.name for one in known if one.layers == layers)})"
            for layers in dict.fromkeys(one.layers for one in known)
        ]
        raise UserError(
            f"{wanted}: {whose} has {', '.join(has)}; its architectures have throughout {', or '.join(held)}: train "
            "with --layer-schedule attention --ffn dense, or give --save FILE.safetensors, which holds every model"
        )
    found = [(one.objections(cfg), one) for one in fitting]
    objections, nearest = min(found, key=lambda pair: len(pair[0]))
    if objections:
        has = [one.has for one in objections]
        instead = [one.instead for one in objections]
        more = f" (and {len(has) - _SHOWN} more)" if len(has) > _SHOWN else ""
        raise UserError(
            f"{wanted}: {whose} has {', and '.join(has[:_SHOWN])}{more}, which {nearest.name}, the nearest of its "
            f"architectures, does not know; train with {', and '.join(instead[:_SHOWN])}, or give --save "
            "FILE.safetensors, which holds every model"
        )
    return nearest
