"""Where the documents of a packed micro-batch begin: made once a micro-batch, read by every layer."""

from __future__ import annotations

from typing import Any

import torch


class SequenceInfo:
    """Document boundaries and positions of ``batch`` sequences of ``length`` tokens. Treat it as read-only.

    Attributes:
        document_start_SB: bool [s, b], true where a token sees nothing before it. Position 0 of a fresh sequence
            always does.
        position_ids_BS: int64 [b, s], position within the token's document.
        document_ids_BS: int64 [b, s], 0, 1, ... within each sequence.
        has_boundaries: whether any document starts after position 0 (a Python bool: layers branch on it for free).
        offset: tokens of these sequences that a recurrent state has already consumed.
        shared: what layers derive from the above and share with later layers (rotary tables).
    """

    def __init__(
        self,
        batch: int,
        length: int,
        device: torch.device,
        document_start_BS: torch.Tensor | None = None,
        offset: int = 0,
    ) -> None:
        """Builds the description.

        Args:
            batch: sequences.
            length: tokens of each.
            device: where the tensors live.
            document_start_BS: bool [b, s]; None when no document starts after position 0.
            offset: tokens already consumed by a recurrent state: the sequences continue, so position 0 starts nothing
                and positions count on from here.

        Raises:
            ValueError: boundaries of another shape, or together with an offset.
        """
        if document_start_BS is not None and document_start_BS.shape != (batch, length):
            raise ValueError(f"document_start has shape {tuple(document_start_BS.shape)}, expected {(batch, length)}")
        if document_start_BS is not None and offset:
            raise ValueError("a sequence that continues from a state cannot hold document boundaries")
        self.offset = offset
        self.has_boundaries = document_start_BS is not None and bool(document_start_BS[:, 1:].any())
        positions = torch.arange(offset, offset + length, device=device)
        if self.has_boundaries and document_start_BS is not None:
            start = document_start_BS.to(device=device, dtype=torch.bool).clone()
            start[:, 0] = True
            begun = torch.where(start, positions, 0).cummax(dim=1).values
            self.position_ids_BS = positions - begun
            self.document_ids_BS = start.long().cumsum(dim=1) - 1
            self.document_start_SB = start.t().contiguous()
        else:
            self.position_ids_BS = positions.expand(batch, length)
            self.document_ids_BS = torch.zeros(1, 1, dtype=torch.long, device=device).expand(batch, length)
            self.document_start_SB = torch.zeros(length, batch, dtype=torch.bool, device=device)
            if offset == 0:
                self.document_start_SB[0] = True
        self.shared: dict[Any, Any] = {}
        self._mask: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        return self.document_start_SB.shape[1]

    @property
    def places_S(self) -> torch.Tensor:
        """int64 [s], where in its sequence each token is, documents notwithstanding."""
        return torch.arange(self.length, device=self.document_start_SB.device)

    @property
    def length(self) -> int:
        return self.document_start_SB.shape[0]

    def attention_mask(self) -> torch.Tensor | None:
        """Bool [b, 1, s, s], true where query (dim 2) may see key (dim 3): causal and within one document.

        None when plain causal attention is the same; made at the first call and kept for the other layers.
        """
        if not self.has_boundaries:
            return None
        if self._mask is None:
            same = self.document_ids_BS[:, :, None] == self.document_ids_BS[:, None, :]
            self._mask = same.tril()[:, None]
        return self._mask
