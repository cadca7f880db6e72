"""The samples a run trains and validates on.

Sample k of a run is a pure function of (content of the sources, seed, schedule, k). It does not depend on how many
ranks or workers there are, how they batch, how long the run is, or where it was resumed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megaforge.data.blend import parse_split, split_ranges
from megaforge.data.indexed_dataset import IndexedDataset
from megaforge.data.loader import Batch, GlobalBatchLoader
from megaforge.data.manifest import Sidecar, content_digest, digest_of, read_sidecar
from megaforge.data.sample_order import EpochOrder, TokenStream, has_native_copy, key_of, shuffled
from megaforge.data.schedule import Plan, SampleSchedule, check_state, make_state
from megaforge.errors import UserError

__all__ = ["Batch", "GlobalBatchLoader", "Sample", "SampleSchedule", "TrainingData", "ValidationData"]

SPLITS = ("train", "valid", "test")
_SCAN_BYTES = 1 << 30  # token files up to here are scanned for foreign ids at the start; larger ones as they are read
_SCAN_CHUNK = 1 << 25
_NOTHING = "no document has two tokens, and --eod-mask-loss leaves out the first of each; drop --eod-mask-loss"


class Sample(NamedTuple):
    """One window of S + 1 tokens: the inputs are all but the last, the labels all but the first.

    Attributes:
        tokens: int64 [S + 1].
        document_start: bool [S + 1], True where the first token of a document lies.
        targets: how many labels count, from the left; S except in a validation split's last window.
        source, lane, cursor: the source's number, its token stream's, and the cursor in that stream, which together
            identify a training sample.
    """

    tokens: torch.Tensor
    document_start: torch.Tensor
    targets: int
    source: int
    lane: int
    cursor: int


@dataclass(frozen=True)
class _Source:
    dataset: IndexedDataset
    sidecar: Sidecar | None
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    ranges: list[tuple[int, int]]

    def extents(self, split: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        first, stop = self.ranges[SPLITS.index(split)]
        return self.starts[first:stop], self.lengths[first:stop]


class TrainingData:
    """The endless training samples of a blend of datasets.

    Args:
        sources: [(weight, prefix)], as :func:`megaforge.data.blend.parse_data_path` returns them.
        split: ``--split``: contiguous shares of each source's documents for train, valid and test.
        schedule: seed, sequence length and later changes.
        vocab_size: ids the model knows; larger ones in the data are an error. None checks nothing.
        tokenizer_fingerprint: SHA-256 of the run's tokenizer, compared with the one recorded beside each dataset.
        eod_mask_loss: batches give no loss to predicting the first token of the next document.
        cache_dir: where the ranks of a machine share the epochs' order; None keeps 16 bytes a document in memory.

    Attributes:
        digest: SHA-256 of the content of all sources in order.
        notices: things to say once to the user, such as that a tokenizer could not be checked.

    Raises:
        UserError: a missing, damaged, foreign or empty dataset, an empty training split, another tokenizer, or ids
            beyond the vocabulary.
    """

    def __init__(
        self,
        sources: Sequence[tuple[float, str]],
        split: str,
        schedule: SampleSchedule,
        *,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
        eod_mask_loss: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.eod_mask_loss = eod_mask_loss
        self.notices: list[str] = []
        if not has_native_copy():
            self.notices.append(
                "reading samples with NumPy: the extension megaforge.data._data_helpers was not built "
                "(pip install --no-build-isolation -e .); short documents are read several times slower"
            )
        self.split_text, self.split = split, parse_split(split)
        weights = [weight for weight, _ in sources]
        Plan(schedule, weights)  # a schedule that cannot be is an error before any file is opened
        self._vocab_size = vocab_size
        self._sources: list[_Source] = []
        self._streams: list[TokenStream] = []
        self._lane_of: list[tuple[int, int]] = []
        shares: list[list[float]] = []
        digests: list[str] = []
        for _, prefix in sources:
            source = self._open(prefix, tokenizer_fingerprint)
            digests.append(content_digest(source.dataset, source.sidecar))
            first, stop = source.ranges[0]
            # The content names the source, so that listing another beside it does not reshuffle it. The same files
            # listed twice are told apart by their count.
            key = [schedule.seed, digests[-1], Counter(digests)[digests[-1]]]
            tokens = int(source.extents("train")[1].sum())
            if tokens == 0:
                raise UserError(
                    f"--split {split} leaves no training tokens in {prefix}: {stop - first} of its "
                    f"{source.dataset.num_documents} documents are for training; give the first number a larger share"
                )
            lanes = self._lanes(source, key, schedule.lanes, cache_dir)
            shares.append([lane.num_tokens / tokens for lane in lanes])
            self._lane_of += [(len(self._sources), number) for number in range(len(lanes))]
            self._sources.append(source)
            self._streams += lanes
        # Without the mask even a single token has a successor: the next epoch's.
        if eod_mask_loss and not any(_targets_of(source.extents("train")[1]) for source in self._sources):
            raise UserError(
                f"--data-path {' '.join(prefix for _, prefix in sources)}: there is nothing to predict in its training "
                f"part: {_NOTHING}"
            )
        self.plan = Plan(schedule, weights, shares)
        self._read_checks = [self._must_check_reads(source) for source in self._sources]
        self.digest = digest_of(digests)
        self._sample_key = key_of("sample", schedule.seed, self.digest)

    def _lanes(
        self, source: _Source, key: list[object], lanes: int, cache_dir: str | os.PathLike[str] | None
    ) -> list[TokenStream]:
        """The source's training documents dealt out, in a keyed order, to ``lanes`` streams of about equal size."""
        starts, lengths = source.extents("train")
        numbers = np.arange(source.ranges[0][0], source.ranges[0][1])
        full = np.flatnonzero(lengths)
        lanes = min(lanes, len(full))
        dealt = full if lanes == 1 else full[shuffled(key_of("lanes", *key), numbers[full])]
        streams = []
        for lane in range(lanes):
            own = np.sort(dealt[lane::lanes])
            lane_key = [*key, lanes, lane]
            streams.append(
                TokenStream(source.dataset.tokens, starts[own], lengths[own], numbers[own], lane_key, cache_dir)
            )
        return streams

    @property
    def stage_starts(self) -> list[int]:
        """The samples at which the sequence length or the mix may change."""
        return self.plan.starts

    @property
    def epoch_tokens(self) -> list[int]:
        """Training tokens of one epoch of each source."""
        return [int(source.extents("train")[1].sum()) for source in self._sources]

    def sequence_length(self, k: int) -> int:
        """S of sample ``k``."""
        return self.plan.stage_at(k).sequence_length

    def locate(self, k: int) -> tuple[int, int, int]:
        """(source, lane, token cursor) of sample ``k``: its identity."""
        stream, cursor = self._stream_at(k)
        return (*self._lane_of[stream], cursor)

    def _stream_at(self, k: int) -> tuple[int, int]:
        """The token stream that sample ``k`` comes from, and its cursor there."""
        stage = self.plan.stage_at(k)
        stream, ordinal = stage.blend.locate(k - stage.start)
        return stream, stage.cursors[stream] + ordinal * stage.sequence_length

    def sample(self, k: int) -> Sample:
        """Sample ``k`` >= 0 of the run.

        Raises:
            UserError: an id beyond the vocabulary, in a file too large to have been scanned before.
        """
        length = self.plan.stage_at(k).sequence_length
        tokens, marks = np.empty(length + 1, np.int64), np.zeros(length + 1, np.bool_)
        self._read(k, tokens, marks)
        return Sample(torch.from_numpy(tokens), torch.from_numpy(marks), length, *self.locate(k))

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        """Writes sample ``k`` into ``tokens`` int64 [S + 1] and its document starts into ``marks`` (False before).

        Returns how many labels count: S.
        """
        self._read(k, tokens, marks)
        return len(tokens) - 1

    def _read(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> None:
        stream, cursor = self._stream_at(k)
        self._streams[stream].copy(cursor, tokens, marks)
        source = self._lane_of[stream][0]
        if self._read_checks[source]:
            self._check_ids(source, tokens)

    def generator(self, k: int) -> np.random.Generator:
        """Randomness that belongs to sample ``k``: counter-based Philox, keyed by the data, the seed and ``k``."""
        return np.random.Generator(np.random.Philox(key=np.array([self._sample_key, k], np.uint64)))

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """The JSON-like state to save when samples [0, consumed_samples) have been trained on."""
        return make_state(self.plan, self.digest, self.split, consumed_samples)

    def check_state(self, saved: dict[str, Any]) -> None:
        """Refuses to continue a run whose past this data and schedule would not have produced.

        Raises:
            UserError: names the field that differs.
        """
        check_state(self.state(int(saved.get("consumed_samples", 0))), saved)

    def bytes_per_token(self, split: str = "valid") -> float | None:
        """UTF-8 bytes a token of the split stands for, from the sidecars' totals; None if a dataset has no record."""
        tokens = text = 0.0
        for source in self._sources:
            count = int(source.extents(split)[1].sum())
            ratio = source.sidecar.bytes_per_token if source.sidecar else None
            if ratio is None and count:
                return None
            tokens, text = tokens + count, text + count * (ratio or 0.0)
        return text / tokens if tokens else None

    def validation(self, split: str = "valid", sequence_length: int | None = None) -> ValidationData:
        """The split's documents in file order, every token predicted once, cut into windows.

        Raises:
            UserError: no label in the split counts.
        """
        length = self.plan.stages[0].sequence_length if sequence_length is None else sequence_length
        parts = [(source.dataset.tokens, *source.extents(split)) for source in self._sources]
        if all(int(lengths.sum()) < 2 for _, _, lengths in parts):
            raise UserError(
                f"--split {self.split_text} leaves no documents to evaluate in its '{split}' part: give the "
                f"{('first', 'second', 'third')[SPLITS.index(split)]} number a larger share, or use more documents"
            )
        if self.eod_mask_loss and not any(_targets_of(lengths) for _, _, lengths in parts):
            raise UserError(f"--split {self.split_text}: there is nothing to predict in its '{split}' part: {_NOTHING}")
        return ValidationData(parts, length, self.eod_mask_loss)

    def _open(self, prefix: str, fingerprint: str | None) -> _Source:
        dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
        if dataset.num_tokens == 0:
            raise UserError(f"{dataset.bin_path} is empty: its {dataset.num_documents} documents hold no tokens")
        if sidecar is None:
            if fingerprint is not None:
                self.notices.append(f"{prefix} has no .json beside it, so its tokenizer cannot be checked")
        elif fingerprint is not None and sidecar.fingerprint not in (None, fingerprint):
            raise UserError(
                f"{prefix} was tokenized with another tokenizer (SHA-256 {sidecar.fingerprint}, recorded in "
                f"{sidecar.path}) than --tokenizer-model names (SHA-256 {fingerprint}): use that tokenizer, or "
                "preprocess the text again with this one"
            )
        starts, lengths = dataset.document_extents()
        return _Source(dataset, sidecar, starts, lengths, split_ranges(self.split, dataset.num_documents))

    def _must_check_reads(self, source: _Source) -> bool:
        """Looks for ids beyond the vocabulary as early as is cheap; True if only reading can tell."""
        dataset, sidecar = source.dataset, source.sidecar
        info, vocab_size = np.iinfo(dataset.dtype), self._vocab_size
        if vocab_size is None or (info.max < vocab_size and info.min == 0):
            return False
        if sidecar is not None and sidecar.vocab_size is not None:
            if sidecar.vocab_size > vocab_size:
                raise UserError(
                    f"{dataset.bin_path} holds ids of a tokenizer of {sidecar.vocab_size:,} (recorded in "
                    f"{sidecar.path}), but the model's vocabulary has {vocab_size:,}; raise --vocab-size or use the "
                    "dataset's tokenizer"
                )
            return False
        if dataset.tokens.nbytes > _SCAN_BYTES:
            return True
        for start in range(0, dataset.num_tokens, _SCAN_CHUNK):
            self._check_range(dataset, dataset.tokens[start : start + _SCAN_CHUNK])
        return False

    def _check_ids(self, source: int, tokens: np.ndarray) -> None:
        self._check_range(self._sources[source].dataset, tokens)

    def _check_range(self, dataset: IndexedDataset, tokens: np.ndarray) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if self._vocab_size is not None and (low < 0 or high >= self._vocab_size):
            raise UserError(
                f"{dataset.bin_path} holds token id {low if low < 0 else high}, but the model's vocabulary has ids "
                f"0..{self._vocab_size - 1}; raise --vocab-size or use the dataset's tokenizer"
            )


def _targets_of(lengths: npt.NDArray[np.int64]) -> int:
    """Labels that count in documents of these lengths with ``--eod-mask-loss``: all but each document's first token."""
    return int(np.maximum(lengths - 1, 0).sum())


class ValidationData:
    """A finite, fixed sequence of windows over one split; see :meth:`TrainingData.validation`.

    Each source is cut on its own, and the sources' windows alternate in proportion to their number, so that any
    first part of the view represents all of them. A source's last window is padded with id 0, which does not count.

    Args:
        parts: per source the token file and its documents' starts and lengths (int64 [documents], tokens).
    """

    def __init__(
        self,
        parts: Sequence[tuple[np.ndarray, npt.NDArray[np.int64], npt.NDArray[np.int64]]],
        sequence_length: int,
        eod_mask_loss: bool,
    ) -> None:
        self.eod_mask_loss = eod_mask_loss
        self.stage_starts = [0]
        self._length = sequence_length
        self._tokens = [tokens for tokens, _, _ in parts]
        self._orders: list[EpochOrder] = []
        windows = []
        for _, starts, lengths in parts:
            full = np.flatnonzero(lengths)
            table = np.zeros((2, len(full) + 1), np.int64)
            np.cumsum(lengths[full], out=table[0, 1:])
            table[1, :-1] = starts[full]
            self._orders.append(EpochOrder(table))
            windows.append(np.arange(-(-max(int(table[0, -1]) - 1, 0) // sequence_length)))
        order = np.argsort(np.concatenate([(w + 0.5) / max(len(w), 1) for w in windows]), kind="stable")
        self._source = np.repeat(np.arange(len(windows)), [len(w) for w in windows])[order]
        self._window = np.concatenate(windows)[order]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._window)

    @property
    def num_targets(self) -> int:
        """Labels that count, over all windows."""
        return sum(max(int(order.bounds[-1]) - 1, 0) for order in self._orders)

    def sequence_length(self, k: int) -> int:
        """S, the same for every window."""
        return self._length

    def sample(self, k: int) -> Sample:
        """Window ``k``."""
        if not 0 <= k < len(self):
            raise IndexError(f"window {k} of {len(self)}")
        tokens, marks = np.empty(self._length + 1, np.int64), np.zeros(self._length + 1, np.bool_)
        targets = self.fill(k, tokens, marks)
        source, cursor = int(self._source[k]), int(self._window[k]) * self._length
        return Sample(torch.from_numpy(tokens), torch.from_numpy(marks), targets, source, 0, cursor)

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        """As :meth:`TrainingData.fill`; past the end padding only, and 0, so that all ranks end together."""
        filled = 0
        if k < len(self):
            source = int(self._source[k])
            offset = int(self._window[k]) * self._length
            filled = self._orders[source].copy(self._tokens[source], offset, tokens, marks, 0)
        tokens[filled:] = 0
        marks[filled : filled + 1] = True
        return max(filled - 1, 0)
