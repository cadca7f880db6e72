"""Which published architecture a trained model is of."""

from __future__ import annotations

from megaforge.checkpoint.architectures.base import Architecture, choose
from megaforge.checkpoint.packed_file import QuantizedModel
from megaforge.errors import UserError
from megaforge.registry import ARCHITECTURES

_PACKED = "use --to packed, which holds every quantized model"


def architecture(model: QuantizedModel, wanted: str, among: tuple[str, ...] = ()) -> Architecture:
    """The published architecture of the model.

    Args:
        wanted: what it is asked for, for messages: ``--to hf``.
        among: names of those that will do; all by default.

    Raises:
        UserError: no published architecture computes what the model does; with what would have to be otherwise.
    """
    cfg, whose = model.config.model, f"the model of {model.source.path}"
    if cfg.online_calibration:
        raise UserError(f"{wanted}: {whose} has static steps of activations (--online-calibration); {_PACKED}")
    if cfg.quant_clip in ("activations", "both"):
        raise UserError(f"{wanted}: {whose} has clipped activations (--quant-clip {cfg.quant_clip}); {_PACKED}")
    if cfg.hadamard:
        raise UserError(f"{wanted}: {whose} has activations that are rotated (--hadamard {cfg.hadamard}); {_PACKED}")
    if any(scheme.kind not in ("binary", "ternary") for scheme in model.schemes.values()):
        raise UserError(f"{wanted}: {whose} has {cfg.quantize_weights} weights, not ternary or binary ones; {_PACKED}")
    known: list[Architecture] = [ARCHITECTURES.get(name) for name in among or ARCHITECTURES.names()]
    chosen = choose(cfg, whose, wanted, known)
    if model.schemes and not chosen.quantizable:
        raise UserError(f"{wanted}: {whose} has quantized matrices, which {chosen.name} has not; {_PACKED}")
    return chosen
