"""What a parameter is, declared once: its global identity, how it is split, and how it is treated.

Initialisation, gradient reduction, norm and clipping, the optimizer's groups, checkpoints and import/export all read
:class:`ParamSpec`; nothing derives these facts again from names or shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from megaforge.config.groups import KINDS as KINDS
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.init_rules import InitRule

Box = tuple[tuple[int, int], ...]  # (start, stop) per dimension


@dataclass(frozen=True)
class ShardPiece:
    """One rectangular piece of a parameter: where it lies in the global tensor and in this rank's local tensor."""

    global_box: Box
    local_box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.global_box)

    def local_view(self, local: torch.Tensor) -> torch.Tensor:
        """The part of this rank's ``local`` tensor that the piece names (a view)."""
        return local[tuple(slice(start, stop) for start, stop in self.local_box)]


@dataclass(frozen=True)
class ParamSpec:
    """Everything the engine must know about one parameter.

    Attributes:
        name: global name, the same at every layout: its path in the model, e.g. ``layers.3.mixer.key.weight``. Empty
            until the model is built (:func:`name_parameters`).
        shape: global (unsharded) shape.
        init: the rule that fills it (:mod:`megaforge.parallel.init_rules`).
        shard_dim: the dimension that is split, or None when every rank holds the whole tensor.
        shard_axis: the axis it is split over: etp for experts, tp otherwise.
        expert_dim: the dimension of a stack of experts that counts the experts and is split over ep.
        experts_per_token: of a stack of experts: how many of them a token uses.
        parts: sizes along ``shard_dim`` of the logical tensors fused into one (q|k|v, gate|up). Each part is split
            on its own, so a rank's local tensor is the concatenation of its share of every part. Empty: one part.
        tp_partial_grad: the tensor is replicated over tp but each rank computes only a part of its gradient
            (its own heads, experts' columns or sequence share), so gradients are summed over tp.
        weight_decay: whether weight decay applies, or a factor on it.
        lr_mult: factor on the learning rate.
        keep_fp32: stays in fp32 when the model computes in a 16-bit type (decays, norms, router).
        role: what is done with it: it multiplies (matrix, or a stack of them), its rows are looked up (lookup), it
            scales or shifts (vector), or training writes it without a gradient (state).
        update: whether an update rule of whole matrices may take it (matrix) or not (elementwise: vectors, lookups,
            and matrices that are declared so, as heads, routers and low-rank maps). By default as its role says.
        tied_to: of a matrix that the first and the last pipeline stage both hold, as embedding and as head: the other
            copy. The head's is named after the embedding.
        quantized: whether its values are latent: products see what a quantizer makes of it
            (:attr:`megaforge.parallel.linear_op.LinearOp.quantizes`).
        kind: what it is for people and planners: one of :data:`KINDS`.
        frozen: training leaves it as it is: it gets no gradient.
        token_share: share of the tokens that it is used for.
        codes_of: elements of the matrix that it holds codes of, or 0.
        means: how many tensors like its master a run keeps of it besides the update rule's.
    """

    name: str
    shape: tuple[int, ...]
    init: InitRule
    shard_dim: int | None = None
    shard_axis: Literal["tp", "etp"] = "tp"
    expert_dim: int | None = None
    experts_per_token: int = 1
    parts: tuple[int, ...] = ()
    tp_partial_grad: bool = False
    weight_decay: float = True
    lr_mult: float = 1.0
    keep_fp32: bool = False
    role: Literal["matrix", "lookup", "vector", "state"] = "vector"
    update: Literal["matrix", "elementwise"] | None = None
    tied_to: str | None = None
    kind: str = "other"
    quantized: bool = False
    frozen: bool = False
    token_share: float = 1.0
    codes_of: int = 0
    means: int = 0

    def __post_init__(self) -> None:
        if self.update is None:
            object.__setattr__(self, "update", "matrix" if self.role == "matrix" else "elementwise")
        if self.tp_partial_grad and (self.shard_dim is not None or self.expert_dim is not None):
            raise ValueError(f"{self.name}: a tensor that is split holds the whole gradient of its shard")
        if self.expert_dim is not None and (self.shard_axis != "etp" or self.expert_dim == self.shard_dim):
            raise ValueError(f"{self.name}: a stack of experts is split over ep and etp along different dimensions")
        if self.parts and (self.shard_dim is None or sum(self.parts) != self.shape[self.shard_dim]):
            raise ValueError(f"{self.name}: parts {self.parts} do not add up to dim {self.shard_dim} of {self.shape}")

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        return math.prod(self.shape)

    @property
    def active_share(self) -> float:
        """The share of the elements that one token uses."""
        return 1.0 if self.expert_dim is None else self.experts_per_token / self.shape[self.expert_dim]

    @property
    def is_tied_copy(self) -> bool:
        """Whether it is the second copy of a tied matrix: its gradient is summed with the first's, and it is not
        counted in the norm."""
        return self.tied_to is not None and self.tied_to == self.name

    @property
    def replica_axis(self) -> str:
        """The axis whose ranks hold copies of the same shard and share the work on it: edp for experts, else dp_cp."""
        return "dp_cp" if self.expert_dim is None else "edp"

    def shards(self, ctx: ParallelContext) -> int:
        """Into how many shards the tensor is cut."""
        inner = 1 if self.shard_dim is None else ctx.axis(self.shard_axis).size
        return inner * (1 if self.expert_dim is None else ctx.ep.size)

    def is_first_copy(self, ctx: ParallelContext) -> bool:
        """Whether this rank, of all that hold this shard, is the one that counts it."""
        if self.is_tied_copy:
            return False
        if self.shard_dim is None:
            inner = ctx.tp if self.expert_dim is None else ctx.etp
            return inner.rank == 0 and ctx.axis(self.replica_axis).rank == 0
        return ctx.axis(self.replica_axis).rank == 0

    def pieces(self, ctx: ParallelContext) -> tuple[ShardPiece, ...]:
        """The pieces of the global tensor that this rank holds, one per logical part.

        Raises:
            ValueError: a part, or the number of experts, is not divisible by the number of shards.
        """
        whole: list[tuple[int, int]] = [(0, size) for size in self.shape]
        held, local = list(whole), list(whole)
        if self.expert_dim is not None:
            held[self.expert_dim] = _share(self.name, self.shape[self.expert_dim], self.expert_dim, ctx.ep)
            local[self.expert_dim] = (0, held[self.expert_dim][1] - held[self.expert_dim][0])
        if self.shard_dim is None:
            return (ShardPiece(tuple(held), tuple(local)),)
        axis, dim = ctx.axis(self.shard_axis), self.shard_dim
        pieces, part_start, local_start = [], 0, 0
        for part in self.parts or (self.shape[dim],):
            start, stop = _share(self.name, part, dim, axis)
            held[dim] = (part_start + start, part_start + stop)
            local[dim] = (local_start, local_start + stop - start)
            pieces.append(ShardPiece(tuple(held), tuple(local)))
            part_start += part
            local_start += stop - start
        return tuple(pieces)

    def local_shape(self, ctx: ParallelContext) -> tuple[int, ...]:
        """Shape of this rank's tensor."""
        shape = list(self.shape)
        if self.shard_dim is not None:
            shape[self.shard_dim] //= ctx.axis(self.shard_axis).size
        if self.expert_dim is not None:
            shape[self.expert_dim] //= ctx.ep.size
        return tuple(shape)

    def take_local(self, full: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
        """This rank's tensor cut out of the ``full`` global one (a new tensor)."""
        if tuple(full.shape) != self.shape:
            raise ValueError(f"{self.name}: expected the global shape {self.shape}, got {tuple(full.shape)}")
        local = full.new_empty(self.local_shape(ctx))
        for piece in self.pieces(ctx):
            piece.local_view(local).copy_(full[tuple(slice(a, b) for a, b in piece.global_box)])
        return local


def _share(name: str, size: int, dim: int, axis: Axis) -> tuple[int, int]:
    """This rank's equal share (start, stop) of ``size`` elements."""
    share, rest = divmod(size, axis.size)
    if rest:
        raise ValueError(f"{name}: {size} along dim {dim} is not divisible by {axis.name}={axis.size}")
    return axis.rank * share, (axis.rank + 1) * share


def make_parameter(
    spec: ParamSpec, ctx: ParallelContext, dtype: torch.dtype, device: torch.device | None = None
) -> nn.Parameter:
    """An uninitialised local parameter that carries ``spec``; :func:`.init.initialize_parameters` fills it.

    Args:
        device: where it lies, if not on that of ``ctx``; meta: it has no memory until :func:`give_memory`.
    """
    spec.pieces(ctx)  # divisibility is an error here, at construction, not at first use
    dtype = torch.float32 if spec.keep_fp32 and dtype in (torch.bfloat16, torch.float16) else dtype
    parameter = nn.Parameter(torch.empty(spec.local_shape(ctx), dtype=dtype, device=device or ctx.device))
    declare(parameter, spec)
    return parameter


def give_memory(parameter: nn.Parameter, device: torch.device) -> None:
    """Memory, uninitialised, for one that was made on the device meta; it stays the same object."""
    if not parameter.is_meta:
        return
    filled = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
    filled.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, filled)


def declare(parameter: Tensor, spec: ParamSpec) -> None:
    """``parameter`` carries ``spec`` from here on."""
    parameter.__dict__["spec"] = spec


def spec_of(parameter: Tensor) -> ParamSpec:
    """The declaration of ``parameter``.

    Raises:
        ValueError: it has none: it was not made by :func:`make_parameter`.
    """
    spec = getattr(parameter, "spec", None)
    if not isinstance(spec, ParamSpec):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} carries no ParamSpec; make it with make_parameter"
        )
    return spec


def main_grad_of(parameter: Tensor) -> Tensor:
    """Where the gradients of ``parameter`` add up (:class:`megaforge.parallel.data_parallel.DataParallel`).

    Raises:
        ValueError: nothing reduces it.
    """
    grad = getattr(parameter, "main_grad", None)
    if not isinstance(grad, Tensor):
        raise ValueError(f"{spec_of(parameter).name} has no gradient that is reduced: make a DataParallel of its model")
    return grad


def name_parameters(module: nn.Module, prefix: str = "") -> None:
    """Gives every parameter that has no name yet its path in ``module``, behind ``prefix`` if there is one."""
    for path, parameter in module.named_parameters(prefix):
        spec = spec_of(parameter)
        if not spec.name:
            declare(parameter, replace(spec, name=path))


def named_specs(module: nn.Module) -> Iterator[tuple[ParamSpec, nn.Parameter]]:
    """Every distinct parameter of ``module`` with its declaration, in module order.

    Raises:
        ValueError: two different parameters claim one global name, or one has none.
    """
    seen: dict[str, int] = {}
    for parameter in module.parameters():
        spec = spec_of(parameter)
        if not spec.name:
            raise ValueError(f"a parameter of shape {spec.shape} has no name; call name_parameters once it is built")
        if seen.setdefault(spec.name, id(parameter)) != id(parameter):
            raise ValueError(f"two parameters are both called {spec.name}")
        yield spec, parameter
