"""Random weights under RWKV-LM's x070 names and shapes, with its unused tensors of layer 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

VOCAB, WIDTH, HEAD, LAYERS, FFN = 97, 128, 64, 3, 320
RANKS = {"w": 32, "a": 48, "v": 16, "g": 64}  # not the published rule's: they must be read off the tensors


def published_weights(
    seed: int = 0,
    vocab: int = VOCAB,
    width: int = WIDTH,
    layers: int = LAYERS,
    ffn: int = FFN,
    ranks: Mapping[str, int] = RANKS,
) -> dict[str, Tensor]:
    """fp32 tensors of such a scale that every part of the model matters to the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + normal(width, scale=0.2), f"{name}.bias": normal(width, scale=0.2)}

    weights = {"emb.weight": normal(vocab, width), "head.weight": normal(vocab, width, scale=width**-0.5)}
    weights |= norm("ln_out") | norm("blocks.0.ln0")
    for layer in range(layers):
        block = f"blocks.{layer}"
        weights |= norm(f"{block}.ln1") | norm(f"{block}.ln2") | norm(f"{block}.att.ln_x")
        for letter in "rwkvag":
            weights[f"{block}.att.x_{letter}"] = torch.rand(1, 1, width, generator=generator)
        for letter, rank in ranks.items():
            weights[f"{block}.att.{letter}1"] = normal(width, rank, scale=width**-0.5)
            weights[f"{block}.att.{letter}2"] = normal(rank, width, scale=rank**-0.5)
        for name, mean in (("w0", -2.0), ("a0", 0.0), ("v0", 0.5), ("k_k", 0.7), ("k_a", 1.0)):
            weights[f"{block}.att.{name}"] = mean + normal(1, 1, width, scale=0.3)
        weights[f"{block}.att.r_k"] = normal(width // HEAD, HEAD, scale=0.1)
        for name in ("receptance", "key", "value", "output"):
            weights[f"{block}.att.{name}.weight"] = normal(width, width, scale=width**-0.5)
        weights[f"{block}.ffn.x_k"] = torch.rand(1, 1, width, generator=generator)
        weights[f"{block}.ffn.key.weight"] = normal(ffn, width, scale=width**-0.5)
        weights[f"{block}.ffn.value.weight"] = normal(width, ffn, scale=ffn**-0.5)
    return weights
