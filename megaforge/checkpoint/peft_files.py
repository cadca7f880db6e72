"""Files of Hugging Face's ``peft`` of any method that has some: written from a checkpoint, and opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megaforge.checkpoint.adapter_files import AdapterFolder, BaseModel, Folder, export_peft, model_config
from megaforge.checkpoint.adapter_start import starting_values
from megaforge.checkpoint.prefix_files import PEFT_TYPE, PrefixFolder, export_prefix
from megaforge.checkpoint.sources import TensorSource
from megaforge.config.model_config import ModelConfig


def export(source: TensorSource, directory: str | Path) -> str:
    """Writes what the checkpoint ``source`` was trained for.

    Returns:
        What there is, for people.

    Raises:
        UserError: it has nothing of this kind, or ``directory`` is not empty or cannot be written.
    """
    cfg = model_config(source)
    method = cfg.peft_method
    if method is not None and method.peft_type == PEFT_TYPE:
        return f"prefixes of {export_prefix(source, cfg, directory)} layers"
    return f"adapters of {export_peft(source, directory)} matrices"


def open_folder(directory: str | Path, flag: str = "--adapter") -> AdapterFolder | PrefixFolder:
    """The adapter of a folder, of whatever method. ``flag``: what named it, for messages.

    Raises:
        UserError: it cannot be read.
    """
    is_prefix = Folder(directory, flag).config.get("peft_type") == PEFT_TYPE
    return PrefixFolder(directory, flag) if is_prefix else AdapterFolder(directory, flag)


def beginning(folder: AdapterFolder | PrefixFolder, base: BaseModel, cfg: ModelConfig) -> Mapping[str, Tensor]:
    """What a run of ``cfg`` begins with: whole tensors by the names of its parameters.

    Raises:
        UserError: its method or model is another one than that of the folder.
    """
    if isinstance(folder, PrefixFolder):
        if cfg.has_adapters:
            raise folder.wrong("it is a prefix; use --peft p_tuning_v2")
        if folder.length != cfg.prefix_length:
            raise folder.wrong(f"its prefix has a length of {folder.length}; use --prefix-length {folder.length}")
        return folder.values(cfg)
    if not cfg.has_adapters:
        raise folder.wrong(f"it has adapters beside matrices, and --peft {cfg.peft} has none; use --peft lora")
    return starting_values(folder, base, cfg)
