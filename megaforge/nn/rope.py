"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaforge.config.attention_config import AttentionConfig
from megaforge.kernels.attention.fused import Turns
from megaforge.kernels.pointwise import apply_rotary
from megaforge.nn.rope_scaling import scaled_frequencies
from megaforge.parallel.packed_sequence import PackedSequence


@dataclass(frozen=True)
class Rotary:
    """Rotates the first channels of each head by angles that grow with the token's position in its document.

    Attributes:
        channels: how many of a head's channels rotate, an even number.
        base: of the frequencies ``base^(-2i / channels)``.
        interleaved: whether channels 2i and 2i + 1 are a pair (GPT-J), and not i and i + channels / 2 (Llama).
        stretch: what positions are divided by (position interpolation: Chen et al., arXiv 2306.15595).
        scaling: the factor of :func:`megaforge.nn.rope_scaling.scaled_frequencies`, or None.
    """

    channels: int
    base: float
    interleaved: bool = False
    stretch: float = 1.0
    scaling: float | None = None

    @classmethod
    def of(cls, cfg: AttentionConfig) -> Rotary | None:
        """What the flags ask for; None where no channel would rotate."""
        width = cfg.head_dim
        channels = int(width * cfg.rotary_percent) // 2 * 2
        scaling = cfg.rope_scaling_factor if cfg.use_rope_scaling else None
        stretch = cfg.rotary_seq_len_interpolation_factor or 1.0
        return cls(channels, cfg.rotary_base, cfg.rotary_interleaved, stretch, scaling) if channels else None

    def frequencies(self, device: torch.device) -> Tensor:
        """Angle that each pair turns by from one position to the next: fp64 [channels / 2]."""
        exponent = torch.arange(0, self.channels, 2, dtype=torch.float64, device=device) / self.channels
        frequencies = self.base**-exponent
        return frequencies if self.scaling is None else scaled_frequencies(frequencies, self.scaling)

    def tables(self, info: PackedSequence, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every token's angles, [s, b, 1, channels / 2]; made once a micro-batch.

        Angles are taken in fp64, so that long positions keep their phase, and rounded once to ``dtype``.
        """
        key = ("rope", self, dtype)
        if key not in info.cache:
            positions = info.position_ids_BS.t().unsqueeze(-1).to(torch.float64)
            if self.stretch != 1:
                positions = positions / self.stretch
            angles = positions * self.frequencies(positions.device)
            info.cache[key] = (angles.cos().to(dtype).unsqueeze(2), angles.sin().to(dtype).unsqueeze(2))
        return info.cache[key]

    def turns(self, info: PackedSequence) -> Turns:
        """The same angles in fp32, for attention that turns its queries and keys itself."""
        key = ("turns", self)
        if key not in info.cache:
            info.cache[key] = Turns(*(x.squeeze(2).contiguous() for x in self.tables(info, torch.float32)))
        found: Turns = info.cache[key]
        return found

    def in_halves(self, x: Tensor) -> Tensor:
        """Heads [..., d] whose interleaved pairs are apart, as halves: queries and keys alike, so that no score sees
        it."""
        if not self.interleaved:
            return x
        pairs = x[..., : self.channels].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat([pairs, x[..., self.channels :]], dim=-1)

    def turned(self, x: Tensor, positions: int) -> Tensor:
        """Keys [..., d], their pairs :meth:`in_halves` already, so many positions on; computed in fp64."""
        angles = positions / self.stretch * self.frequencies(x.device)
        first, second, rest = x.double().split((len(angles), len(angles), x.shape[-1] - self.channels), -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)

    def __call__(self, x: Tensor, info: PackedSequence) -> Tensor:
        """Queries or keys [s, b, heads, d] -> the same, their pairs :meth:`in_halves`."""
        return apply_rotary(self.in_halves(x), *self.tables(info, x.dtype))
