"""``--data-path stream:NAME_OR_GLOB``: text that is tokenised as it is read, in an order that any layout has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.data.blend import parse_data_path
from megaforge.data.cache import Cache
from megaforge.data.curriculum import Source, facts_of, plan_sources
from megaforge.data.data_source import SampleView, held_out
from megaforge.data.fast_bpe import proven_encoder
from megaforge.data.preprocess.shard import SlowEncoder
from megaforge.data.run_dataset import DataChecks, RunDataset
from megaforge.data.sample_schedule import SampleSchedule, ScheduledSource, make_state
from megaforge.data.samples import ValidationData, open_parts
from megaforge.data.sidecar import digest_of
from megaforge.data.stream.documents import Documents, Mark
from megaforge.data.stream.fetch import fetch, is_remote
from megaforge.data.stream.files import StreamFile, changed_file, check_local, stream_files
from megaforge.data.stream.tokens import StreamTokens
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError


@dataclass(frozen=True)
class StreamSpec:
    """One stream: what ``--data-path`` says (``stream:...``), its weight, and its files."""

    name: str
    weight: float | None
    files: Sequence[StreamFile]


@dataclass(frozen=True)
class StreamSettings:
    """How streams are read: where JSON has its text, whether bad records are left out, and the copies of remote files
    (None: there is no place for any)."""

    key: str = "text"
    skip_bad: bool = False
    cache: Cache | None = None


class StreamData(ScheduledSource):
    """Endless samples of text files: sample k is a pure function of (files, seed, schedule, k).

    Every rank reads and tokenises all of the text, and takes its samples; what a checkpoint keeps of where it was lets
    a run go on at any layout without reading what came before.

    Args:
        streams: of which samples are drawn by weight.
        schedule: seed, sequence length and later changes.
        encode: ids of texts, one integer array a text.
        eod: the id that ends each document; None: none does.
        settings: how files are read.
        parts: datasets for evaluations, by part.
    """

    def __init__(
        self,
        streams: Sequence[StreamSpec],
        schedule: SampleSchedule,
        encode: Callable[[Sequence[str]], list[np.ndarray]],
        eod: int | None,
        settings: StreamSettings,
        *,
        eod_mask_loss: bool = False,
        parts: dict[str, list[RunDataset]] | None = None,
    ) -> None:
        self.eod_mask_loss = eod_mask_loss
        self._streams, self._held_out, self._settings = streams, parts or {}, settings
        self._round = schedule.round_size or 1024
        self._sequence_length = schedule.sequence_length
        sources = [Source(one.name, 1, facts_of(schedule.curriculum, one.name)) for one in streams]
        self._domains = [source.facts.domain for source in sources]
        weights = [1.0 if one.weight is None else one.weight for one in streams]
        weighted = len(streams) > 1 and any(one.weight is not None for one in streams)
        unbounded = list[str]()
        if schedule.curriculum is not None:
            if schedule.curriculum.max_epochs or any(one.facts.max_epochs for one in sources):
                unbounded = [
                    "--data-schedule: max_epochs is not heeded, as nobody knows how many tokens a stream has before it "
                    "is read; a stream that is at its end begins again"
                ]
            sources = [replace(one, facts=replace(one.facts, max_epochs=None)) for one in sources]
            schedule = replace(schedule, curriculum=replace(schedule.curriculum, max_epochs=None))
        self.plan, notices = plan_sources(schedule, sources, weights, [[1.0]] * len(streams), weighted=weighted)
        self.notices = [_told(one) for one in streams] + unbounded + notices
        self.digest = digest_of([[file.identity for file in one.files] for one in streams])
        self._tokens = [
            StreamTokens(self._documents(one), encode, eod, [schedule.seed, number])
            for number, one in enumerate(streams)
        ]

    def _documents(self, stream: StreamSpec) -> Documents:
        cache = self._settings.cache

        def local(number: int, name: str) -> str:
            if not is_remote(name):
                return name
            assert cache is not None
            copy = f"{stream.files[number].identity}-{name.rstrip('/').rpartition('/')[2]}"
            path = str(cache.made(copy, partial(fetch, name)))
            check_local(path, stream.name, self._settings.key)
            return path

        names = [file.name for file in stream.files]
        return Documents(names, self._settings.key, self._round, self._settings.skip_bad, local)

    def locate(self, k: int) -> tuple[int, int]:
        """(stream, token cursor) of sample ``k``: its identity."""
        stage = self.plan.stage_at(k)
        stream, ordinal = stage.blend.locate(k - stage.start)
        return stream, stage.cursors[stream] + ordinal * stage.sequence_length

    def domain(self, k: int) -> str | None:
        """What the data schedule says of the text of sample ``k``."""
        return self._domains[self.locate(k)[0]]

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        """Writes sample ``k`` and its document starts, [S + n] each; all labels count.

        Raises:
            UserError: a file is bad or gone.
        """
        stream, cursor = self.locate(k)
        self._tokens[stream].copy(cursor, tokens, marks)
        return len(tokens) - 1

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """What the order depended on, the files, and the last mark of each stream that is known not to lie behind the
        next sample."""
        state = make_state(self.plan, self.digest, ((1.0, 0.0, 0.0), "sequential"), consumed_samples)
        stage = self.plan.stage_at(max(consumed_samples - 1, 0))
        cursors = stage.cursors_after(consumed_samples - stage.start)
        known = [tokens.mark_before(cursor) for tokens, cursor in zip(self._tokens, cursors, strict=True)]
        return state | {
            "files": [[[file.name, file.identity] for file in one.files] for one in self._streams],
            "marks": [mark.to_json() for mark in known],
        }

    def check_state(self, saved: dict[str, Any]) -> None:
        """As any schedule does; and goes on from the marks of then.

        Raises:
            UserError: names the file that has changed, or the setting.
        """
        for stream, before in zip(self._streams, saved.get("files", ()), strict=False):
            if (difference := changed_file(before, stream.files)) is not None:
                raise UserError(
                    f"--data-path {stream.name}: {difference} since the checkpoint was written, so this run would read "
                    "other samples: restore it, add --reset-data to go on with these files from their beginning, or "
                    "start a new run without --load"
                )
        super().check_state(saved)
        for tokens, mark in zip(self._tokens, saved.get("marks", ()), strict=False):
            tokens.go_on_from(Mark.from_json(mark))

    def bytes_per_token(self, split: str = "valid") -> float | None:
        """UTF-8 bytes a token of the evaluations' datasets stands for, where all of them say it."""
        known = [one.sidecar.bytes_per_token if one.sidecar else None for one in self._held_out.get(split, ())]
        sizes = [one.dataset.num_tokens for one in self._held_out.get(split, ())]
        if not known or None in known:
            return None
        return sum((ratio or 0.0) * size for ratio, size in zip(known, sizes, strict=True)) / sum(sizes)

    def validation(self, split: str = "valid") -> SampleView:
        """The datasets of ``--valid-data-path`` or ``--test-data-path``.

        Raises:
            UserError: there are none: a stream holds nothing out.
        """
        if not self._held_out.get(split):
            raise UserError(
                f"--eval-iters: a stream holds no '{split}' documents out; name datasets for them: --train-data-path "
                f"{self._streams[0].name} --{split}-data-path PREFIX"
            )
        return ValidationData(self._held_out[split], split, self._sequence_length, self.eod_mask_loss)


def _told(stream: StreamSpec) -> str:
    count = len(stream.files)
    return f"{stream.name}: {count:,} file{'s' * (count != 1)}, tokenised as they are read"


def encoder_of(tokenizer: Tokenizer) -> tuple[Callable[[Sequence[str]], list[np.ndarray]], list[str]]:
    """Ids of texts for any number of threads, as fast as is proven equal; and what to say of it."""
    fast, difference = proven_encoder(tokenizer)
    encoder, lock = fast or SlowEncoder(tokenizer), threading.Lock()

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        with lock:
            return encoder.encode(texts)

    notes = [] if difference is None else [f"the fast path (gigatoken) is off: {difference}; using tokenizers instead"]
    return encode, notes


def open_stream(config: Config, tokenizer: Tokenizer | None) -> StreamData:
    """The streams of ``--data-path``.

    Raises:
        UserError: no files, a file that is not text, or no tokenizer.
    """
    data = config.data
    assert tokenizer is not None  # checked before
    specs = [StreamSpec(name, weight, stream_files(name)) for weight, name in parse_data_path(data.data_path)]
    encode, notes = encoder_of(tokenizer)
    cache = Cache.of(data)
    settings = StreamSettings(data.json_key, data.stream_on_error == "skip", cache)
    checks = DataChecks(config.model.vocab_size, tokenizer.fingerprint, tokenizer.eod, cache=cache)
    found = StreamData(
        specs,
        SampleSchedule.of(config),
        encode,
        tokenizer.eod,
        settings,
        eod_mask_loss=data.eod_mask_loss,
        parts=open_parts(held_out(data), checks),
    )
    found.notices = [*found.notices, *notes]
    return found
