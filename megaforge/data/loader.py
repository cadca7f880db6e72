"""Global batches cut into each rank's micro-batches, optionally built ahead by background threads."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.data.data_source import SampleView
from megaforge.data.dealing import Dealing, dealt
from megaforge.data.patience import Fill
from megaforge.errors import UserError


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b samples of s tokens, in host memory.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], each token's successor.
        loss_mask: float32 [b, s], 1 where the label counts and 0 elsewhere.
        document_start: bool [b, s], True where the first token of a document lies.
        samples: int64 [b], the number of each sample in the whole run; None where nobody counts them.
        later: with a look-ahead of n, n - 1 pairs (labels, loss mask) as above, of the second to the n-th token after
            each; with ``--eod-mask-loss`` none counts where a document begins in between.
        same_document: bool [b, s], of each of ``later`` whether that token is of the same document.
        of: samples of the whole global batch; None: every dp rank has as many as this one.
        tokens_of: tokens of the whole global batch; None: those of its samples.
        used: bool [b, s], which tokens are no padding; None: all.
        extras: what an objective adds for itself, [b, ...] each.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    document_start: Tensor
    later: tuple[tuple[Tensor, Tensor], ...] = ()
    same_document: tuple[Tensor, ...] = ()
    samples: Tensor | None = None
    of: int | None = None
    tokens_of: int | None = None
    used: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class GlobalBatchLoader:
    """Iterates over global batches; yields this rank's micro-batches of each as ``list[Batch]``.

    A global batch is the next samples, as many as ``batches`` says, whatever the ranks: of these, micro-batch m of
    rank r takes ``micro_batch_size`` from number (m * dp_size + r) * micro_batch_size on, or those that :attr:`dealing`
    gives it. Training data has no end; a validation view ends, its last global batch padded with samples whose loss
    mask is 0.

    Args:
        batches: how many samples the global batch that begins at any sample has.
        consumed_samples: samples read before, by any layout and any batch size.
        num_workers: threads that build batches ahead, at most ``num_workers + 1`` of them; 0 builds on demand. The
            batches are the same.
        look_ahead: how many tokens after each one batches tell of: 1 is its successor, the label.

    Attributes:
        consumed_samples: samples of all ranks in the batches handed out so far, those before included.
        fill: what reads a sample: that of ``data``, unless another is set.
        dealing: how many micro-batches each dp rank takes; None: all as many. What changes there between two batches
            holds for those that are not begun yet, which are the same on every rank.

    Raises:
        UserError: the batch sizes do not divide, or the sequence length would change within a global batch.
    """

    def __init__(
        self,
        data: SampleView,
        batches: BatchSchedule,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed_samples: int = 0,
        num_workers: int = 0,
        look_ahead: int = 1,
    ) -> None:
        for size in batches.sizes:
            if micro_batch_size < 1 or size < 1 or size % (micro_batch_size * dp_size):
                flag = "--global-batch-size" if size == batches.size else f"{batches.flag}: a batch of"
                raise UserError(
                    f"{flag} {size} is not a multiple of --micro-batch-size {micro_batch_size} "
                    f"times the {dp_size} data-parallel ranks; {_nearest(size, micro_batch_size, dp_size)} is"
                )
        for start in data.stage_starts:
            first, size, _ = next(
                (f, s, n) for f, s, n in batches.stretches(consumed_samples) if n is None or start < f + n * s
            )
            if start > first and (start - first) % size:
                raise UserError(
                    f"the sample schedule changes at sample {start}, inside a global batch of {size} "
                    f"that follows sample {first}; move it to a batch's boundary"
                )
        self.data = data
        self.consumed_samples = consumed_samples
        self.fill: Fill = data.fill
        self._schedule, self._micro = batches, micro_batch_size
        self._rank, self._ranks, self._workers = dp_rank, dp_size, num_workers
        self._look_ahead = look_ahead
        self.dealing: Dealing | None = None

    def __iter__(self) -> Generator[list[Batch], None, None]:
        """Goes on from ``consumed_samples``."""
        whole = self._global_batches()
        if self._workers == 0:
            for first, size in whole:
                batches = self._build(first, size, self._own(size))
                self.consumed_samples = first + size
                yield batches
            return
        with ThreadPoolExecutor(self._workers, thread_name_prefix="megaforge-data") as pool:
            ahead: deque[tuple[int, Future[list[Batch]]]] = deque()
            while True:
                for first, size in itertools.islice(whole, self._workers + 1 - len(ahead)):
                    ahead.append((first + size, pool.submit(self._build, first, size, self._own(size))))
                if not ahead:
                    return
                stop, future = ahead.popleft()
                batches = future.result()
                self.consumed_samples = stop
                yield batches

    def _global_batches(self) -> Iterator[tuple[int, int]]:
        """(first sample, samples) of each, from ``consumed_samples`` to the end of the data."""
        end = len(self.data) if isinstance(self.data, Sized) else math.inf
        for first, size, count in self._schedule.stretches(self.consumed_samples):
            for start in itertools.count(first, size) if count is None else range(first, first + count * size, size):
                if start >= end:
                    return
                yield start, size

    def _own(self, size: int) -> Sequence[int]:
        """The numbers of this rank's micro-batches among those of a global batch of ``size`` samples."""
        count = size // self._micro
        if self.dealing is None:
            return range(self._rank, count, self._ranks)
        return dealt(self.dealing.counts(count), self._rank)

    def _build(self, start: int, size: int, own: Sequence[int]) -> list[Batch]:
        return [self._micro_batch(start + number * self._micro, size) for number in own]

    def _micro_batch(self, first: int, size: int) -> Batch:
        length, beyond = self.data.sequence_length(first), self._look_ahead
        tokens = np.empty((self._micro, length + beyond), np.int64)
        marks = np.zeros((self._micro, length + beyond), np.bool_)
        mask = np.ones((self._micro, length + beyond - 1), np.float32)
        for row in range(self._micro):
            targets = self.fill(first + row, tokens[row], marks[row])
            mask[row, targets:] = 0.0
            self.data.weigh(first + row, mask[row])
        if self.data.eod_mask_loss:
            mask[marks[:, 1:]] = 0.0
        whole, counts, starts = map(torch.from_numpy, (tokens, mask, marks))
        shown = np.stack([self.data.shown(first + row, tokens[row, :length]) for row in range(self._micro)])
        later = tuple(self._later(whole, counts, starts, length))
        return Batch(
            tokens=torch.from_numpy(shown),
            labels=whole[:, 1 : length + 1].contiguous(),
            loss_mask=counts if beyond == 1 else counts[:, :length].contiguous(),
            document_start=starts[:, :length].contiguous(),
            later=tuple((labels, mask) for labels, mask, _ in later),
            same_document=tuple(same for _, _, same in later),
            samples=torch.arange(first, first + self._micro),
            of=size,
        )

    def _later(
        self, tokens: Tensor, counts: Tensor, starts: Tensor, length: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``Batch.later`` and ``Batch.same_document`` from windows of ``length`` tokens and those that follow."""
        begun = starts[:, 1 : 1 + length]
        for ahead in range(2, self._look_ahead + 1):
            mask = counts[:, ahead - 1 : ahead - 1 + length]
            begun = begun | starts[:, ahead : ahead + length]
            if self.data.eod_mask_loss:
                mask = mask.masked_fill(begun, 0.0)
            yield tokens[:, ahead : ahead + length].contiguous(), mask.contiguous(), ~begun


def _nearest(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    unit = max(micro_batch_size, 1) * dp_size
    return max(round(global_batch_size / unit), 1) * unit
