"""The samples a run trains and validates on.

Sample k of a run is a pure function of (content of the sources, seed, schedule, k). It does not depend on how many
ranks or workers there are, how they batch, how long the run is, or where it was resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megaforge.config.config import Config
from megaforge.config.data_schedule import facts_from, joined
from megaforge.config.launcher import discover_launch
from megaforge.data.blend import parse_data_path, parse_split
from megaforge.data.cache import Cache
from megaforge.data.curriculum import Source, facts_of, plan_sources
from megaforge.data.data_source import SampleView, held_out
from megaforge.data.loader import Batch, GlobalBatchLoader
from megaforge.data.run_dataset import DataChecks, RunDataset, open_dataset
from megaforge.data.sample_order import RoundStream, TokenStream, documents_in_order, has_native_copy, key_of, shuffled
from megaforge.data.sample_schedule import Plan, SampleSchedule, ScheduledSource, make_state
from megaforge.data.sidecar import check_agreement, digest_of
from megaforge.data.split import PARTS
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError

__all__ = ["Batch", "DataChecks", "GlobalBatchLoader", "Sample", "SampleSchedule", "TrainingData", "ValidationData"]

_NO_OTHERS: Mapping[str, Sequence[str]] = {}
_WHOLE = {"valid": (0.0, 1.0, 0.0), "test": (0.0, 0.0, 1.0)}  # of a dataset that is of one part
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


class TrainingData(ScheduledSource):
    """The endless training samples of a blend of datasets.

    Args:
        sources: [(weight, prefix)], as :func:`megaforge.data.blend.parse_data_path` returns them; a weight of None is
            the source's training tokens.
        split: ``--split``: shares of each source's documents for train, valid and test.
        schedule: seed, sequence length and later changes.
        split_order: ``--split-order``: which documents these are; see :func:`megaforge.data.split.split_documents`.
        checks: what the sources must fit.
        held_out: the prefixes of datasets that are wholly for validation or test, by part.
        eod_mask_loss: batches give no loss to predicting the first token of the next document.

    Attributes:
        digest: SHA-256 of the content of all sources in order.
        notices: things to say once to the user, such as that a tokenizer could not be checked.

    Raises:
        UserError: a missing, damaged, foreign or empty dataset, an empty training split, another tokenizer, or ids
            beyond the vocabulary.
    """

    def __init__(
        self,
        sources: Sequence[tuple[float | None, str]],
        split: str,
        schedule: SampleSchedule,
        *,
        split_order: str = "shuffled",
        checks: DataChecks | None = None,
        eod_mask_loss: bool = False,
        held_out: Mapping[str, Sequence[str]] = _NO_OTHERS,
    ) -> None:
        self.eod_mask_loss = eod_mask_loss
        self.notices: list[str] = []
        if not has_native_copy():
            self.notices.append(
                "reading samples with NumPy: the extension megaforge.data._data_helpers was not built "
                "(pip install --no-build-isolation -e .); short documents are read several times slower"
            )
        self.split_text, self.split, self.split_order = split, parse_split(split), split_order
        weights = [1.0 if weight is None else weight for weight, _ in sources]
        self._sequence_length = schedule.sequence_length
        Plan(schedule, weights)  # a schedule that cannot be is an error before any file is opened
        checks = checks or DataChecks()
        self._sources: list[RunDataset] = []
        self._streams: list[TokenStream] = []
        self._lane_of: list[tuple[int, int]] = []
        shares: list[list[float]] = []
        digests: list[str] = []
        for _, prefix in sources:
            source = open_dataset(prefix, self.split, split_order, checks)
            if source.sidecar is None and checks.fingerprint is not None:
                self.notices.append(f"{prefix} has no .json beside it, so its tokenizer cannot be checked")
            digests.append(source.digest)
            # The content names the source, so that listing another beside it does not reshuffle it. The same files
            # listed twice are told apart by their count.
            key = [schedule.seed, digests[-1], Counter(digests)[digests[-1]]]
            tokens = int(source.extents("train")[1].sum())
            if tokens == 0:
                raise UserError(
                    f"--split {split} leaves no training tokens in {prefix}: {len(source.numbers('train'))} of its "
                    f"{source.dataset.num_documents} documents are for training; give the first number a larger share"
                )
            if sources[len(self._sources)][0] is None:
                weights[len(self._sources)] = float(tokens)
            lanes = self._lanes(source, key, schedule)
            shares.append([lane.num_tokens / tokens for lane in lanes])
            self._lane_of += [(len(self._sources), number) for number in range(len(lanes))]
            self._sources.append(source)
            self._streams += lanes
        self._others = self._open_others(held_out, checks)
        # Without the mask even a single token has a successor: the next epoch's.
        if eod_mask_loss and not any(_targets_of(source.extents("train")[1]) for source in self._sources):
            raise UserError(
                f"--data-path {' '.join(prefix for _, prefix in sources)}: there is nothing to predict in its training "
                f"part: {_NOTHING}"
            )
        self.plan = self._planned(schedule, sources, weights, shares)
        self.digest = digest_of(digests)
        self._sample_key = key_of("sample", schedule.seed, self.digest)

    def _planned(
        self,
        schedule: SampleSchedule,
        sources: Sequence[tuple[float | None, str]],
        weights: Sequence[float],
        shares: Sequence[Sequence[float]],
    ) -> Plan:
        """What is read when."""
        described = [self._described(prefix, schedule, place) for place, (_, prefix) in enumerate(sources)]
        self._names, self._domains = tuple(one.name for one in described), [one.facts.domain for one in described]
        weighted = len(sources) > 1 and any(weight is not None for weight, _ in sources)
        plan, notices = plan_sources(schedule, described, weights, shares, weighted=weighted)
        self.notices += notices
        return plan

    def _described(self, prefix: str, schedule: SampleSchedule, place: int) -> Source:
        """What a data schedule may go by."""
        source = self._sources[place]
        lengths = source.extents("train")[1]
        tokens = int(lengths.sum())
        recorded = facts_from(source.sidecar.corpus if source.sidecar else {})
        known = replace(recorded, length=tokens / max(int((lengths > 0).sum()), 1))
        return Source(prefix, tokens, joined(facts_of(schedule.curriculum, prefix), known))

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources' prefixes."""
        return self._names

    @property
    def source_streams(self) -> tuple[int, ...]:
        """How many token streams each source has."""
        return tuple(sum(own == source for own, _ in self._lane_of) for source in range(len(self._sources)))

    def domain(self, k: int) -> str | None:
        """What the data schedule or the dataset's description says of the text of sample ``k``."""
        return self._domains[self.locate(k)[0]]

    def _open_others(self, held_out: Mapping[str, Sequence[str]], checks: DataChecks) -> dict[str, list[RunDataset]]:
        """The datasets that are wholly of one part; all of the run's must agree."""
        others = open_parts(held_out, checks)
        opened = [*self._sources, *(source for some in others.values() for source in some)]
        check_agreement([source.sidecar for source in opened])
        return others

    def _lanes(self, source: RunDataset, key: list[object], schedule: SampleSchedule) -> list[TokenStream]:
        """The source's training documents dealt out, in a keyed order, to as many streams of about equal size as the
        schedule has lanes; or in one stream as text is streamed."""
        starts, lengths = source.extents("train")
        numbers, lanes = source.numbers("train"), schedule.lanes
        if schedule.round_size is not None:
            place: list[object] = [schedule.seed, len(self._sources)]
            return [RoundStream(source.dataset.tokens, starts, lengths, numbers, place, schedule.round_size)]
        full = np.flatnonzero(lengths)
        lanes = min(lanes, len(full))
        dealt = full if lanes == 1 else full[shuffled(key_of("lanes", *key), numbers[full])]
        streams = []
        for lane in range(lanes):
            own = np.sort(dealt[lane::lanes])
            lane_key = [*key, lanes, lane]
            streams.append(TokenStream(source.dataset.tokens, starts[own], lengths[own], numbers[own], lane_key))
        return streams

    @property
    def epoch_tokens(self) -> list[int]:
        """Training tokens of one epoch of each source."""
        return [int(source.extents("train")[1].sum()) for source in self._sources]

    def passes(self, samples: int) -> list[float]:
        """How often samples [0, samples) read each source: more than another one where its weight is above its size."""
        stage = self.plan.stage_at(max(samples - 1, 0))
        read = [0] * len(self._sources)
        for (source, _), cursor in zip(self._lane_of, stage.cursors_after(samples - stage.start), strict=True):
            read[source] += cursor
        return [tokens / whole for tokens, whole in zip(read, self.epoch_tokens, strict=True)]

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
        """Writes sample ``k`` and its document starts, [S + n] each; all labels count."""
        self._read(k, tokens, marks)
        return len(tokens) - 1

    def _read(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> None:
        stream, cursor = self._stream_at(k)
        self._streams[stream].copy(cursor, tokens, marks)
        source = self._sources[self._lane_of[stream][0]]
        if source.reads_below is not None:
            source.check_read(tokens)

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """The JSON-like state to save when samples [0, consumed_samples) have been trained on."""
        sources = [
            {
                "digest": source.digest,
                "choices": source.sidecar.choices() if source.sidecar else None,
                **({"corpus": source.sidecar.corpus} if source.sidecar and source.sidecar.corpus else {}),
            }
            for source in self._sources
        ]
        return make_state(self.plan, self.digest, (self.split, self.split_order), consumed_samples) | {
            "sources": sources
        }

    def bytes_per_token(self, split: str = "valid") -> float | None:
        """UTF-8 bytes a token of the split stands for, from the sidecars' totals; None if a dataset has no record."""
        tokens = text = 0.0
        for source in self._of(split):
            count = int(source.extents(split)[1].sum())
            ratio = source.sidecar.bytes_per_token if source.sidecar else None
            if ratio is None and count:
                return None
            tokens, text = tokens + count, text + count * (ratio or 0.0)
        return text / tokens if tokens else None

    def validation(self, split: str = "valid", sequence_length: int | None = None) -> ValidationData:
        """The split's documents, every token predicted once, cut into windows.

        Raises:
            UserError: no label in the split counts.
        """
        length = self._sequence_length if sequence_length is None else sequence_length
        sources = self._of(split)
        lengths = [source.extents(split)[1] for source in sources]
        if all(int(one.sum()) < 2 for one in lengths):
            raise UserError(
                f"--split {self.split_text} leaves no documents to evaluate in its '{split}' part: give the "
                f"{('first', 'second', 'third')[PARTS.index(split)]} number a larger share, use more "
                f"documents, or name datasets of their own by --{split}-data-path"
            )
        if self.eod_mask_loss and not any(map(_targets_of, lengths)):
            raise UserError(f"--split {self.split_text}: there is nothing to predict in its '{split}' part: {_NOTHING}")
        return ValidationData(sources, split, length, self.eod_mask_loss)

    def _of(self, part: str) -> Sequence[RunDataset]:
        """The datasets that hold the documents of a part."""
        return self._others.get(part, self._sources)


def open_parts(held_out: Mapping[str, Sequence[str]], checks: DataChecks) -> dict[str, list[RunDataset]]:
    """The datasets that are wholly of one part, by part.

    Raises:
        UserError: as :func:`megaforge.data.run_dataset.open_dataset`.
    """
    return {
        part: [open_dataset(prefix, _WHOLE[part], "sequential", checks) for prefix in prefixes]
        for part, prefixes in held_out.items()
        if prefixes
    }


def _targets_of(lengths: npt.NDArray[np.int64]) -> int:
    """Labels that count in documents of these lengths with ``--eod-mask-loss``: all but each document's first token."""
    return int(np.maximum(lengths - 1, 0).sum())


class ValidationData(SampleView):
    """A finite, fixed sequence of windows over one split; see :meth:`TrainingData.validation`.

    Each source is cut on its own, and the sources' windows alternate in proportion to their number, so that any
    first part of the view represents all of them. A source's last window is padded with id 0, which does not count.

    Args:
        sources: of which the documents of ``part`` are read.
    """

    def __init__(self, sources: Sequence[RunDataset], part: str, sequence_length: int, eod_mask_loss: bool) -> None:
        self.eod_mask_loss = eod_mask_loss
        self._length = sequence_length
        self._sources = sources
        self._orders = [documents_in_order(*source.extents(part)) for source in sources]
        windows = [np.arange(-(-max(int(order.bounds[-1]) - 1, 0) // sequence_length)) for order in self._orders]
        order = np.argsort(np.concatenate([(w + 0.5) / max(len(w), 1) for w in windows]), kind="stable")
        self._source = np.repeat(np.arange(len(windows)), [len(w) for w in windows])[order]
        self._window = np.concatenate(windows)[order]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._window)

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
            filled = self._orders[source].copy(self._sources[source].dataset.tokens, offset, tokens, marks, 0)
            self._sources[source].check_read(tokens[:filled])
        tokens[filled:] = 0
        marks[filled : filled + 1] = True
        return max(filled - 1, 0)


def open_files(config: Config, tokenizer: Tokenizer | None) -> TrainingData:
    """The datasets of ``--data-path``.

    Raises:
        UserError: as :class:`TrainingData`.
    """
    return TrainingData(
        parse_data_path(config.data.data_path),
        config.data.split,
        SampleSchedule.of(config),
        split_order=config.data.split_order,
        checks=DataChecks(
            config.model.vocab_size,
            None if tokenizer is None else tokenizer.fingerprint,
            None if tokenizer is None else tokenizer.eod,
            # Once a machine: hashing a corpus takes a while, and the ranks of one see the same files.
            verify=config.data.verify_data and discover_launch().local_rank == 0,
            cache=Cache.of(config.data),
        ),
        eod_mask_loss=config.data.eod_mask_loss,
        held_out=held_out(config.data),
    )
