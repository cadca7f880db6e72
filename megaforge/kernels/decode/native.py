"""The operators ``torch.ops.megaforge.decode_*``. Their code for CPUs is in ``csrc/decode``; there is no other: a model
that has none computes one layer after the other."""

from __future__ import annotations

import torch

from megaforge.kernels.native import define, load

define(
    "decode_block(Tensor(a!) x, str mixer, str ffn, Tensor?[] weights, Tensor(b!)[] states, Tensor?[] inputs, "
    "int[] sizes, float[] epsilons) -> ()",
    lambda *given: None,
)
define(
    "decode_experts(Tensor(a!) x, Tensor inside, Tensor chosen, Tensor weights, str activation, Tensor up, "
    "Tensor down, Tensor? sub_norm, Tensor?[] shared, float epsilon) -> ()",
    lambda *given: None,
)
define(
    "decode_head(Tensor x, Tensor norm_weight, Tensor? norm_bias, float epsilon, Tensor weight) -> Tensor",
    lambda x, norm_weight, norm_bias, epsilon, weight: weight.new_empty(x.shape[0], weight.shape[0]),
)

COMPILED = load("decode")
# A packet (torch.ops.megaforge.decode_block) looks for the overload at each call: microseconds, where a step has few.
BLOCK = torch.ops.megaforge.decode_block.default
EXPERTS = torch.ops.megaforge.decode_experts.default
HEAD = torch.ops.megaforge.decode_head.default
