"""Prefixes in ``peft``'s files of ``PREFIX_TUNING``: ``prompt_embeddings`` [length, 2 layers x groups x d], for each
attention layer its keys and its values.

``peft`` has a prefix in the cache and counts it among the positions: a query at position p is turned as at p + length,
where ours stays at p. As a rotary embedding sees distances alone, keys in the files are turned by ``length`` to make up
for that; another embedding of positions is refused. What makes a prefix (``--peft prefix``) is not in the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from megaforge.checkpoint.adapter_files import BaseModel, Folder, write_folder
from megaforge.checkpoint.sources import TensorSource
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.nn.attention import SelfAttention
from megaforge.nn.rope import Rotary
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import give_memory, name_parameters, named_specs
from megaforge.peft.prefix import DirectPrefix, Prefix

PEFT_TYPE, _TENSOR = "PREFIX_TUNING", "prompt_embeddings"


def attention_layers(model: nn.Module) -> Iterator[tuple[str, SelfAttention]]:
    """Those of a model that a prefix can stand in front of, and their paths."""
    for path, module in model.named_modules():
        if isinstance(module, SelfAttention):
            yield path, module


def _turned(keys: Tensor, attention: SelfAttention, by: int, problem: str) -> Tensor:
    """Keys [groups, length, d], ``by`` positions on.

    Raises:
        UserError: ``problem``, and why: positions are not rotary.
    """
    if attention.rotation is None and attention.positions == "none":
        return keys
    if not isinstance(attention.rotation, Rotary):
        raise UserError(f"{problem}: peft counts a prefix among the positions, which only a rotary embedding allows")
    return attention.rotation.turned(keys, by)


@torch.no_grad()
def _own_prefixes(source: TensorSource, cfg: ModelConfig) -> Iterator[tuple[SelfAttention, Tensor, Tensor]]:
    """Every attention layer of a checkpoint, the keys and the values in front of it."""
    model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta")))
    for _, attention in attention_layers(model):
        prefix = attention.prefix
        assert isinstance(prefix, Prefix)
        for spec, parameter in named_specs(prefix):
            give_memory(parameter, torch.device("cpu"))
            parameter.copy_(source.read(spec.name))
        keys, values = prefix.keys_values()
        yield attention, keys.double(), values.double()


def export_prefix(source: TensorSource, cfg: ModelConfig, directory: str | Path) -> int:
    """Writes the prefixes of the checkpoint ``source``.

    Returns:
        In front of how many layers there is one.

    Raises:
        UserError: positions are not rotary, or ``directory`` is not empty or cannot be written.
    """
    own, found, problem = source.meta["config"], [], f"--to peft: {source.path}"
    for attention, keys, values in _own_prefixes(source, cfg):
        found += [_turned(keys, attention, cfg.prefix_length, problem), values]
    groups, length, channels = found[0].shape
    table = torch.stack(found).permute(2, 0, 1, 3).reshape(length, -1)
    said = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": len(found) // 2,
        "num_attention_heads": groups,
        "token_dim": groups * channels,
        "encoder_hidden_size": groups * channels,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    dtype = torch.float64 if own.get("training", {}).get("fp64") else torch.float32
    write_folder(source, BaseModel(cfg), cfg, {_TENSOR: table.to(dtype).contiguous()}, said, directory)
    return len(found) // 2


class PrefixFolder(Folder):
    """The files of a prefix, ours or ``peft``'s.

    Attributes:
        table: [2 layers, groups, length, d], as in the files.

    Raises:
        UserError: it is not such a folder, is of another method, or its files do not belong together.
    """

    def __init__(self, directory: str | Path, flag: str = "--adapter") -> None:
        super().__init__(directory, flag)
        if self.config.get("peft_type") != PEFT_TYPE:
            raise self.wrong(f"peft_type {self.config.get('peft_type')!r}: only {PEFT_TYPE} is read beside a prefix")
        table = self.tensors.get(_TENSOR)
        try:
            length, layers, groups = (
                int(self.config[name]) for name in ("num_virtual_tokens", "num_layers", "num_attention_heads")
            )
            if table is None or self.tensors.keys() != {_TENSOR}:
                raise ValueError(f"it holds {', '.join(self.tensors)}, and not {_TENSOR} alone")
            self.table = table.view(length, 2 * layers, groups, -1).permute(1, 2, 0, 3)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self.wrong(f"its prefix does not fit what its configuration says: {error}") from error

    @property
    def length(self) -> int:
        """Keys and values in front of a layer."""
        return self.table.shape[2]

    def values(self, cfg: ModelConfig) -> dict[str, Tensor]:
        """What parameters of ``--peft p_tuning_v2`` hold, whole, by their names.

        Raises:
            UserError: the model is not one that it is of.
        """
        model = HybridModel(make_layer_context(dataclasses.replace(cfg, peft=None), ParallelContext.single("meta")))
        layers = list(attention_layers(model))
        expected = (2 * len(layers), cfg.query_groups, self.length, cfg.head_dim)
        if tuple(self.table.shape) != expected:
            there, here = ("{} x {} x {} x {}".format(*shape) for shape in (self.table.shape, expected))
            raise self.wrong(
                f"keys and values of layers x heads x length x channels are {there} there, and {here} in the model"
            )
        found = {}
        for number, (path, attention) in enumerate(layers):
            keys = _turned(self.table[2 * number].double(), attention, -self.length, f"{self.flag} {self.path}")
            found[f"{path}.prefix.keys"], found[f"{path}.prefix.values"] = keys, self.table[2 * number + 1]
        return found


@torch.no_grad()
def put_before(model: nn.Module, cfg: ModelConfig, folder: PrefixFolder, ctx: ParallelContext) -> int:
    """Puts the prefix of ``folder`` in front of the attention layers that this rank has of a model.

    Returns:
        How many there are.
    """
    values, count = folder.values(cfg), 0
    of_folder = dataclasses.replace(cfg, prefix_length=folder.length)
    for path, attention in attention_layers(model):
        attention.prefix = prefix = DirectPrefix(attention, of_folder, ctx)
        name_parameters(prefix, f"{path}.prefix")
        for spec, parameter in named_specs(prefix):
            parameter.copy_(spec.take_local(values[spec.name], ctx))
            parameter.requires_grad_(False)
        count += 1
    return count
