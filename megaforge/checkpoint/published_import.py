"""Published weights as a checkpoint of ours: what every format has in common."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

import megaforge
from megaforge.checkpoint.compatible import describe_run
from megaforge.checkpoint.convert import write_directory
from megaforge.checkpoint.hf_folder import copy_tokenizer
from megaforge.checkpoint.sources import TensorSource
from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.config.run_config import ParallelConfig
from megaforge.data.tokenizer_files import find_tokenizer
from megaforge.errors import UserError

MODEL_FILE = "model.yaml"
TOKENIZER_DIRECTORY = "tokenizer"


@dataclasses.dataclass(frozen=True)
class Import:
    """What is to become a checkpoint, and how.

    Attributes:
        path: the file or directory in the other format.
        save: where the checkpoint goes.
        config: other sections of the configuration to record (tokenizer, sequence length).
        tokenizer: its identity, as a checkpoint records it.
        parallel, dp: the layout in whose files it is written (:func:`megaforge.checkpoint.convert.write_directory`).
        export: takes the tensors in place of a checkpoint: they go on into another format.
    """

    path: Path
    save: Path
    config: Config = dataclasses.field(default_factory=Config)
    tokenizer: Mapping[str, Any] | None = None
    parallel: ParallelConfig | None = None
    dp: int | None = None
    export: Callable[[TensorSource], None] | None = None


def own_tokenizer(directory: str) -> str | None:
    """The tokenizer that lies in a model's directory, as a ``--tokenizer-model``; None where there is none."""
    try:
        return ",".join(map(str, find_tokenizer(directory).paths))
    except UserError:
        return None


def describe_import(wanted: Import, cfg: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """The ``meta`` of a checkpoint of the model ``cfg`` that comes from ``source``.

    Raises:
        UserError: the model is not valid, or the tokenizer has more tokens than it.
    """
    data = dataclasses.replace(wanted.config.data, seq_length=_length(wanted, cfg))
    config = dataclasses.replace(wanted.config, name=wanted.path.stem, model=cfg, data=data)
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"{wanted.path}: {error}") from error
    tokenizer = wanted.tokenizer
    if tokenizer is not None and int(tokenizer["vocab_size"]) > (cfg.vocab_size or 0):
        raise UserError(
            f"--tokenizer-model {tokenizer['model']}: has {tokenizer['vocab_size']} ids, the model knows "
            f"{cfg.vocab_size}"
        )
    moved = None if tokenizer is None else {**tokenizer, "model": _new_place(wanted, str(tokenizer["model"]))}
    return describe_run(config, moved) | {"megaforge_version": megaforge.__version__, "source": dict(source)}


def write_import(wanted: Import, cfg: ModelConfig, source: TensorSource) -> Path:
    """Writes ``source`` as a checkpoint of step 0 below ``wanted.save``, unless ``wanted.export`` takes it; beside it
    ``model.yaml``, which a run that continues from it takes as ``--config``, and the tokenizer where the model came
    with one.

    Raises:
        UserError: it cannot be written.
    """
    if wanted.export is not None:
        wanted.export(source)
        return wanted.save
    path = write_directory(source, wanted.save, wanted.parallel, wanted.dp)
    try:
        if wanted.path.is_dir():
            tokenizer = wanted.save / TOKENIZER_DIRECTORY
            tokenizer.mkdir(exist_ok=True)
            if not copy_tokenizer(wanted.path, tokenizer):
                tokenizer.rmdir()
        (wanted.save / MODEL_FILE).write_text(_as_yaml(wanted, cfg), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--save {wanted.save}: {path} is there, {error.filename} is not ({error.strerror})") from error
    return path


def _new_place(wanted: Import, model: str) -> str:
    """Where a tokenizer is once the model is imported: one of its own directory has been copied."""
    paths, own = [os.path.abspath(path) for path in model.split(",")], os.path.abspath(wanted.path)
    if wanted.export is not None or not wanted.path.is_dir() or any(os.path.dirname(path) != own for path in paths):
        return model
    place = os.path.join(os.path.abspath(wanted.save), TOKENIZER_DIRECTORY)
    return ",".join(os.path.join(place, os.path.basename(path)) for path in paths)


def _length(wanted: Import, cfg: ModelConfig) -> int:
    """A sequence length that the model takes."""
    length = wanted.config.data.seq_length
    return length if cfg.max_position_embeddings is None else min(length, cfg.max_position_embeddings)


def _as_yaml(wanted: Import, cfg: ModelConfig) -> str:
    """``cfg`` as a file for ``--config``: what differs from the defaults; and its tokenizer's place."""
    default = dataclasses.asdict(ModelConfig())
    model = {name: value for name, value in dataclasses.asdict(cfg).items() if value != default[name]}
    model = {name: list(value) if isinstance(value, tuple) else value for name, value in model.items()}
    sections: dict[str, Any] = {"model": model, "data": {"seq_length": _length(wanted, cfg)}}
    if wanted.tokenizer is not None:
        place = _new_place(wanted, str(wanted.tokenizer["model"]))
        sections["data"] |= {"tokenizer_type": wanted.tokenizer["type"], "tokenizer_model": place}
    return f"# The model of {wanted.path.name}, for --config.\n" + yaml.safe_dump(sections, sort_keys=False)


Importer = Callable[[Import], Path]
