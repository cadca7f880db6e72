"""Runs from Python: :class:`TrainerBuilder` puts together the flags of a command line, and is checked as one.

    trainer = (
        Trainer.builder()
        .model("runs/base")
        .data("chat://train.jsonl", valid="chat://valid.jsonl")
        .peft(PEFTConfig(method="lora", rank=8))
        .config(train_iters=200, save="runs/tuned", load="runs/tuned")
        .build()
    )
    trainer.train()

:func:`fine_tune` does that in one call. Everything that a flag says can be said by its name in ``config``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaforge.config.cli import parse_config
from megaforge.config.fine_tuning import DEFAULTS
from megaforge.config.launcher import discover_launch
from megaforge.config.schema import settings
from megaforge.config.yaml_files import preset_names
from megaforge.errors import UserError
from megaforge.training.callbacks import Callback
from megaforge.training.prepare import prepare
from megaforge.training.sampling import SampleGenerator, Shows
from megaforge.training.setup import build_trainer, initialize_distributed
from megaforge.training.trainer import Trainer

_PRECISIONS = {"fp32": (), "bf16": ("bf16",), "fp16": ("fp16",), "fp64": ("fp64",)}


@dataclass(frozen=True)
class PEFTConfig:
    """Parameter-efficient fine-tuning, as ``--peft`` has it (docs/finetuning.md).

    Attributes:
        method: lora, qlora, prefix, p_tuning_v2, state, bitfit ...
        rank, alpha, dropout, bias, use_rslora, target_modules, rank_pattern: of adapters; None: the flags' defaults.
        prefix_length: of prefixes.
        gradient_checkpointing: compute activations again in the backward pass (``--recompute full``).
        more: other flags of the method by their names, as ``{"qlora_quant_type": "int4"}``.
    """

    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    bias: str | None = None
    use_rslora: bool = False
    target_modules: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    prefix_length: int | None = None
    gradient_checkpointing: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def flags(self) -> dict[str, Any]:
        """By the names of flags."""
        given = {
            "peft": self.method,
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "lora_bias": self.bias,
            "use_rslora": self.use_rslora or None,
            "peft_targets": tuple(self.target_modules) or None,
            "lora_rank_pattern": tuple(f"{name}={rank}" for name, rank in self.rank_pattern.items()) or None,
            "prefix_length": self.prefix_length,
            "recompute": "full" if self.gradient_checkpointing else None,
            **self.more,
        }
        return {name: value for name, value in given.items() if value is not None}


class TrainerBuilder:
    """Collects what a run is, and builds its :class:`megaforge.training.trainer.Trainer`. Methods give the builder."""

    def __init__(self) -> None:
        self._flags: dict[str, Any] = {}
        self._defaults: dict[str, Any] = {}
        self._callbacks: list[Callback] = []
        self._accumulation: int | None = None
        self._prompts: tuple[Sequence[str], int, Shows | None] | None = None

    def model(self, name: str | Path) -> TrainerBuilder:
        """A preset (``cdrmix-tiny``) or a YAML file to train from nothing, or the directory of a run to fine-tune."""
        if str(name) in preset_names() or Path(name).suffix in (".yaml", ".yml"):
            return self.config(config=str(name))
        self._defaults = dict(DEFAULTS)
        return self.config(pretrained_checkpoint=str(name))

    def data(self, *paths: str, valid: str | Sequence[str] = ()) -> TrainerBuilder:
        """Datasets or ``chat://FILE.jsonl``, and what to evaluate on."""
        valid = (valid,) if isinstance(valid, str) else tuple(valid)
        return self.config(data_path=paths, **({"valid_data_path": valid} if valid else {}))

    def peft(self, peft: PEFTConfig) -> TrainerBuilder:
        """What is trained in place of all weights."""
        return self.config(**peft.flags())

    def config(self, **flags: Any) -> TrainerBuilder:
        """Any flags by their names with underscores; the last word on each holds."""
        self._flags.update(flags)
        return self

    def strategy(self, *, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, zero: int = 0) -> TrainerBuilder:
        """How ranks share the work; how many there are is the launcher's to say (torchrun)."""
        sizes = {"tensor": tp, "pipeline": pp, "context": cp, "expert": ep}
        names = {"tensor": "tensor_model_parallel_size", "pipeline": "pipeline_model_parallel_size"}
        names |= {"context": "context_parallel_size", "expert": "expert_model_parallel_size"}
        return self.config(**{names[axis]: size for axis, size in sizes.items()}, zero_stage=zero)

    def rank(self, rank: int) -> TrainerBuilder:
        """Makes sure that this process is the ``rank`` that the caller takes it for.

        Raises:
            UserError: the launcher started it as another.
        """
        started = discover_launch().rank
        if rank != started:
            raise UserError(f"rank({rank}): this process was started as rank {started}; start it with torchrun")
        return self

    def callbacks(self, *callbacks: Callback) -> TrainerBuilder:
        """Adds to what happens around the step (:class:`megaforge.training.callbacks.Callback`)."""
        self._callbacks += callbacks
        return self

    def precision(self, name: str) -> TrainerBuilder:
        """fp32, bf16, fp16 or fp64.

        Raises:
            UserError: another.
        """
        if name not in _PRECISIONS:
            raise UserError(f"precision({name!r}): use one of {', '.join(_PRECISIONS)}")
        return self.config(**dict.fromkeys(_PRECISIONS[name], True))

    def accumulation(self, micro_batches: int) -> TrainerBuilder:
        """Micro-batches of a step on each data-parallel rank."""
        self._accumulation = micro_batches
        return self

    def quantizer(self, weights: str) -> TrainerBuilder:
        """``--quantize-weights``: ternary, binary, int4 ..."""
        return self.config(quantize_weights=weights)

    def device(self, name: str) -> TrainerBuilder:
        """cpu, cuda or auto."""
        return self.config(device=name)

    def generator(self, prompts: Sequence[str], *, tokens: int = 32, show: Shows | None = None) -> TrainerBuilder:
        """Prompts that are continued at each evaluation (:class:`megaforge.training.sampling.SampleGenerator`)."""
        self._prompts = (prompts, tokens, show)
        return self

    def arguments(self) -> list[str]:
        """The command line that says the same.

        Raises:
            UserError: a flag of no such name.
        """
        return [word for name, value in self._flags.items() for word in _words(name, value)]

    def build(self) -> Trainer:
        """Checks all of it and builds the run. Collective.

        Raises:
            UserError: as the command line's.
        """
        parsed = parse_config(self.arguments(), prog="Trainer.builder()", defaults=self._defaults)
        config = parsed.config
        if self._accumulation is not None:
            replicas = max(1, discover_launch().world_size // _model_ranks(config.parallel))
            batch = config.training.micro_batch_size * self._accumulation * replicas
            self._flags["global_batch_size"] = batch
            parsed = parse_config(self.arguments(), prog="Trainer.builder()", defaults=self._defaults)
            config = parsed.config
        run = prepare(config, parsed.notes)
        trainer = build_trainer(run, initialize_distributed(run.config))
        for callback in self._callbacks:
            trainer.add(callback)
        if self._prompts is not None:
            if run.tokenizer is None:
                raise UserError("generator: the run has no tokenizer; give tokenizer_model")
            trainer.add(SampleGenerator(run.tokenizer, *self._prompts))
        return trainer


def _model_ranks(parallel: Any) -> int:
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size)
    product = 1
    for size in sizes:
        product *= size
    return product


def _words(name: str, value: Any) -> list[str]:
    flags = {setting.name: setting.flag for setting in settings().values()} | {"config": "--config"}
    if name not in flags:
        raise UserError(f"config({name}={value!r}): there is no flag --{name.replace('_', '-')}")
    flag = flags[name]
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, (list, tuple)):
        return [flag, *map(os.fspath, map(str, value))]
    return [flag, "none" if value is None else str(value)]


def fine_tune(
    model: str | Path,
    data: str | Sequence[str],
    peft: PEFTConfig | None = None,
    *,
    valid: str | Sequence[str] = (),
    output: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    **flags: Any,
) -> Trainer:
    """Fine-tunes the run ``model`` on ``data`` and gives the trainer at its end. Collective.

    Args:
        peft: what is trained; None: all weights.
        valid: what it is evaluated on, every ``eval_interval`` iterations.
        output: ``--save`` and ``--load``: started again, it goes on.
        flags: others by their names, as ``train_iters=200, lr=1e-3``.

    Raises:
        UserError: as ``finetune_cdrmix.py``.
    """
    paths = (data,) if isinstance(data, str) else tuple(data)
    builder = Trainer.builder().model(model).data(*paths, valid=valid).callbacks(*callbacks)
    if peft is not None:
        builder.peft(peft)
    if output is not None:
        builder.config(save=str(output), load=str(output))
    trainer = builder.config(**flags).build()
    trainer.train()
    return trainer
