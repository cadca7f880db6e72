"""Configurations of the 1-bit training phase of another pipeline, key by key as our settings.

Such a file has, below ``training:`` or at the top, the sections ``model``, ``optimization``, ``distributed``,
``grokfast`` and ``nasa_compliance``. The preset ``phase5-base`` is what its published example becomes.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megaforge.config.schema import suggestion
from megaforge.config.yaml_files import load_layer
from megaforge.errors import UserError

SIZES = ("tiny", "small", "base", "large", "xlarge")
_WEIGHTS = {1: "binary", 1.58: "ternary", 4: "int4", 8: "int8"}
_BACKENDS = ("nccl", "gloo", "mpi")
_LEVELS = ("basic", "standard", "enhanced")


@dataclass(frozen=True)
class ModelSection:
    """None: as ``model_size`` has it."""

    model_size: str = "base"
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    vocab_size: int = 32000
    max_sequence_length: int = 2048
    use_bitnet_linear: bool = True
    bitnet_layers: tuple[str, ...] = ("all",)
    quantization_bit_width: float = 1
    use_custom_kernels: bool = True


@dataclass(frozen=True)
class OptimizationSection:
    """Sizes of batches are those of one rank."""

    num_epochs: float = 50
    batch_size: int = 32
    eval_batch_size: int = 64
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    gradient_accumulation_steps: int = 4
    max_grad_norm: float = 1.0
    warmup_steps: int = 1000


@dataclass(frozen=True)
class DistributedSection:
    """Without ``enabled`` one rank trains."""

    enabled: bool = True
    backend: str = "nccl"
    world_size: int = 4
    find_unused_parameters: bool = False


@dataclass(frozen=True)
class GrokfastSection:
    """What that pipeline calls so: a boost of the learning rate while the loss stands still."""

    enabled: bool = True
    acceleration_factor: float = 2.0
    check_interval: int = 500
    trigger_threshold: float = 0.1


@dataclass(frozen=True)
class ComplianceSection:
    """What the report of a run (docs/compliance.md) has to reach."""

    enforce_compliance: bool = True
    compliance_level: str = "enhanced"
    min_compliance_score: float = 0.95
    enable_audit_trail: bool = True


@dataclass(frozen=True)
class TrainingConfig:
    """One configuration of that phase."""

    model: ModelSection = field(default_factory=ModelSection)
    optimization: OptimizationSection = field(default_factory=OptimizationSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)
    grokfast: GrokfastSection = field(default_factory=GrokfastSection)
    nasa_compliance: ComplianceSection = field(default_factory=ComplianceSection)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainingConfig:
        """Reads YAML; what is left out has the published example's value.

        Raises:
            UserError: naming the file and the key that is unknown or has a wrong type.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read it: {getattr(error, 'strerror', None) or error}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path}: this is not YAML: {getattr(error, 'problem', None) or error}") from error
        content = {} if content is None else content
        if isinstance(content, dict) and set(content) == {"training"}:
            content = content["training"]
        sections = typing.get_type_hints(cls)
        return cls(
            **{
                name: _section(sections[name], given, f"{path}: {name}")
                for name, given in _entries(content, sections, str(path)).items()
            }
        )

    def validate(self) -> bool:
        """True.

        Raises:
            UserError: naming the key, its value and one that works.
        """
        model, grokfast, compliance = self.model, self.grokfast, self.nasa_compliance
        _choose("model.model_size", model.model_size, SIZES)
        _choose("model.quantization_bit_width", model.quantization_bit_width, tuple(_WEIGHTS))
        _choose("distributed.backend", self.distributed.backend, _BACKENDS)
        _choose("nasa_compliance.compliance_level", compliance.compliance_level, _LEVELS)
        if not 0 <= compliance.min_compliance_score <= 1:
            raise UserError(
                f"nasa_compliance.min_compliance_score {compliance.min_compliance_score:g}: use a number from 0 to 1"
            )
        if not model.bitnet_layers:
            raise UserError('model.bitnet_layers: name at least one layer, or "all"')
        positive = {f"model.{name}": getattr(model, name) for name in ("hidden_size", "num_layers", "num_heads")}
        positive |= {f"model.{name}": getattr(model, name) for name in ("vocab_size", "max_sequence_length")}
        positive |= {f"optimization.{name}": value for name, value in dataclasses.asdict(self.optimization).items()}
        positive |= {"distributed.world_size": self.distributed.world_size}
        positive |= {"grokfast.check_interval": grokfast.check_interval}
        positive |= {"grokfast.trigger_threshold": grokfast.trigger_threshold}
        may_be_0 = ("optimization.weight_decay", "optimization.max_grad_norm", "optimization.warmup_steps")
        for name, value in positive.items():
            if value is not None and (value < 0 or value == 0 and name not in may_be_0):
                raise UserError(f"{name} {value:g}: must be {'at least' if name in may_be_0 else 'above'} 0")
        if grokfast.acceleration_factor < 1:
            raise UserError(f"grokfast.acceleration_factor {grokfast.acceleration_factor:g}: must be at least 1")
        width, heads = self._of_size("hidden_size"), self._of_size("num_heads")
        if width % heads:
            raise UserError(f"model.hidden_size {width} is not divisible by model.num_heads {heads}")
        return True

    def _of_size(self, name: str) -> int:
        own: int | None = getattr(self.model, name)
        ours = {"num_heads": "num_attention_heads"}.get(name, name)
        return int(load_layer(self.model.model_size).values[f"model.{ours}"]) if own is None else own

    @property
    def ranks(self) -> int:
        """That it is meant for."""
        return self.distributed.world_size if self.distributed.enabled else 1

    def settings(self) -> dict[str, dict[str, Any]]:
        """Our settings by section, on top of the preset ``model_size``.

        Raises:
            UserError: see :meth:`validate`.
        """
        self.validate()
        model, steps, ranks = self.model, self.optimization, self.ranks
        ours: dict[str, dict[str, Any]] = {
            "model": {
                "num_layers": self._of_size("num_layers"),
                "hidden_size": self._of_size("hidden_size"),
                "num_attention_heads": self._of_size("num_heads"),
                "vocab_size": model.vocab_size,
            },
            "parallel": {"world_size": ranks},
            "data": {"seq_length": model.max_sequence_length},
            "optimizer": {
                "lr": steps.learning_rate,
                "min_lr": 0.0,
                "lr_decay_style": "constant",
                "lr_warmup_iters": steps.warmup_steps,
                "weight_decay": steps.weight_decay,
                "clip_grad": steps.max_grad_norm,
            },
            "training": {
                "micro_batch_size": steps.batch_size,
                "global_batch_size": steps.batch_size * steps.gradient_accumulation_steps * ranks,
                "eval_global_batch_size": steps.eval_batch_size * ranks,
                "eval_iters": 10,
            },
            "length": {"train_epochs": float(steps.num_epochs), "eval_interval_epochs": 1.0},
        }
        compliance = self.nasa_compliance
        ours["compliance"] = {
            "enforce_compliance": compliance.enforce_compliance,
            "compliance_level": compliance.compliance_level,
            "min_compliance_score": compliance.min_compliance_score,
        }
        if compliance.enable_audit_trail:
            ours["resilience"] = {"audit_trail": True}
        if self.distributed.enabled:
            ours["parallel"]["distributed_backend"] = self.distributed.backend
        if model.use_bitnet_linear:
            ours["model"] |= {
                "quantize_weights": _WEIGHTS[model.quantization_bit_width],
                "quant_granularity": "channel",
                "bitnet_layers": list(model.bitnet_layers),
            }
        if self.grokfast.enabled:
            ours["optimizer"] |= {
                "plateau_boost": True,
                "plateau_boost_factor": self.grokfast.acceleration_factor,
                "plateau_boost_interval": self.grokfast.check_interval,
                "plateau_boost_trigger": self.grokfast.trigger_threshold,
            }
        return ours

    def notes(self) -> list[str]:
        """Keys that have no setting of ours, each with what holds in its place."""
        unused = self.distributed.find_unused_parameters
        return [
            f"use_custom_kernels {_word(self.model.use_custom_kernels)}: of a trained model, tools/generate.py and "
            "tools/evaluate.py take --use-custom-kernels; training multiplies codes anyway",
            f"find_unused_parameters {_word(unused)}: a parameter that a step does not use has a gradient of zero, "
            "whatever this says",
            "nasa_compliance: --phase6-output has nasa_compliant and the score of the run's report; with "
            "enforce_compliance it is not written where the report does not pass (docs/compliance.md)",
            "the rate is constant behind the warm-up, and an evaluation of 10 batches follows each epoch: the keys do "
            "not say",
        ]

    def as_yaml(self, source: str) -> str:
        """A file for ``--config``."""
        notes = "".join(f"# {note}\n" for note in (f"Made from {source}.", *self.notes()))
        return notes + yaml.safe_dump({"base": self.model.model_size, **self.settings()}, sort_keys=False)


def _word(value: bool) -> str:
    return "true" if value else "false"


def _choose(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} {value}: choose {', '.join(map(str, known[:-1]))} or {known[-1]}")


def _entries(content: Any, known: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected 'key: value' lines")
    for name in content:
        if name not in known:
            raise UserError(f"{where}: unknown key '{name}'{suggestion(str(name), known)}")
    return content


def _section(cls: Any, content: Any, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = _entries({} if content is None else content, hints, where)
    return cls(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    if hint == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise UserError(f"{where}: expected a list of names, got {value!r}")
        return tuple(value)
    kind = next(one for one in (typing.get_args(hint) or (hint,)) if one is not type(None))
    if isinstance(value, str) and kind is float:  # YAML 1.1 reads 5e-5 as text
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and type(value) is int:
        return value
    if type(value) is not kind:
        expected = {bool: "true or false", int: "an integer", float: "a number", str: "text"}[kind]
        raise UserError(f"{where}: expected {expected}, got {value!r}")
    return value
