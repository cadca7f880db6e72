"""Mamba-2 (Dao and Gu, arXiv 2405.21060), as state-spaces/mamba and Megatron-LM have it, heads split over tp."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.errors import UserError
from megaforge.kernels.ssd.backend import ssd_backend
from megaforge.nn.recompute import recomputed
from megaforge.nn.spans import in_spans
from megaforge.nn.sublayer import NOTHING, LayerOutput, LayerState
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.context_parallel.ssd import context_parallel_ssd
from megaforge.parallel.init_rules import Box, Constant, InitRule, Normal, Uniform
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megaforge.parallel.packed_sequence import PackedSequence

TAPS = 4  # tokens that the convolution sees, as in every published model
LEAST_STEP, STEPS = 1e-4, (1e-3, 1e-1)  # the published step sizes at the start
DECAYS = (1.0, 16.0)  # the published -A at the start


@dataclass
class Mamba2State(LayerState):
    """What a layer remembers of the tokens it has seen; nothing before the first.

    Attributes:
        tail: [b, 3, channels/tp], the last inputs of the convolution.
        ssm: [b, H/tp, P, N] in fp32 (fp64 for fp64 models), this rank's heads.
    """

    tail: Tensor | None = None
    ssm: Tensor | None = None


@dataclass(frozen=True)
class Made:
    """What ``formula`` makes of the values of ``rule``."""

    rule: InitRule
    formula: Callable[[Tensor], Tensor]

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        return self.formula(self.rule.fill(seed, name, shape, box))


def _initial_log_decay(uniform: Tensor) -> Tensor:
    """log(-A), with -A uniform on :data:`DECAYS`; ``uniform`` lies in [-1/2, 1/2)."""
    low, high = DECAYS
    return (low + (uniform + 0.5) * (high - low)).log()


def _initial_step_bias(uniform: Tensor) -> Tensor:
    """The bias whose softplus is log-uniform on :data:`STEPS`."""
    low, high = (math.log(step) for step in STEPS)
    step = (low + (uniform + 0.5) * (high - low)).exp().clamp(min=LEAST_STEP)
    return step + (-torch.expm1(-step)).log()


class Mamba2Core(nn.Module):
    """What lies between the projections of a Mamba-2 layer: z | x | B | C | dt -> what is projected out.

    x, B and C pass a causal convolution over four tokens and SiLU; the recurrence runs for each head; each group of
    heads is gated by z and normed. Every part is split over tp by groups and their heads, and nothing communicates over
    it. The ranks of cp, which share each sequence, give each other the last three inputs of every chunk's convolution
    and a summary of its state.
    """

    conv_weight: nn.Parameter  # [channels/tp, 4], the last tap being the token itself
    conv_bias: nn.Parameter
    dt_bias: nn.Parameter  # [H/tp], as the next two
    a_log: nn.Parameter
    skip: nn.Parameter  # D
    norm_weight: nn.Parameter  # [H P / tp]

    def __init__(self, layer: LayerContext) -> None:
        """Declares the parameters, uninitialised; they start as published."""
        super().__init__()
        cfg, tp = layer.cfg, layer.ctx.tp.size
        heads, groups, state = cfg.mamba_heads, cfg.mamba_num_groups, cfg.mamba_state_dim
        inner, shared = heads * cfg.mamba_head_dim, groups * state
        self.heads, self.groups, self.head_dim, self.state_dim = heads // tp, groups // tp, cfg.mamba_head_dim, state
        self.inner, self.shared = inner // tp, shared // tp
        self.epsilon, self.recompute_core, self.span = cfg.norm_epsilon, layer.recompute == "selective", layer.span
        self.ssd = ssd_backend(layer.backends.get("ssd", "auto"), layer.ctx.device, layer.dtype)
        convolved, near = (inner, shared, shared), Uniform(cfg.init_std_scale / math.sqrt(TAPS))
        self._declare(layer, "conv_weight", (sum(convolved), TAPS), near, parts=convolved, weight_decay=True)
        self._declare(layer, "conv_bias", (sum(convolved),), near, parts=convolved)
        self._declare(layer, "dt_bias", (heads,), Made(Uniform(0.5), _initial_step_bias))
        self._declare(layer, "a_log", (heads,), Made(Uniform(0.5), _initial_log_decay))
        self._declare(layer, "skip", (heads,), Constant(1.0))
        self._declare(layer, "norm_weight", (inner,), Constant(1.0))

    def _declare(self, layer: LayerContext, name: str, shape: tuple[int, ...], init: InitRule, **declared: Any) -> None:
        """Registers ``self.<name>``, split over tp and kept in fp32; without weight decay unless declared so."""
        declared = {"weight_decay": False, "keep_fp32": True, "shard_dim": 0, "kind": "mamba", **declared}
        self.register_parameter(name, layer.parameter(shape, init, **declared))

    def new_state(self) -> Mamba2State:
        return Mamba2State()

    def mix(self, z: Tensor, taken: Tensor, step: Tensor, info: PackedSequence, state: Mamba2State | None) -> Tensor:
        """What is projected out, documents each on their own.

        Args:
            z: [s, b, H P / tp].
            taken: x | B | C, [s, b, channels/tp].
            step: dt, [s, b, H/tp].
            state: the tokens continue those that it has seen, and it takes them in.

        Returns:
            [s, b, H P / tp].

        Raises:
            UserError: the chunks of ``--cp`` are shorter than what the convolution sees of earlier tokens.
        """
        marks, out = _marks(info), taken  # the latter until it is known
        if state is not None:
            out, final = self._mix(z, taken, step, marks, state.tail, state.ssm)
            state.tail, state.ssm = _tail_of(taken, info, state.tail), final
        elif info.shards.axis.size > 1:
            out = recomputed(self.recompute_core, self._mix_shared, z, taken, step, marks, info.shards)
        elif self.span is not None:
            [out] = in_spans(self._span, self.span, (z, taken, step, marks), (None, None))
        else:
            out, _ = recomputed(self.recompute_core, self._mix, z, taken, step, marks)
        return out

    def _mix(
        self,
        z: Tensor,
        taken: Tensor,
        step: Tensor,
        marks: Tensor | None,
        tail: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`mix`, and the final state; ``tail`` [b, 3, channels/tp] and ``memory`` are of the tokens before."""
        before = taken.new_zeros(TAPS - 1, *taken.shape[1:]) if tail is None else tail.transpose(0, 1)
        inputs = self._inputs(self._convolved(taken, before[None], marks), step)
        y, final = self.ssd(*inputs, None if marks is None else marks[..., 0]).output(memory)
        return self._gated_norm(y, z), final

    def _span(self, tokens: tuple[Any, ...], state: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        out, final = self._mix(*tokens, *state)
        # A shorter span is the last one, whose inputs nobody sees.
        return (out,), (tokens[1][1 - TAPS :].transpose(0, 1), final)

    def _mix_shared(
        self, z: Tensor, taken: Tensor, step: Tensor, marks: Tensor | None, shards: ContextParallelShard
    ) -> Tensor:
        """:meth:`_mix` of whole sequences that the ranks of cp share."""
        pieces = taken.chunk(len(shards.chunks))
        if len(pieces[0]) < TAPS - 1:
            raise UserError(
                f"--cp {shards.axis.size}: a Mamba-2 layer needs chunks of at least {TAPS - 1} tokens, and "
                f"--seq-length / (2 x cp) is {len(pieces[0])}; use a longer sequence or a smaller --cp"
            )
        before = shards.before(torch.stack([piece[1 - TAPS :] for piece in pieces]))
        inputs = self._inputs(self._convolved(taken, before, marks), step)
        y = context_parallel_ssd(*inputs, None if marks is None else marks[..., 0], shards, self.ssd)
        return self._gated_norm(y, z)

    def _inputs(self, convolved: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first six arguments of :func:`megaforge.kernels.ssd.ssd`."""
        length, batch = step.shape[:2]
        x, b, c = convolved.split((self.inner, self.shared, self.shared), dim=-1)
        x = x.view(length, batch, self.heads, self.head_dim)
        b, c = (each.view(length, batch, self.groups, self.state_dim) for each in (b, c))
        step = F.softplus(step.to(self.dt_bias.dtype) + self.dt_bias)
        return x, step, -self.a_log.exp(), b, c, self.skip

    def _convolved(self, taken: Tensor, before: Tensor, marks: Tensor | None) -> Tensor:
        """silu of the causal convolution of [s, b, channels/tp] within each document, in fp32 (fp64); ``before``
        [chunks, 3, b, channels/tp] are the tokens in front of each chunk."""
        windows = [torch.cat(pair) for pair in zip(before, taken.chunk(len(before)), strict=True)]
        out = torch.addcmul(self.conv_bias, taken, self.conv_weight[:, -1])
        for back in range(1, TAPS):
            earlier = torch.cat([window[TAPS - 1 - back : len(window) - back] for window in windows])
            if marks is not None:
                earlier = earlier.masked_fill(marks[..., back, None], 0)
            out = torch.addcmul(out, earlier, self.conv_weight[:, -1 - back])
        return F.silu(out)

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """y * silu(z), an RMS norm of each group: [s, b, H/tp, P] in fp32 and [s, b, H P / tp] -> like the latter."""
        gated = y.flatten(2) * F.silu(z.to(y.dtype))
        each = gated.unflatten(-1, (self.groups, -1))
        normed = each * (each.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return (normed.flatten(-2) * self.norm_weight).to(z.dtype)


class Mamba2Mixer(Mamba2Core):
    """Mamba-2's sequence mixer: one fused projection in, one out."""

    def __init__(self, layer: LayerContext) -> None:
        """Declares the parameters, uninitialised. The output projection starts smaller by 1/sqrt(2 layers), as
        attention's; the rest starts as published."""
        super().__init__(layer)
        cfg = layer.cfg
        inner, shared = cfg.mamba_heads * cfg.mamba_head_dim, cfg.mamba_num_groups * cfg.mamba_state_dim
        std, bias = cfg.init_std * cfg.init_std_scale, cfg.add_bias_linear
        parts = (inner, inner, shared, shared, cfg.mamba_heads)
        declared: dict[str, Any] = {"parts": parts, "kind": "mamba", "bias": bias}
        self.input = ColumnParallelLinear(layer, cfg.hidden_size, sum(parts), init=Normal(std), enter=True, **declared)
        init = Normal(std / math.sqrt(2 * layer.count))
        self.output = RowParallelLinear(layer, inner, cfg.hidden_size, init=init, bias=bias, kind="mamba")

    def forward(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        state: Mamba2State | None = None,
    ) -> LayerOutput:
        """Normed residual stream [s(/tp), b, h] -> residual stream [s(/tp), b, h]; see :meth:`mix`."""
        z, taken, step = self.input(x).split((self.inner, self.inner + 2 * self.shared, self.heads), dim=-1)
        return LayerOutput(self.output(self.mix(z, taken, step, info, state)))


def _tail_of(taken: Tensor, info: PackedSequence, before: Tensor | None) -> Tensor:
    """[b, 3, channels/tp]: what a token behind ``taken`` [s, b, channels/tp] sees, of the last document alone."""
    known = taken.new_zeros(TAPS - 1, *taken.shape[1:]) if before is None else before.transpose(0, 1)
    tail = torch.cat([known, taken])[1 - TAPS :]
    if info.has_boundaries:
        others = [_is_in_another_document(info, back)[-1] for back in reversed(range(TAPS - 1))]
        tail = tail.masked_fill(torch.stack(others), 0)
    return tail.transpose(0, 1).contiguous()


def _marks(info: PackedSequence) -> Tensor | None:
    """Bool [s, b, 4]: whether a document starts at a token, and whether the one 1, 2, 3 places earlier is in another;
    None: there is one document each."""
    if not info.has_boundaries:
        return None
    if "Mamba-2" not in info.cache:
        others = [_is_in_another_document(info, back) for back in range(1, TAPS)]
        info.cache["Mamba-2"] = torch.cat([info.document_start_SB[..., None], *others], -1)
    found: Tensor = info.cache["Mamba-2"]
    return found


def _is_in_another_document(info: PackedSequence, back: int) -> Tensor:
    """Whether the token ``back`` places earlier is in another document: bool [s, b, 1]; anything at a beginning."""
    key = ("is in another document", back)
    if key not in info.cache:
        places, documents = info.positions_S, info.all_document_ids_BS
        info.cache[key] = (documents[:, places] != documents[:, (places - back).clamp(min=0)]).t()[..., None]
    found: Tensor = info.cache[key]
    return found
