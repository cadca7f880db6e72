"""Runs of words: how often they repeat in a text, and a text's signature of them.

A signature is made by one permutation (Li, Owen and Zhang 2012, "One Permutation Hashing"): every hash of a run of
words belongs to one bin, each bin keeps its smallest. Bins that stay empty take the value of another, chosen by hashing
(Shrivastava 2017, "Optimal Densification for Fast and Accurate Minwise Hashing").
"""

from __future__ import annotations

import numpy as np

from megaforge.data.corpus.native import corpus_text
from megaforge.data.corpus.words import Words, mix

BINS = 128
_BIN_BITS = 7
_VALUE = np.uint64((1 << 64 - _BIN_BITS) - 1)  # the bits of a hash that do not say its bin
_NOTHING = np.uint64((1 << 64) - 1)


def count_runs(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the runs of ``n`` words of each row: how many were there before in the row, and how often the commonest is
    there, 0 of one that is there once [rows] int64 each."""
    native = corpus_text()
    if native is not None:
        again, most = native.count_runs(words.hash, words.first, n)
        return again, most
    rows = len(words.counts)
    moved, both = _packed(*words.ngrams(n), rows)
    both.sort()
    row = (both >> moved).astype(np.int64)
    begins = np.flatnonzero(np.concatenate([[True], both[1:] != both[:-1]])) if len(both) else np.zeros(0, np.int64)
    times = np.diff(np.append(begins, len(both)))
    most = np.zeros(rows, np.int64)
    np.maximum.at(most, row[begins], np.where(times > 1, times, 0))
    return np.bincount(row, minlength=rows) - np.bincount(row[begins], minlength=rows), most


def repeated(key: np.ndarray, first: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of each row r with the keys ``key[first[r]:first[r + 1]]`` the weights of those that were there before in the row
    [rows] int64; equal keys have equal weights."""
    native = corpus_text()
    if native is not None:
        sums: np.ndarray = native.repeated(key, first, weight)
        return sums
    rows = len(first) - 1
    row = np.repeat(np.arange(rows), np.diff(first))
    _, both = _packed(row, key, rows)
    order = np.argsort(both)
    again = np.zeros(len(order), bool)
    again[1:] = both[order][1:] == both[order][:-1]
    return np.bincount(row[order][again], weight[order][again], rows).astype(np.int64)


def _packed(row: np.ndarray, key: np.ndarray, rows: int) -> tuple[np.uint64, np.ndarray]:
    """By how many bits rows are moved, and numbers that hold the row and, behind it, the first bits of the key."""
    bits = max(rows - 1, 1).bit_length()
    return np.uint64(64 - bits), row.astype(np.uint64) << np.uint64(64 - bits) | key >> np.uint64(bits)


def signatures(words: Words, n: int) -> np.ndarray:
    """The signatures of the rows that have words [rows of them, BINS] uint64. A row of fewer words than ``n`` has one
    run, all of its words."""
    native = corpus_text()
    if native is not None:
        bins: np.ndarray = native.signatures(words.hash, words.first, n)
        return bins
    owner, grams = words.ngrams(n)
    short = np.flatnonzero((words.counts > 0) & (words.counts < n))
    if len(short):
        whole = np.array([_whole(words.hash[words.first[row] : words.first[row + 1]]) for row in short], np.uint64)
        owner, grams = np.concatenate([owner, short]), np.concatenate([grams, whole])
    full = words.counts > 0
    number = np.cumsum(full) - 1
    result = np.full((int(full.sum()), BINS), _NOTHING, np.uint64)
    place = number[owner] * BINS + (grams >> np.uint64(64 - _BIN_BITS)).astype(np.int64)
    np.minimum.at(result.reshape(-1), place, grams & _VALUE)
    return _densified(result)


def _whole(hashes: np.ndarray) -> np.uint64:
    gram = np.zeros(1, np.uint64)
    for one in hashes:
        gram = mix(gram * np.uint64(31) + one)
    return gram[0]


def _densified(values: np.ndarray) -> np.ndarray:
    """Empty bins take the value of one that is not: the first such of a sequence that is a hash of the empty bin."""
    filled = values != _NOTHING
    row, empty = np.nonzero(~filled)
    attempt = 0
    while len(row):
        attempt += 1
        candidates = mix(np.arange(BINS, dtype=np.uint64) + np.uint64(attempt * BINS)) % np.uint64(BINS)
        candidate = candidates.astype(np.int64)[empty]
        found = filled[row, candidate]
        values[row[found], empty[found]] = values[row[found], candidate[found]]
        row, empty = row[~found], empty[~found]
    return values
