"""Muon (Jordan et al., kellerjordan.github.io/posts/muon): momentum whose singular values are made alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.kernels.newton_schulz import LONG, gram_polynomial, newton_schulz
from megaforge.optim.main_parameters import MainParameter
from megaforge.optim.matrices import Job, MatrixKind, Stack, gathered, in_batches, kind_of, shared, stacks_of
from megaforge.optim.update_rule import UpdateRule
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec

_LEAST_NORM = 1e-7
_PRECISIONS = {"low": "bf16", "high": "fp32"}


class Muon(UpdateRule):
    """Momentum, orthogonalized by Newton-Schulz iterations, for matrices; the rest is `--optimizer adam`'s.

    ``m = mu m + (1 - mu) g``; ``u = mu m + (1 - mu) g`` with Nesterov, else m; ``w -= lr * decay * w``; ``w -= lr *
    scale * orthogonalize(u)``. That is ``torch.optim.Muon`` with its own coefficients and scale. (Momentum without
    1 - mu makes the same update: orthogonalization forgets the size.)

    Which parameters are matrices is declared (``ParamSpec.update``). Each expert of a stack and each fused part (q, k,
    v; gate, up) is a matrix of its own. A matrix that is split over tp is updated as the whole it is, except with
    ``--muon-tp-mode blockwise``.

    Attributes:
        most_at_once: elements of this rank that are worked on together; each takes some 12 bytes meanwhile.
    """

    whole_parameters = True
    most_at_once: ClassVar[int] = 1 << 27

    def __init__(self, config: OptimizerConfig, parameters: Sequence[MainParameter], ctx: ParallelContext) -> None:
        super().__init__(config, parameters, ctx)
        self.implementation = f"Muon ({config.muon_num_ns_steps} {config.muon_coefficient_type} steps)"
        self._batches = in_batches(stacks_of(parameters, ctx), self.most_at_once)

    @classmethod
    def takes(cls, spec: ParamSpec) -> bool:
        return spec.update == "matrix"

    @classmethod
    def states(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return ("momentum_buffer",)

    @classmethod
    def cost(cls, config: OptimizerConfig, spec: ParamSpec, ctx: ParallelContext) -> float:
        return cls.products(config, spec, ctx)

    @classmethod
    def products(cls, config: OptimizerConfig, spec: ParamSpec, ctx: ParallelContext) -> float:
        total = 0.0
        for piece in spec.pieces(ctx):
            kind = kind_of(spec, piece, ctx)
            if config.muon_tp_mode == "blockwise":
                kind = MatrixKind(piece.shape[-2], piece.shape[-1], None, kind.axis)
            ranks = ctx.axis(kind.axis).size if kind.split is not None and config.muon_tp_mode == "distributed" else 1
            total += math.prod(piece.shape[:-2]) * multiply_adds(config, kind) / ranks
        return total

    def step(self, lr: float, done: int) -> None:
        for stacks in self._batches:
            updates = [self._momentum(stack) for stack in stacks]
            for stack, update in zip(stacks, self._orthogonalized(stacks, updates), strict=True):
                self._apply(stack, self.adjusted(stack, update), lr)

    def adjusted(self, stack: Stack, update: Tensor) -> Tensor:
        """What is made of orthogonalized matrices [b, rows, columns] of this rank before they are applied."""
        return update

    def _momentum(self, stack: Stack) -> Tensor:
        """The matrices to orthogonalize, [b, rows, columns] of this rank; momentum takes in the gradient."""
        momentum = self.config.muon_momentum
        means = stack.views(lambda main: main.state["momentum_buffer"])
        gradients = stack.views(lambda main: main.grad)
        update = means[0].new_empty((sum(map(len, means)), *means[0].shape[1:]))
        for mean, gradient, into in zip(means, gradients, update.split([len(one) for one in means]), strict=True):
            mean.lerp_(gradient, 1 - momentum)
            if self.config.muon_use_nesterov:
                torch.lerp(gradient, mean, momentum, out=into)
            else:
                into.copy_(mean)
        return update

    def _orthogonalized(self, stacks: Sequence[Stack], updates: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor | None] = [None] * len(updates)
        for name in ("tp", "etp"):
            places = [place for place, stack in enumerate(stacks) if self._travels(stack.kind, name)]
            if places:
                split = [(stacks[place].kind, updates[place]) for place in places]
                axis = self.ctx.axis(name)
                if self.config.muon_tp_mode == "duplicated":
                    made = gathered(split, axis, [partial(self._whole, kind) for kind, _ in split])
                else:
                    made = shared([self._job(kind, part) for kind, part in split], axis)
                for place, one in zip(places, made, strict=True):
                    found[place] = one
        return [
            self._whole(stack.kind, update) if one is None else one
            for stack, update, one in zip(stacks, updates, found, strict=True)
        ]

    def _travels(self, kind: MatrixKind, axis: str) -> bool:
        return kind.split is not None and kind.axis == axis and self.config.muon_tp_mode != "blockwise"

    def _job(self, kind: MatrixKind, part: Tensor) -> Job:
        steps, coefficients = self.config.muon_num_ns_steps, self.config.muon_coefficient_type
        by_gram = _by_gram(self.config, kind, part) and kind.long_is_split
        ranks = self.ctx.axis(kind.axis).size
        cost = multiply_adds(self.config, kind)
        if by_gram:  # what all ranks do alike is nobody's
            cost -= 1.5 * kind.short**2 * kind.long
        of_gram = partial(gram_polynomial, steps=steps, coefficient_type=coefficients) if by_gram else None
        return Job(kind, part, partial(self._whole, kind), of_gram, max(cost, 1.0) / ranks, _LEAST_NORM)

    def _whole(self, kind: MatrixKind, x: Tensor) -> Tensor:
        """Orthogonalizes whole matrices. The way is chosen by the shape of the whole, not by who has which part."""
        by_gram = _by_gram(self.config, kind, x)
        precision = _PRECISIONS.get(self.config.muon_fp32_matmul_prec, "split" if by_gram else "bf16")
        return newton_schulz(
            x,
            steps=self.config.muon_num_ns_steps,
            coefficient_type=self.config.muon_coefficient_type,
            algorithm="gram" if by_gram else "standard",
            precision="fp64" if x.dtype == torch.float64 else precision,
            eps=_LEAST_NORM,
        )

    def _apply(self, stack: Stack, update: Tensor, lr: float) -> None:
        sides = stack.kind.rows, stack.kind.columns
        if self.config.muon_tp_mode == "blockwise":
            sides = update.shape[1], update.shape[2]
        scale = _scale(self.config.muon_scale_mode, *sides) * self.config.muon_extra_scale_factor
        weights = stack.views(lambda main: main.master.detach())
        parts = update.split([len(one) for one in weights])
        for (main, _), weight, part in zip(stack.pieces, weights, parts, strict=True):
            own = lr * main.spec.lr_mult
            if decay := self.decay * main.spec.weight_decay:
                weight.mul_(1 - own * decay)
            weight.add_(part, alpha=-own * scale)


def multiply_adds(config: OptimizerConfig, kind: MatrixKind) -> float:
    """Of one matrix, products that are symmetric counted by half."""
    short, long, steps = kind.short, kind.long, config.muon_num_ns_steps
    if long >= LONG * short and config.muon_fp32_matmul_prec != "low":
        return 1.5 * short**2 * long + (2.5 * steps - 3) * short**3
    return steps * (1.5 * short**2 * long + 0.5 * short**3)


def _by_gram(config: OptimizerConfig, kind: MatrixKind, x: Tensor) -> bool:
    """Whether a matrix is orthogonalized through its Gram matrix: long ones, in more than bf16. On GPUs the fp32
    products that this takes are slower than the bf16 ones that it saves."""
    exact = config.muon_fp32_matmul_prec == "high" or x.dtype == torch.float64
    safe = exact or (config.muon_fp32_matmul_prec == "medium" and x.device.type != "cuda")
    return safe and kind.long >= LONG * kind.short


def _scale(mode: str, rows: int, columns: int) -> float:
    """As in NVIDIA's Emerging-Optimizers; ``shape_scaling`` is that of Jordan et al., ``spectral`` times 0.2 that of
    Liu et al. (arXiv 2502.16982)."""
    if mode == "spectral":
        return math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if mode == "unit_rms_norm" else math.sqrt(max(1.0, rows / columns))
