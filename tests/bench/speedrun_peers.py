"""What the speedrun compares with, in plain torch: two small language models as others train them, and our dense
preset again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Optimizers = list[torch.optim.Optimizer]
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1


class LlamaLoss(nn.Module):
    """Hugging Face transformers' Llama, its embedding tied as ours is."""

    def __init__(self, vocabulary: int, length: int, hidden: int = 192, layers: int = 6, inner: int = 640) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                vocab_size=vocabulary,
                max_position_embeddings=length,
                tie_word_embeddings=True,
                rms_norm_eps=1e-6,
            )
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """int64 [b, s] twice -> summed cross-entropy."""
        logits = self.llama(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")

    def optimizers(self, lr: float, lr_mult: float = 1.0) -> Optimizers:
        """AdamW of everything, embeddings at ``lr_mult`` times the rate; norms do not decay."""
        return [_adamw(self, list(self.parameters()), lr, lr_mult)]


class DensePreset(nn.Module):
    """Our model of attention and squared ReLU without experts, in operations that torch.compile fuses. Parameters have
    the names of :class:`megaforge.models.hybrid.HybridModel`, whose initial values it is given; documents of a window
    see each other, as in the other peers."""

    def __init__(
        self, vocabulary: int, length: int, hidden: int = 192, layers: int = 6, inner: int = 960, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(DenseBlock(hidden, inner, heads) for _ in range(layers))
        self.final_norm = nn.RMSNorm(hidden, eps=1e-6)
        half = hidden // heads // 2
        angles = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", -angles.sin()[:, None], persistent=False)  # _rotated turns the other way

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """int64 [b, s] twice -> summed cross-entropy."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")

    def optimizers(self, lr: float, lr_mult: float = 1.0) -> Optimizers:
        """AdamW of everything, embeddings at ``lr_mult`` times the rate; norms do not decay."""
        return [_adamw(self, list(self.parameters()), lr, lr_mult)]


class DenseBlock(nn.Module):
    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mixer_norm, self.ffn_norm = nn.RMSNorm(hidden, eps=1e-6), nn.RMSNorm(hidden, eps=1e-6)
        self.mixer = nn.ModuleDict(
            {
                "qkv": nn.Linear(hidden, 3 * hidden, bias=False),
                "output": nn.Linear(hidden, hidden, bias=False),
            }
        )
        self.ffn = nn.ModuleDict(
            {
                "up": nn.Linear(hidden, inner, bias=False),
                "down": nn.Linear(inner, hidden, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        fused = self.mixer["qkv"](self.mixer_norm(x))
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in fused.chunk(3, dim=-1))
        query, key = (_rotated(part, cos, sin).transpose(1, 2) for part in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value.transpose(1, 2), is_causal=True)
        x = x + self.mixer["output"](mixed.transpose(1, 2).flatten(-2))
        return x + self.ffn["down"](F.relu(self.ffn["up"](self.ffn_norm(x))).square())


class SpeedrunGPT(nn.Module):
    """A small transformer as the public speedruns train it (KellerJordan/modded-nanogpt, karpathy/nanochat): norms
    without weights, rotary positions, norms of queries and keys, squared ReLU, a gated smear of each token's embedding
    into the next one, projections that start at zero, a head of its own, softly capped logits; Muon for the matrices of
    blocks, AdamW for the rest."""

    def __init__(self, vocabulary: int, length: int, hidden: int = 192, layers: int = 6, inner: int = 800) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.smear = nn.Linear(12, 1, bias=False)
        self.smear_scale = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(SpeedrunBlock(hidden, inner) for _ in range(layers))
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        nn.init.zeros_(self.head.weight)
        angles = torch.outer(torch.arange(length), 10000.0 ** -torch.linspace(0, 1, hidden // 8))
        self.register_buffer("cos", angles.cos()[:, None])
        self.register_buffer("sin", angles.sin()[:, None])

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """int64 [b, s] twice -> summed cross-entropy."""
        x = self.embedding(tokens)
        gate = self.smear_scale * torch.sigmoid(self.smear(x[:, 1:, :12]))
        x = _norm(torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = 15 * torch.tanh(self.head(_norm(x)).float() / 15)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def optimizers(self, lr: float, lr_mult: float = 1.0) -> Optimizers:
        """One rate for both: torch's ``match_rms_adamw`` gives Muon's update the size of AdamW's."""
        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        known = set(map(id, matrices))
        rest = [p for p in self.parameters() if id(p) not in known]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        return [muon, _adamw(self, rest, lr, lr_mult)]


class SpeedrunBlock(nn.Module):
    def __init__(self, hidden: int, inner: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        normed = _norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        query, key = (_norm(_rotated(part, cos, sin)) for part in (query, key))
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2).to(query.dtype), is_causal=True
        )
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.relu(self.up(_norm(x))).square())


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[: x.shape[1]].to(x.dtype), sin[: x.shape[1]].to(x.dtype)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def _adamw(model: nn.Module, parameters: list[nn.Parameter], lr: float, lr_mult: float) -> torch.optim.Optimizer:
    """Rates are the schedule's times ``lr_mult`` for embeddings, a head that is tied to one included."""
    lookups = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p in lookups], "weight_decay": WEIGHT_DECAY, "lr_mult": lr_mult},
        {"params": [p for p in parameters if p.ndim >= 2 and p not in lookups], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=BETAS, fused=True)
