"""What a quantized layer knows of its ranges besides its weights: values that training writes without a gradient, and
that checkpoints hold with the weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.layers import Linear
from megaforge.parallel.param_spec import ParamSpec, make_parameter, spec_of
from megaforge.quant.quantizers import ActivationScheme, activation_range


class Ranges(nn.Module):
    """Of one layer.

    Attributes:
        clip: [2], factors on the range that the levels of weights and of activations reach (``--quant-clip``), or None.
        input: what the static steps of activations are made of (``--online-calibration``), as
            :func:`megaforge.quant.quantizers.activation_range` has it of a token: [1], or [2] where levels are not
            around zero; zeros until it is known. None: each token has a step of its own.
        watches: whether :meth:`watch` takes down the largest values.
        seen: of the tokens that this rank has seen since it was last None: like ``input``.
    """

    def __init__(self, layer: Linear, ctx: ParallelContext, *, clips: str, static: bool, asymmetric: bool) -> None:
        """``clips``: as ``--quant-clip``."""
        super().__init__()
        self.clip = _state(layer, ctx, 2, 1.0) if clips != "none" else None
        self.input = _state(layer, ctx, 2 if asymmetric else 1, 0.0) if static else None
        self.clips_weights, self.clips_inputs = clips in ("weights", "both"), clips in ("activations", "both")
        self.watches, self.seen = False, cast(Tensor | None, None)
        self._known = False

    @property
    def weight_clip(self) -> Tensor | None:
        """The factor of weights, 0-d."""
        return None if self.clip is None or not self.clips_weights else self.clip.detach()[0]

    @property
    def changes_inputs(self) -> bool:
        """Whether a token's step may be another than that of its largest value."""
        return self.clips_inputs or self.input is not None

    @property
    def has_input(self) -> bool:
        """Whether the range of activations is known. The host waits for the device only while it is not."""
        if self.input is not None and not self._known and not self.input.is_meta:
            self._known = bool(self.input.any())
        return self._known

    def watch(self, x: Tensor) -> None:
        """Takes down the range of the tokens [..., K]; a part that is computed again finds the same one."""
        assert self.input is not None
        if not x.numel():
            return
        scheme = ActivationScheme(asymmetric=len(self.input) == 2)
        found = activation_range(x, scheme).flatten(0, -2).amax(0)
        self.seen = found if self.seen is None else torch.maximum(self.seen, found)

    def extent(self, own: Tensor | None, x: Tensor) -> Tensor:
        """The ranges of the tokens ``x``, [..., 1] or [..., 2]; ``own``: those of the tokens themselves, which are not
        needed where :attr:`has_input`."""
        if self.input is not None and self.has_input:
            own = self.input.detach().expand(*x.shape[:-1], -1)
        assert own is not None
        return own if self.clip is None or not self.clips_inputs else own * self.clip.detach()[1]


def make_ranges(layer: Linear, cfg: ModelConfig, ctx: ParallelContext) -> Ranges | None:
    """What the flags ask for."""
    if cfg.quant_clip == "none" and not cfg.online_calibration:
        return None
    static = cfg.online_calibration and cfg.activation_kind is not None
    return Ranges(layer, ctx, clips=cfg.quant_clip, static=static, asymmetric=cfg.asymmetric_activations)


def _state(layer: Linear, ctx: ParallelContext, size: int, value: float) -> nn.Parameter:
    kind = spec_of(layer.weight).kind
    spec = ParamSpec("", (size,), Constant(value), weight_decay=False, keep_fp32=True, role="state", kind=kind)
    state = make_parameter(spec, ctx, layer.weight.dtype)
    state.requires_grad = False
    return state
