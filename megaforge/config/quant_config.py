"""Flags of quantized matrices. They say what the model computes, so they are a part of its own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class QuantConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of quantizers."""

    quantize_weights: str | None = flag(
        None,
        "train matrices as codes: binary (1 bit, BitNet b1), ternary (1.58 bits, b1.58), int4 or int8",
        choices=("binary", "ternary", "int4", "int8"),
    )
    quantize_activations: str = flag(
        "auto",
        "what such matrices are multiplied by, a scale for each token: int8, int4, or none; auto: int8 where weights "
        "are quantized",
        choices=("auto", "none", "int8", "int4"),
    )
    bitnet_layers: tuple[str, ...] = flag(
        ("all",),
        "which matrices are quantized: all (projections of mixers, FFNs, experts), or kinds (attention, rwkv, mamba, "
        "ffn, moe) and ends of their paths, with * and ?; embeddings, head, router and low-rank maps never are",
        metavar="PATTERN",
    )
    quant_granularity: str = flag(
        "tensor",
        "what shares a scale of weights: a whole logical matrix (q, k, v, gate, up, an expert's), a row or a group of "
        "neighbours in it",
        choices=("tensor", "channel", "group"),
    )
    quant_group_size: int = flag(128, "--quant-granularity group: neighbours that share a scale", least=1, most=1 << 20)
    quant_scale_dtype: str = flag(
        "fp32",
        "type that scales of weights are rounded to, as the file to come stores them",
        choices=("fp32", "bf16", "fp16"),
    )
    asymmetric_weights: bool = flag(
        False, "int4 and int8 weights: levels between the least and the largest weight, not around 0"
    )
    asymmetric_activations: bool = flag(
        False, "activations: levels between the least and the largest value of a token, not around 0"
    )
    quant_noise: float = flag(
        0.0, "in training: uniform noise on weights before they are rounded, this many steps wide", least=0, most=1
    )
    hadamard: int = flag(
        0,
        "rotate blocks of so many activations by a Hadamard matrix before output and down projections quantize them "
        "(a power of two; 0: no)",
        least=0,
        most=1 << 14,
    )
    online_calibration: bool = flag(
        False,
        "activations: a static step for each layer, from a moving average of the largest values that it sees in "
        "training (--calibration-interval), in place of one for each token",
    )
    quant_clip: str = flag(
        "none",
        "choose by the validation loss what share of their range levels reach (--quant-clip-grid): of weights, of "
        "activations, or of both",
        choices=("none", "weights", "activations", "both"),
    )
    sub_norm: bool = flag(False, "a norm in front of output and down projections too (SubLN), as in BitNet b1.58 2B4T")

    @property
    def activation_kind(self) -> str | None:
        """``int8``, ``int4``, or None."""
        if self.quantize_activations == "auto":
            return None if self.quantize_weights is None else "int8"
        return None if self.quantize_activations == "none" else self.quantize_activations

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized."""
        return self.quantize_weights is not None or self.activation_kind is not None

    def validate_quantizers(self) -> None:
        """
        Raises:
            UserError: naming the flag, its value and one that works.
        """
        if self.asymmetric_weights and self.quantize_weights in ("binary", "ternary"):
            raise UserError(
                f"--asymmetric-weights: --quantize-weights {self.quantize_weights} is symmetric; use int4 or int8"
            )
        if self.hadamard & (self.hadamard - 1) or self.hadamard == 1:
            raise UserError(f"--hadamard {self.hadamard}: use a power of two from 2 on, or 0")
        if not self.bitnet_layers:
            raise UserError("--bitnet-layers: name at least one layer, or all")
