"""What a linear layer does with its matrix: the product and its two gradients, as an object that can be exchanged.

A layer of the family in :mod:`megaforge.parallel.layers` holds the matrix and says how it is split; its ``op``
computes. The layers, the chunked cross-entropy and the experts all call the op, so that a quantizer is one class, set
after the model has been built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megaforge.device import IS_HIP
from megaforge.kernels.grouped_mm import Runs, grouped_input_gradient, grouped_linear, grouped_weight_gradient
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.region import TensorParallelRegion

# Whether products of 16-bit matrices are added to an fp32 one (torch 2.8; on NVIDIA's GPUs).
_ADDS_WIDE = "dtype_out" in torch.ops.aten.addmm.overloads() and not IS_HIP


class Quantized(NamedTuple):
    """A matrix as a quantizer's product sees it.

    Attributes:
        values: like the weights.
        largest: the largest magnitude that a weight can have there; broadcasts to the weights.
    """

    values: Tensor
    largest: Tensor


class LinearOp(ABC):
    """``y = x W^T + b`` in its parts; none of them is differentiated.

    Shapes: x [..., in], W [out, in], y [..., out]. With ``runs`` the rows of x [N, in] are those of one expert after
    the other, W is a stack [E, out, in], and there is no bias. W and what is made of x are this rank's shards.

    Attributes:
        quantizes: whether the product sees :meth:`quantize` of the weights in their place.
        keeps_weight: whether it reads the layer's weights; False: what stands for them is the op's own.
    """

    quantizes: bool = False
    keeps_weight: bool = True

    @property
    def sums_exactly(self) -> bool:
        """Whether its products are :meth:`sums`, which are added up over ranks without rounding, and then
        :meth:`finish`: a row layer then gives the same bits however it is split."""
        return False

    def sums(self, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None) -> Tensor:
        """Partial sums [..., out] of what :meth:`encode` gave.

        Raises:
            NotImplementedError: see :attr:`sums_exactly`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sums apart from its product")

    def finish(self, sums: Tensor, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None) -> Tensor:
        """y of complete sums; of ``inside`` all but the first part, of the same tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no sums apart from its product")

    def encode(self, x: Tensor, axis: Axis | None) -> tuple[Tensor, ...]:
        """What the product needs of ``x``: what a column layer gathers and the backward pass keeps. ``x`` itself here;
        codes and a scale for each token in a quantizer.

        Args:
            axis: the axis that the input features are split over, in row layers: what is computed of a whole token (its
                largest value) has to be reduced over it (:func:`megaforge.parallel.collectives.max_over`).

        Returns:
            Tensors with the leading dimensions of ``x``.
        """
        return (x,)

    @abstractmethod
    def forward(
        self, inside: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None = None, runs: Runs | None = None
    ) -> Tensor:
        """y, of what :meth:`encode` gave."""

    @abstractmethod
    def input_gradient(self, grad: Tensor, weight: Tensor, runs: Runs | None = None) -> Tensor:
        """The gradient of x [..., in] from that of y."""

    @abstractmethod
    def weight_gradient(
        self, grad: Tensor, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None
    ) -> Tensor:
        """The gradient of W from that of y."""

    def add_weight_gradient(self, total: Tensor, grad: Tensor, inside: tuple[Tensor, ...], weight: Tensor) -> None:
        """Adds :meth:`weight_gradient` to ``total``, which may be of a wider type."""
        total += self.weight_gradient(grad, inside, weight)

    def quantize(self, weight: Tensor) -> Quantized:
        """What the product sees of the weights [(E,) out, in], at the scales of the last one: for update rules of
        quantized training.

        Raises:
            NotImplementedError: it sees the weights themselves.
        """
        raise NotImplementedError(f"{type(self).__name__} quantizes nothing")

    def make_ready(self, weight: Tensor) -> None:  # noqa: B027 - most need nothing
        """Makes now what products of this rank's shard keep of it until :meth:`forget`. Collective."""

    @property
    def code_kind(self) -> str | None:
        """How :mod:`megaforge.kernels.bitgemm` packs the codes (or ``int8``), where products and gradients need nothing
        of a weight but its code, which is its own and that of the whole matrix's scale; None elsewhere."""
        return None

    def codes_within(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """int8 [stop - start]: codes of a range of the flattened shard, whose other elements need not be there.

        Raises:
            NotImplementedError: see :attr:`code_kind`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def take_codes(self, codes: Tensor) -> None:
        """From now on the shard's weights need not be there: ``codes``, int8 in its shape, stand for them until
        :meth:`forget`, and others will come after it.

        Raises:
            NotImplementedError: see :attr:`code_kind`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def forget(self) -> None:  # noqa: B027 - most keep nothing
        """The weights have changed, by a step, a checkpoint or their average: a scale that was computed from them no
        longer holds. The new values may still be arriving; the next product finds them."""

    def after_update(self, weight: Tensor, ctx: ParallelContext) -> None:
        """The optimizer has changed ``weight`` (:class:`megaforge.parallel.after_update.AfterUpdate`)."""
        self.forget()

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        axis: Axis | None = None,
        region: TensorParallelRegion | None = None,
        leaves: TensorParallelRegion | None = None,
        runs: Runs | None = None,
    ) -> Tensor:
        """y, differentiable.

        Args:
            axis: as in :meth:`encode`.
            region: x is outside, and is entered on the way.
            leaves: y is summed over the ranks of the region, which it leaves; there is no bias.
        """
        if region is not None and region.axis.size == 1:
            region = None
        if leaves is not None and (leaves.axis.size == 1 or not self.sums_exactly):
            return leaves.exit(_Linear.apply(x, weight, bias, self, axis, region, runs, None))
        return _Linear.apply(x, weight, bias, self, axis, region, runs, leaves)


class PlainLinear(LinearOp):
    """The product in the type that the tensors have; a class below it changes some of the parts."""

    def forward(
        self, inside: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None = None, runs: Runs | None = None
    ) -> Tensor:
        (x,) = inside
        return F.linear(x, weight, bias) if runs is None else grouped_linear(x, weight, runs)

    def input_gradient(self, grad: Tensor, weight: Tensor, runs: Runs | None = None) -> Tensor:
        return grad @ weight if runs is None else grouped_input_gradient(grad, weight, runs)

    def weight_gradient(
        self, grad: Tensor, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None
    ) -> Tensor:
        (x,) = inside
        if runs is not None:
            return grouped_weight_gradient(grad, x, weight, runs)
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)

    def add_weight_gradient(self, total: Tensor, grad: Tensor, inside: tuple[Tensor, ...], weight: Tensor) -> None:
        if total.dtype == grad.dtype:
            total.addmm_(grad.t(), inside[0])
        elif _ADDS_WIDE and total.device.type == "cuda" and total.dtype == torch.float32:
            torch.addmm(total, grad.t(), inside[0], torch.float32, out=total)  # added before anything is rounded
        else:
            super().add_weight_gradient(total, grad, inside, weight)

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        axis: Axis | None = None,
        region: TensorParallelRegion | None = None,
        leaves: TensorParallelRegion | None = None,
        runs: Runs | None = None,
    ) -> Tensor:
        if runs is None and (region is None or region.axis.size == 1) and type(self) is PlainLinear:
            out = F.linear(x, weight, bias)  # autograd has this one built in: less work for each call
            return out if leaves is None else leaves.exit(out)
        return super().apply(x, weight, bias, axis=axis, region=region, leaves=leaves, runs=runs)


PLAIN = PlainLinear()


@dataclass(frozen=True)
class WeightQuantizer:
    """What ``op`` makes of a parameter; ``transposed``: it is kept as [in, out]."""

    op: LinearOp
    transposed: bool

    def forget(self) -> None:
        """The weights have changed."""
        self.op.forget()

    def __call__(self, weight: Tensor) -> Quantized:
        """In the parameter's own shape."""
        if not self.transposed:
            return self.op.quantize(weight)
        values, largest = self.op.quantize(weight.t())
        return Quantized(values.t(), largest.t() if largest.dim() else largest)


def give_quantizer(weight: Tensor, quantizer: WeightQuantizer) -> None:
    """Products see what ``quantizer`` makes of ``weight``."""
    weight.__dict__["quantizer"] = quantizer


def quantizer_of(weight: Tensor) -> WeightQuantizer:
    """What makes of a parameter that is declared quantized what products see.

    Raises:
        ValueError: nothing does.
    """
    quantizer = getattr(weight, "quantizer", None)
    if not isinstance(quantizer, WeightQuantizer):
        raise ValueError(f"a parameter of shape {tuple(weight.shape)} has no quantizer; convert() gives it one")
    return quantizer


def _gradients_wanted(ctx: Any) -> list[bool]:
    """In the backward pass of a function whose first inputs are x, weight and bias: which of their gradients this call
    of the engine asks for. A split backward pass (:mod:`megaforge.parallel.pipeline.split_backward`) asks for that of x
    at first and for the others later."""
    node = torch._C._current_autograd_node()
    assert node is not None
    below = [following for following, _ in node.next_functions]
    wanted = [
        needed and _is_asked_for(following) for needed, following in zip(ctx.needs_input_grad, below, strict=False)
    ]
    return [*wanted, False, False][:3]


def _is_asked_for(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that torch.autograd.grad was given: the engine does not say, and it is
        return True


class _Linear(torch.autograd.Function):
    """Forward: what the op makes of x, gathered where the region gathers, and the op's product. Backward: the input's
    gradient is on its way out of the region while the weight's is computed, as in Megatron-LM's
    LinearWithGradAccumulationAndAsyncCommunication; what was gathered is kept, not gathered twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        op: LinearOp,
        axis: Axis | None,
        region: TensorParallelRegion | None,
        runs: Runs | None,
        leaves: TensorParallelRegion | None,
    ) -> Tensor:
        inside = op.encode(x, axis)
        if region is not None:
            inside = tuple(region.gather(part) for part in inside)
        ctx.op, ctx.region, ctx.runs, ctx.leaves = op, region, runs, leaves
        # A frozen matrix needs nothing of x afterwards.
        ctx.save_for_backward(weight, *(inside if ctx.needs_input_grad[1] else ()))
        if leaves is None:
            return op.forward(inside, weight, bias, runs)
        sums = leaves.reduce(op.sums(inside, weight, runs))
        return op.finish(sums, tuple(leaves.own(part) for part in inside[1:]), weight, runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inside = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = _gradients_wanted(ctx)
        grad_input = grad_weight = grad_bias = work = None
        if ctx.leaves is not None:
            grad = ctx.leaves.gather(grad)
        if wants_input:
            grad_input = ctx.op.input_gradient(grad, weight, ctx.runs)
            if ctx.region is not None:
                grad_input, work = ctx.region.start_reduction(grad_input)
        if wants_weight:
            grad_weight = ctx.op.weight_gradient(grad, tuple(inside), weight, ctx.runs)
        if wants_bias:
            grad_bias = grad.flatten(0, -2).sum(0)
        if work is not None:
            work.wait()
        return grad_input, grad_weight, grad_bias, None, None, None, None, None
