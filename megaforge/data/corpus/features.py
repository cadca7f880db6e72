"""What can be counted in a text: what the stages ``heuristics`` and ``quality`` judge documents by.

The measures are those of Gopher's rules (Rae et al. 2021, arXiv:2112.11446, appendix A1) and of FineWeb's (Penedo et
al. 2024, arXiv:2406.17557), counted over a whole batch at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.data.corpus.columns import flat_bytes, one_array
from megaforge.data.corpus.records import CODE
from megaforge.data.corpus.stop_words import stop_word_masks
from megaforge.data.corpus.words import Words, hash_spans, plain_words

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


def features_of(records: Any) -> Features:
    """The features of each record."""
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
        repeated_lines=_repeated(data, *lines_of(data, offsets)),
        repeated_paragraphs=_repeated(data, *lines_of(data, offsets, feeds=2)),
        top_pair=2 * _largest(*words.ngrams(2), len(count)) / some,
        repeated_runs=_again(*words.ngrams(_RUN), len(count)),
        vocabulary=(1 - _again(words.row, words.hash, len(count))) * np.sqrt(count),
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


def lines_of(data: np.ndarray, offsets: np.ndarray, feeds: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The rows, starts and ends of all lines that are not empty, and the number of rows. With two ``feeds`` it is
    paragraphs: what blank lines separate."""
    feed = data == ord("\n")
    if feeds == 2:
        feed[1:] &= feed[:-1].copy()
        feed[:1] = False
    cut = np.flatnonzero(feed)
    starts = np.concatenate([offsets[:-1], cut + 1])
    ends = np.concatenate([offsets[1:], cut + 1 - feeds])
    starts, ends = np.sort(starts), np.sort(ends)
    ends = np.maximum(starts, ends)
    row = np.searchsorted(offsets, starts, side="right") - 1
    full = ends > starts
    return row[full], starts[full], ends[full], len(offsets) - 1


def _repeated(data: np.ndarray, row: np.ndarray, starts: np.ndarray, ends: np.ndarray, rows: int) -> np.ndarray:
    _, key = _packed(row, hash_spans(data, starts, ends), rows)
    order = np.argsort(key)
    again = np.zeros(len(order), bool)
    again[1:] = key[order][1:] == key[order][:-1]
    size = (ends - starts)[order]
    return np.bincount(row[order][again], size[again], rows) / np.maximum(np.bincount(row, ends - starts, rows), 1)


def _packed(row: np.ndarray, key: np.ndarray, rows: int) -> tuple[np.uint64, np.ndarray]:
    """By how many bits rows are moved, and numbers that hold the row and, behind it, the first bits of the key."""
    bits = max(rows - 1, 1).bit_length()
    return np.uint64(64 - bits), row.astype(np.uint64) << np.uint64(64 - bits) | key >> np.uint64(bits)


def _sorted(row: np.ndarray, key: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows, and numbers that hold the row and the first bits of the key, in order of these."""
    moved, both = _packed(row, key, rows)
    both.sort()
    return (both >> moved).astype(np.int64), both


def _again(row: np.ndarray, key: np.ndarray, rows: int) -> np.ndarray:
    """The share of each row's keys that are there for a second or later time."""
    row, both = _sorted(row, key, rows)
    return np.bincount(row[1:][both[1:] == both[:-1]], minlength=rows) / np.maximum(np.bincount(row, minlength=rows), 1)


def _largest(row: np.ndarray, key: np.ndarray, rows: int) -> np.ndarray:
    """How often the commonest key of each row is there, 0 of one that is there once."""
    row, both = _sorted(row, key, rows)
    begins = np.flatnonzero(np.concatenate([[True], both[1:] != both[:-1]])) if len(both) else np.zeros(0, np.int64)
    runs = np.diff(np.append(begins, len(both)))
    most = np.zeros(rows, np.int64)
    np.maximum.at(most, row[begins], np.where(runs > 1, runs, 0))
    return most


def _stop_words(words: Words, language: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
    listed, masks, bits = stop_word_masks()
    every = sum(bits.values())
    wanted = np.array([every if one is None else bits.get(one, 0) for one in language], np.uint64)
    found, member = listed.find(words.hash)
    row = words.row[found]
    hit = (masks[member] & wanted[row]) != 0
    return np.bincount(row[hit], minlength=len(language)), wanted != 0
