"""What turns hidden vectors into the summaries of working memory, and what trains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Orthogonal
from megaforge.parallel.layers import ReplicatedLinear
from megaforge.parallel.mappings import reduce_from_tensor_parallel
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import ParamSpec, make_parameter
from megaforge.parallel.region import TensorParallelRegion
from megaforge.reasoning.segments import segments_of


@dataclass(frozen=True)
class Strides:
    """K stretches of tokens of each of b sequences.

    Attributes:
        means: [b, K, d], of the hidden vectors of each stretch.
        tokens_BK: int64 [b, K], how many these are; 0: none, the mean is zero.
        documents_BK: int64 [b, K], the document of each, 0, 1, ... within a sequence.
    """

    means: Tensor
    tokens_BK: Tensor
    documents_BK: Tensor

    def of(self, row: int, document: int) -> Tensor:
        """[n], int64: those of one document that have tokens, in order."""
        there = (self.documents_BK[row] == document) & (self.tokens_BK[row] > 0)
        return there.nonzero().flatten()


class Summariser(nn.Module):
    """One vector of size S for every ``stride`` tokens of a document: ``down`` of the mean of their hidden vectors. It
    is trained to let ``up`` make that mean of it again, as an autoencoder.

    Both matrices are whole on every rank, and each rank of tp has their whole gradient.
    """

    def __init__(
        self,
        hidden_size: int,
        dim: int,
        ctx: ParallelContext,
        *,
        stride: int = 8,
        dtype: torch.dtype = torch.float32,
        place: torch.device | None = None,
    ) -> None:
        """
        Args:
            hidden_size: d, of the residual stream.
            dim: S.
            dtype: of the matrices.
            place: where they lie, if not on the device of ``ctx``.
        """
        super().__init__()
        self.ctx, self.stride, self.dim = ctx, stride, dim

        def layer(*shape: int) -> ReplicatedLinear:
            spec = ParamSpec("", shape, Orthogonal(), role="matrix", update="elementwise")
            return ReplicatedLinear(make_parameter(spec, ctx, dtype, place))

        self.down, self.up = layer(dim, hidden_size), layer(hidden_size, dim)

    def strides(
        self, x: Tensor, info: PackedSequence, region: TensorParallelRegion, only_SB: Tensor | None = None
    ) -> Strides:
        """Means of hidden vectors, without gradients, on every rank those of all tokens. Collective over tp and cp.

        Args:
            x: [s(/tp), b, d], the residual stream.
            only_SB: bool [s, b], of this rank's tokens, which ones count; None: all.
        """
        segments = segments_of(info, self.stride)
        batch, number = segments.tokens_BK.shape
        hidden = region.gather(x.detach())
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        counted = hidden.new_ones(hidden.shape[:2]) if only_SB is None else only_SB.to(hidden.dtype)
        places = (segments.places_SB // self.stride).flatten()
        widened = torch.cat([hidden * counted[..., None], counted[..., None]], -1).flatten(0, 1)
        sums = widened.new_zeros(batch * number, widened.shape[-1]).index_add(0, places, widened)
        sums = reduce_from_tensor_parallel(sums, self.ctx.cp).view(batch, number, -1)
        means, tokens = sums[..., :-1] / sums[..., -1:].clamp(min=1), sums[..., -1].long()
        return Strides(means, tokens, segments.fresh_BK.long().cumsum(1) - 1)

    def loss(
        self, x: Tensor, info: PackedSequence, region: TensorParallelRegion, only_SB: Tensor | None = None
    ) -> Tensor:
        """The sum over tokens of how far ``up(down(mean))`` is from their stride's mean: the mean over features of the
        squared difference. Only the two matrices get gradients; summed over cp it is that of whole sequences, and the
        same on every rank of tp."""
        found = self.strides(x, info, region, only_SB)
        again = self.up(self.down(found.means.to(self.down.weight.dtype)))
        apart = (again.to(found.means.dtype) - found.means).square().mean(-1)
        return (apart * found.tokens_BK).sum() / self.ctx.cp.size
