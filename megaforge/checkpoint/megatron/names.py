"""Which tensor of Megatron's model is which part of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaforge.checkpoint.architectures.base import Part
from megaforge.checkpoint.boxes import box_of
from megaforge.config.model_config import ModelConfig
from megaforge.parallel.param_spec import ParamSpec

_ENDS = {
    "embedding": "embedding.word_embeddings",
    "positions": "embedding.position_embeddings",
    "final_norm": "decoder.final_layernorm",
    "head": "output_layer",
}
_IN_LAYER = {
    "mixer_norm": "input_layernorm",
    "mixer.qkv": "self_attention.linear_qkv",
    "mixer.query_norm": "self_attention.q_layernorm",
    "mixer.key_norm": "self_attention.k_layernorm",
    "mixer.output": "self_attention.linear_proj",
    "ffn_norm": "pre_mlp_layernorm",
    "ffn.up": "mlp.linear_fc1",
    "ffn.down": "mlp.linear_fc2",
    "ffn.router": "mlp.router",
    "ffn.shared_expert.up": "mlp.shared_experts.linear_fc1",
    "ffn.shared_expert.down": "mlp.shared_experts.linear_fc2",
}
# The load of the last step, for --moe-router-load-balancing-type global_aux_loss: each step makes it anew.
_OWN = ".router.previous_load"


@dataclass(frozen=True)
class MegatronPart(Part):
    """
    Attributes:
        groups: of query, key and value heads, which lie there one group after another: (queries of a group, channels of
            a head); None: the rows are in our order.
        offset: what is added to it here (1 where a norm's weight is stored without its 1).
    """

    groups: tuple[int, int] | None = None
    offset: float = 0.0

    def to_ours(self, value: Tensor) -> Tensor:
        value = value if self.groups is None else value[row_order(len(value), *self.groups)]
        return super().to_ours(value if not self.offset else value.float() + self.offset)

    def to_theirs(self, value: Tensor) -> Tensor:
        value = super().to_theirs(value if not self.offset else value - self.offset)
        if self.groups is None:
            return value
        result = torch.empty_like(value)
        result[row_order(len(value), *self.groups)] = value
        return result


def row_order(rows: int, queries: int, width: int) -> Tensor:
    """int64 [rows]: for each row of our q|k|v its row in Megatron's matrix, where each group has its queries, its key
    and its value heads together."""
    heads = torch.arange(rows).view(-1, queries + 2, width)
    return torch.cat([heads[:, :queries].flatten(), heads[:, queries].flatten(), heads[:, queries + 1].flatten()])


def unknown(specs: Mapping[str, ParamSpec]) -> list[str]:
    """Parameters that Megatron's GPT does not have."""
    return [name for name in specs if _theirs(name) is None and not name.endswith(_OWN)]


def _theirs(name: str) -> str | None:
    """The name there; experts are counted by ``{}``."""
    module, _, kind = name.rpartition(".")
    if not name.startswith("layers."):
        return f"{_ENDS[module]}.{kind}" if module in _ENDS else None
    _, layer, inside = module.split(".", 2)
    return f"decoder.layers.{layer}.{_IN_LAYER[inside]}.{kind}" if inside in _IN_LAYER else None


def parts(cfg: ModelConfig, specs: Mapping[str, ParamSpec], offset: float = 0.0) -> Iterator[MegatronPart]:
    """Every tensor of Megatron's model, where ``specs`` are the parameters of ``cfg``.

    Args:
        offset: of the norms' weights (``--apply-layernorm-1p``: 1).
    """
    groups = cfg.num_attention_heads // cfg.query_groups, cfg.head_dim
    for name, spec in specs.items():
        if name.endswith(_OWN):
            continue
        theirs, box = _theirs(name), box_of([0] * len(spec.shape), spec.shape)
        assert theirs is not None, name
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        if spec.expert_dim is None:
            grouped = groups if ".linear_qkv." in theirs else None
            moved = offset if theirs.endswith("layernorm.weight") else 0.0
            yield MegatronPart(theirs, name, box, spec.shape, layer=layer, groups=grouped, offset=moved)
            continue
        for expert in range(spec.shape[0]):
            own = theirs.replace(".mlp.", f".mlp.experts.{expert}.")
            yield MegatronPart(own, name, ((expert, expert + 1), *box[1:]), spec.shape[1:], layer=layer)
