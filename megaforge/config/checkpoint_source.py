"""Which checkpoint a command line names, and what of it the line takes over; before torch, from its manifest alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from megaforge.config.agent_config import AgentConfig
from megaforge.config.peft_config import PeftConfig
from megaforge.config.quant_config import QuantConfig
from megaforge.config.schema import settings
from megaforge.errors import UserError
from megaforge.json_text import parse_json

_PATTERN = "model.hybrid_layer_pattern"
_QUANTIZERS = frozenset(one.name for one in fields(QuantConfig)) - {"sub_norm"}
_ADAPTERS = frozenset(one.name for one in fields(PeftConfig))
_HEADS = frozenset(one.name for one in fields(AgentConfig))


def newest_meta(directory: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The newest checkpoint of ``directory``, or itself where it is one, and its ``meta``; None where there is none to
    read, which is for loading to say.

    Reads the manifest as plain JSON: the checkpoint's own reader needs torch.
    """
    steps = [path for path in directory.glob("step_*") if "." not in path.name]  # others were set aside
    for path in (directory, *sorted(steps, reverse=True)):
        try:
            meta = parse_json((path / "manifest.json").read_text(encoding="utf-8"))["meta"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (path, meta) if isinstance(meta, Mapping) else None
    return None


def at_step(values: dict[str, Any]) -> None:
    """``--load DIR --ckpt-step N`` becomes ``--load DIR/step_N``; once more changes nothing.

    Args:
        values: of settings by key, changed in place.

    Raises:
        UserError: ``--load`` names a checkpoint of another step.
    """
    load, step = values.get("checkpoint.load"), values.get("checkpoint.ckpt_step")
    if load is None or step is None:
        return
    path, name = Path(load), f"step_{step:07d}"
    if path.name == name:
        return
    if path.name.startswith("step_"):
        raise UserError(f"--ckpt-step {step}: --load {load} is one checkpoint; name its directory, or leave one out")
    values["checkpoint.load"] = str(path / name)


def take_checkpoint_args(values: dict[str, Any], origins: dict[str, str], typed: Collection[str]) -> list[str]:
    """``--use-checkpoint-args``: every setting of the model from the checkpoint of ``--load``, or of
    ``--pretrained-checkpoint`` while there is none, and its tokenizer where the line names none.

    Args:
        values, origins: of settings by key, changed in place.
        typed: the keys that stand on the command line.

    Returns:
        What to tell of flags of the line that do not hold.

    Raises:
        UserError: there is no checkpoint, and there has to be one.
    """
    if not values.get("checkpoint.use_checkpoint_args"):
        return []
    named = {
        settings()[key].flag: values[key]
        for key in ("checkpoint.load", "checkpoint.pretrained_checkpoint")
        if values.get(key) is not None
    }
    if not named:
        raise UserError("--use-checkpoint-args: there is no checkpoint to take them from; add --load DIR")
    found = next(filter(None, (newest_meta(Path(name)) for name in named.values())), None)
    if found is None:
        there = " and ".join(f"{flag} {name}" for flag, name in named.items())
        may_be_missing = same_directory(values.get("checkpoint.load"), values.get("checkpoint.save"))
        if values.get("checkpoint.exit_on_missing_checkpoint", True) and not may_be_missing:
            raise UserError(f"--use-checkpoint-args: no checkpoint in {there}; name the directory of a run")
        return [f"--use-checkpoint-args: no checkpoint in {there} yet, so this line's model flags hold"]
    path, meta = found
    told = _take_model(values, origins, typed, path, meta)
    _take_tokenizer(values, origins, path, meta)
    return [f"--use-checkpoint-args: {'; '.join(told)}"] if told else []


def same_directory(one: str | None, other: str | None) -> bool:
    """Whether both are given and name one directory."""
    return one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)


def _take_model(
    values: dict[str, Any], origins: dict[str, str], typed: Collection[str], path: Path, meta: Mapping[str, Any]
) -> list[str]:
    try:
        saved = dict(meta["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--use-checkpoint-args: {path} does not say which model it is of") from error
    told = []
    for key, setting in settings().items():
        if setting.section != "model" or (setting.name in _ADAPTERS and not saved.get("peft")):
            continue  # a base has no adapters: what it gets is for the line to say
        if setting.name in _HEADS and not saved.get("agent_heads"):
            continue
        if setting.name in _QUANTIZERS and not _is_quantized(saved):
            continue  # and so are codes of a base without any
        try:
            # What an older version did not know it did as the default says.
            value = setting.accept(saved[setting.name]) if setting.name in saved else setting.default
        except ValueError as error:
            raise UserError(f"--use-checkpoint-args: {path}: {key}: {error}") from error
        if key in typed and value != values[key]:
            if key == _PATTERN and _uncut(value) == _uncut(values[key]):
                continue  # its | are layout, not model
            told.append(f"{setting.flag} is {value}, as in {path}, not {values[key]}")
        values[key], origins[key] = value, f"checkpoint {path}"
    return told


def _is_quantized(saved: Mapping[str, Any]) -> bool:
    activations = saved.get("quantize_activations", "auto") not in (None, "none", "auto")
    return bool(saved.get("quantize_weights") or saved.get("converters") or activations)


def _uncut(pattern: str | None) -> str | None:
    return None if pattern is None else pattern.replace("|", "")


def _take_tokenizer(values: dict[str, Any], origins: dict[str, str], path: Path, meta: Mapping[str, Any]) -> None:
    saved = meta.get("tokenizer")
    if not saved or any(values.get(f"data.{name}") for name in ("tokenizer_model", "tokenizer_type", "vocab_file")):
        return
    files = str(saved["model"]).split(",")
    names = ("vocab_file", "merge_file") if len(files) == 2 else ("tokenizer_model",)
    taken: dict[str, Any] = dict(zip(names, files, strict=True))
    if len(files) == 1:
        taken["tokenizer_type"] = saved["type"]
    for name, value in taken.items():
        values[f"data.{name}"], origins[f"data.{name}"] = value, f"checkpoint {path}"
