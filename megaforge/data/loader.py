"""Global batches cut into each rank's micro-batches, optionally built ahead by background threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megaforge.data.data_source import SampleView
from megaforge.errors import UserError


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b samples of s tokens, in host memory.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], each token's successor.
        loss_mask: float32 [b, s], 1 where the label counts and 0 elsewhere.
        document_start: bool [b, s], True where the first token of a document lies.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    document_start: torch.Tensor


class GlobalBatchLoader:
    """Iterates over global batches; yields this rank's micro-batches of each as ``list[Batch]``.

    A global batch is the next ``global_batch_size`` samples, whatever the ranks: of these, micro-batch m of rank r
    takes ``micro_batch_size`` from number (m * dp_size + r) * micro_batch_size on. Training data has no end; a
    validation view ends, its last global batch padded with samples whose loss mask is 0.

    Args:
        consumed_samples: samples read before, by any layout and any batch size.
        num_workers: threads that build batches ahead, at most ``num_workers + 1`` of them; 0 builds on demand. The
            batches are the same.

    Attributes:
        consumed_samples: samples of all ranks in the batches handed out so far, those before included.

    Raises:
        UserError: the batch sizes do not divide, or the sequence length would change within a global batch.
    """

    def __init__(
        self,
        data: SampleView,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed_samples: int = 0,
        num_workers: int = 0,
    ) -> None:
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise UserError(
                f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size} "
                f"times the {dp_size} data-parallel ranks; {_nearest(global_batch_size, micro_batch_size, dp_size)} is"
            )
        for start in data.stage_starts:
            if start > consumed_samples and (start - consumed_samples) % global_batch_size:
                raise UserError(
                    f"the sample schedule changes at sample {start}, inside a global batch of {global_batch_size} "
                    f"that follows sample {consumed_samples}; move it to a batch's boundary"
                )
        self.data = data
        self.consumed_samples = consumed_samples
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._ranks, self._workers = dp_rank, dp_size, num_workers

    def __iter__(self) -> Iterator[list[Batch]]:
        """Goes on from ``consumed_samples``."""
        starts = iter(self._starts())
        if self._workers == 0:
            for start in starts:
                batches = self._build(start)
                self.consumed_samples = start + self._global
                yield batches
            return
        with ThreadPoolExecutor(self._workers, thread_name_prefix="megaforge-data") as pool:
            ahead: deque[tuple[int, Future[list[Batch]]]] = deque()
            while True:
                for start in itertools.islice(starts, self._workers + 1 - len(ahead)):
                    ahead.append((start, pool.submit(self._build, start)))
                if not ahead:
                    return
                start, future = ahead.popleft()
                batches = future.result()
                self.consumed_samples = start + self._global
                yield batches

    def _starts(self) -> Iterator[int] | range:
        if isinstance(self.data, Sized):
            return range(self.consumed_samples, len(self.data), self._global)
        return itertools.count(self.consumed_samples, self._global)

    def _build(self, start: int) -> list[Batch]:
        stride = self._micro * self._ranks
        first = start + self._rank * self._micro
        return [self._micro_batch(first + offset) for offset in range(0, self._global, stride)]

    def _micro_batch(self, first: int) -> Batch:
        length = self.data.sequence_length(first)
        tokens = np.empty((self._micro, length + 1), np.int64)
        marks = np.zeros((self._micro, length + 1), np.bool_)
        mask = np.ones((self._micro, length), np.float32)
        for row in range(self._micro):
            targets = self.data.fill(first + row, tokens[row], marks[row])
            mask[row, targets:] = 0.0
        if self.data.eod_mask_loss:
            mask[marks[:, 1:]] = 0.0
        whole = torch.from_numpy(tokens)
        return Batch(
            tokens=whole[:, :-1].contiguous(),
            labels=whole[:, 1:].contiguous(),
            loss_mask=torch.from_numpy(mask),
            document_start=torch.from_numpy(marks)[:, :-1].contiguous(),
        )


def _nearest(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    unit = max(micro_batch_size, 1) * dp_size
    return max(round(global_batch_size / unit), 1) * unit
