"""Mamba-2's recurrence by the Triton kernels of mamba-ssm (state-spaces/mamba, ``ops.triton``), on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaforge.errors import require
from megaforge.kernels.ssd.piece import SSD

CHUNK = 128  # tokens, as Megatron-LM calls it


def scan(purpose: str = "--mamba-backend mamba-ssm") -> Callable[..., Any]:
    """``mamba_chunk_scan_combined`` of a release whose gradients follow torch's deterministic algorithms, from 2.3 on.
    ``purpose``: what needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    require("mamba_ssm.utils.determinism", extra="mamba", purpose=purpose)
    module = require("mamba_ssm.ops.triton.ssd_combined", extra="mamba", purpose=purpose)
    found: Callable[..., Any] = module.mamba_chunk_scan_combined
    return found


def ssd_mamba_ssm(dtype: torch.dtype) -> SSD:
    """The implementation whose x, b, c and outputs are of ``dtype``; its steps, decays and states stay in fp32."""

    def piece(*inputs: Any) -> KernelPiece:
        return KernelPiece(dtype, *inputs)

    return piece


@dataclass
class KernelPiece:
    """A :class:`megaforge.kernels.ssd.piece.Piece`. The kernels run once, and what a state before the piece gives is
    added in plain torch where it is known only after :meth:`summary`.

    Attributes:
        dtype: of x, b and c while the kernels have them.
        inputs: as :func:`megaforge.kernels.ssd.ssd` has them.
    """

    dtype: torch.dtype
    x: Tensor
    step: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor
    document_start: Tensor | None
    _alone: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def summary(self) -> tuple[Tensor, Tensor]:
        self._alone = self._run(None)
        return self._left()[-1], self._alone[1]

    def output(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._alone is None or initial_state is None:
            return self._alone or self._run(initial_state)
        y, added = self._alone
        left, groups = self._left(), self.b.shape[2]
        states = initial_state.unflatten(1, (groups, -1)).to(left.dtype)  # [b, G, H/G, P, N]
        seen = torch.einsum("sbgn,bghpn->sbghp", self.c.to(left.dtype), states).flatten(2, 3) * left[..., None]
        return (y + seen).to(y.dtype), left[-1][..., None, None] * initial_state + added

    def _left(self) -> Tensor:
        """[s, b, H]: what is left of the state before the piece once a token is done."""
        left = (self.a * self.step).cumsum(0).exp()
        if self.document_start is not None:
            left = left.masked_fill((self.document_start.cumsum(0) > 0)[..., None], 0)
        return left

    def _run(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The kernels have the batch first. The documents of a sequence are numbered, 0 being that of the state."""
        x, b, c = (each.to(self.dtype).transpose(0, 1) for each in (self.x, self.b, self.c))
        number = None
        if self.document_start is not None:
            number = self.document_start.cumsum(0, dtype=torch.int32).t().contiguous()
        y, final = scan()(
            x, self.step.transpose(0, 1), self.a, b, c, CHUNK,
            D=self.skip, initial_states=initial_state, seq_idx=number, return_final_states=True,
        )  # fmt: skip
        return y.transpose(0, 1).to(self.x.dtype), final
