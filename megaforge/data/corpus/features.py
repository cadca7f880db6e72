"""What can be counted in a text: what the stages ``heuristics`` and ``quality`` judge documents by.

The measures are those of Gopher's rules (Rae et al. 2021, arXiv:2112.11446, appendix A1) and of FineWeb's (Penedo et
al. 2024, arXiv:2406.17557), counted over a whole batch at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.data.corpus.columns import flat_bytes, one_array
from megaforge.data.corpus.records import CODE
from megaforge.data.corpus.runs import count_runs, repeated
from megaforge.data.corpus.stop_words import stop_word_masks
from megaforge.data.corpus.words import Words, hash_spans, lines_of, plain_words

# Written without spaces between words.
NO_SPACES = frozenset("zh ja th lo km my bo dz yue wuu".split())
_RUN = 5  # words


def _lookup(characters: bytes) -> np.ndarray:
    table = np.zeros(256, bool)
    table[list(characters)] = True
    return table


_DIGITS = _lookup(b"0123456789")
_CAPITALS = _lookup(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LETTERS = _lookup(bytes(range(ord("a"), ord("z") + 1)) + bytes(range(ord("A"), ord("Z") + 1)))
_SPACE = _lookup(b" \t\n\r\f\v")
_PUNCTUATION = _lookup(b".,;:!?'\"()-")
_SYMBOLS = np.zeros(256, bool)
_SYMBOLS[33:127] = True
_SYMBOLS &= ~(_LETTERS | _DIGITS | _PUNCTUATION)
_CONTINUES = np.zeros(256, bool)
_CONTINUES[0x80:0xC0] = True
_FULL_STOPS = _lookup(b".!?")


@dataclass(frozen=True)
class Features:
    """Numbers of each row of a batch, [rows] float64 where nothing else is said.

    Attributes:
        words: int64.
        word_length: characters of a word, in the mean.
        symbols, digits: shares of the characters that are not spaces.
        capitals: share of ASCII's letters.
        punctuation: share of the characters that are not spaces.
        sentences: sentence ends to a word.
        stop_words: share of the words; of the record's language, and of any where that is not known.
        repeated_lines, repeated_paragraphs: share of the bytes of lines (paragraphs) that occurred before in the row.
        top_pair: share of the words that are in the commonest pair of words.
        repeated_runs: share of the runs of five words that occurred before in the row.
        vocabulary: different words by the square root of all.
        prose: whether the text is told by its words: not code, and in a script with spaces [rows] bool.
        has_stop_words: whether stop words of its language are known [rows] bool.
    """

    words: np.ndarray
    word_length: np.ndarray
    symbols: np.ndarray
    digits: np.ndarray
    capitals: np.ndarray
    punctuation: np.ndarray
    sentences: np.ndarray
    stop_words: np.ndarray
    repeated_lines: np.ndarray
    repeated_paragraphs: np.ndarray
    top_pair: np.ndarray
    repeated_runs: np.ndarray
    vocabulary: np.ndarray
    prose: np.ndarray
    has_stop_words: np.ndarray


_GIVEN = ("text", "language", "kind")  # what features are a function of
_last: tuple[Any, Features] | None = None


def features_of(records: Any) -> Features:
    """The features of each record. Those of the batch before are kept: a stage that asks after another for some of its
    records, unchanged, gets theirs."""
    global _last
    if _last is not None:
        known, found = _last
        rows = _rows_of(known, records)
        if rows is not None:
            return Features(**{field.name: getattr(found, field.name)[rows] for field in fields(Features)})
    found = _counted(records)
    _last = records.select(["id", *_GIVEN]), found
    return found


def _rows_of(known: Any, records: Any) -> np.ndarray | None:
    """Where the records stand in ``known``; None: not all do, or some were changed."""
    ids, wanted = known["id"].to_numpy(), records["id"].to_numpy()
    if not len(ids):
        return None
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    if not (ids[rows] == wanted).all():
        return None
    return rows if known.select(_GIVEN).take(rows).equals(records.select(_GIVEN)) else None


def _counted(records: Any) -> Features:
    text = one_array(records["text"])
    data, offsets = flat_bytes(text)
    histograms = _histograms(data, offsets)
    words = plain_words(text)
    count = words.counts
    some = np.maximum(count, 1)
    characters = np.maximum(histograms @ (~(_SPACE | _CONTINUES)), 1)
    letters = np.maximum(histograms @ _LETTERS, 1)
    ends = histograms @ _FULL_STOPS + _other_full_stops(text, histograms)
    word_length = (characters - histograms @ (_SYMBOLS | _PUNCTUATION)) / some
    language, code = records["language"].to_pylist(), pc.equal(records["kind"], CODE).to_numpy().astype(bool)
    foreign = histograms @ _CONTINUES > characters / 2
    spaced = np.array([one not in NO_SPACES for one in language], bool)
    unknown = np.array([one is None for one in language], bool)
    prose = spaced & ~(unknown & foreign & (word_length > 12)) & ~code
    stop_words, known = _stop_words(words, language)
    return Features(
        words=count,
        word_length=word_length,
        symbols=histograms @ _SYMBOLS / characters,
        digits=histograms @ _DIGITS / characters,
        capitals=histograms @ _CAPITALS / letters,
        punctuation=histograms @ _PUNCTUATION / characters,
        sentences=ends / some,
        stop_words=stop_words / some,
        repeated_lines=_repeated(data, offsets, feeds=1),
        repeated_paragraphs=_repeated(data, offsets, feeds=2),
        top_pair=2 * count_runs(words, 2)[1] / some,
        repeated_runs=count_runs(words, _RUN)[0] / np.maximum(count - _RUN + 1, 1),
        vocabulary=(1 - count_runs(words, 1)[0] / some) * np.sqrt(count),
        prose=prose,
        has_stop_words=known & prose,
    )


def _histograms(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """How often each byte is in each row [rows, 256] int64."""
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    rows = [np.bincount(data[start:end], minlength=256) for start, end in spans]
    return np.stack(rows) if rows else np.zeros((0, 256), np.int64)


def _other_full_stops(text: Any, histograms: np.ndarray) -> np.ndarray:
    """Full stops of scripts of Asia [rows] int64, which begin with one of these bytes."""
    rows = np.asarray(histograms[:, [0xE0, 0xE3, 0xEF]].any(1))
    stops = np.zeros(len(rows), np.int64)
    if rows.any():
        stops[rows] = pc.count_substring_regex(text.filter(pa.array(rows)), "[。！？।]").to_numpy(zero_copy_only=False)
    return stops


def _repeated(data: np.ndarray, offsets: np.ndarray, feeds: int) -> np.ndarray:
    first, starts, ends = lines_of(data, offsets, feeds)
    size = ends - starts
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(first))
    every = np.bincount(row, size, len(offsets) - 1)
    return repeated(hash_spans(data, starts, ends), first, size) / np.maximum(every, 1)


def _stop_words(words: Words, language: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
    listed, masks, bits = stop_word_masks()
    every = sum(bits.values())
    wanted = np.array([every if one is None else bits.get(one, 0) for one in language], np.uint64)
    found, member = listed.find(words.hash)
    row = words.row[found]
    hit = (masks[member] & wanted[row]) != 0
    return np.bincount(row[hit], minlength=len(language)), wanted != 0
