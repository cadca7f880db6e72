"""The endless token stream of text files: documents in file order, shuffled within rounds, tokenised as they are read.

A round is a fixed number of documents, so that a run reads forward only and holds few of them; the same documents as a
dataset are read in the same order with ``--data-order streamed``. A mark (where a round begins, in tokens and in the
files) lets a resumed run go on without what came before.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megaforge.data.sample_order import EpochOrder, round_order
from megaforge.data.stream.documents import Mark
from megaforge.errors import UserError

_HELD = 4  # rounds in memory: the one that is read, those that threads read ahead, and the next


class Rounds(Protocol):
    """Where rounds come from: :class:`megaforge.data.stream.documents.Documents`."""

    def round_at(self, mark: Mark) -> tuple[list[str], Mark]:
        """The documents of the round at ``mark``, and the mark of the next without its cursor."""
        raise NotImplementedError


@dataclass(frozen=True)
class Round:
    """The tokens of a round, and where the next one begins."""

    tokens: npt.NDArray[np.integer]
    order: EpochOrder
    following: Mark


class StreamTokens:
    """One stream; for any number of threads.

    Args:
        rounds: the documents.
        encode: ids of texts, one integer array a text.
        eod: the id that ends each document that has tokens; None: none does.
        key: JSON-like identity of the seed.
        read_ahead: the next round is made while one is read.
    """

    def __init__(
        self,
        rounds: Rounds,
        encode: Callable[[Sequence[str]], list[np.ndarray]],
        eod: int | None,
        key: list[object],
        read_ahead: bool = True,
    ) -> None:
        self._rounds, self._encode, self._eod, self._key = rounds, encode, eod, key
        self._marks = [Mark()]  # ascending; between two of them may lie rounds that nobody has read yet
        self._held: OrderedDict[Mark, Round] = OrderedDict()
        self._index, self._making = threading.Lock(), threading.Lock()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="megaforge-stream") if read_ahead else None

    def copy(self, cursor: int, out: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> None:
        """Fills ``out`` int64 [length] with the tokens from ``cursor`` on; sets ``marks`` at document starts.

        Raises:
            UserError: a file is bad, or the files hold no tokens.
            OSError: a file cannot be read now.
        """
        filled = 0
        while filled < len(out):
            mark, found = self._round_with(cursor + filled)
            filled = found.order.copy(found.tokens, cursor + filled - mark.cursor, out, marks, filled)

    def mark_before(self, cursor: int) -> Mark:
        """The last mark that is known and not behind ``cursor``."""
        with self._index:
            return self._marks[bisect_right(self._marks, cursor, key=lambda mark: mark.cursor) - 1]

    def go_on_from(self, mark: Mark) -> None:
        """Makes a mark of an earlier run of the same files known."""
        with self._index:
            self._insert(mark)

    def _insert(self, mark: Mark) -> None:
        place = bisect_right(self._marks, mark)
        if self._marks[place - 1] != mark:
            self._marks.insert(place, mark)

    def _round_with(self, cursor: int) -> tuple[Mark, Round]:
        """The round that token ``cursor`` lies in; reads on until it is there."""
        while True:
            mark = self.mark_before(cursor)
            found = self._held.get(mark) or self._made(mark)
            if cursor < found.following.cursor:
                if self._ahead is not None and found.following not in self._held:
                    self._ahead.submit(self._try, found.following)
                return mark, found

    def _try(self, mark: Mark) -> None:
        """Makes a round before it is asked for; whoever asks hears of what fails."""
        try:
            _ = self._made(mark)
        except (UserError, OSError):
            return

    def _made(self, mark: Mark) -> Round:
        with self._making:
            found = self._held.get(mark)
            if found is None:
                found = self._make(mark)
                with self._index:
                    self._insert(found.following)
                self._held[mark] = found
                while len(self._held) > _HELD:
                    self._held.popitem(last=False)
        return found

    def _make(self, mark: Mark) -> Round:
        texts, following = self._rounds.round_at(mark)
        order = round_order([*self._key, mark.epoch, mark.round], len(texts))
        arrays = self._encode([texts[place] for place in order.tolist()])
        if self._eod is not None:
            end = np.array([self._eod])
            arrays = [np.concatenate((array, end)) if len(array) else array for array in arrays]
        arrays = [array for array in arrays if len(array)]
        table = np.zeros((2, len(arrays) + 1), np.int64)
        np.cumsum([len(array) for array in arrays], out=table[0, 1:])
        table[1] = table[0]
        tokens = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        cursor = mark.cursor + len(tokens)
        if following.epoch > mark.epoch and cursor == 0:
            raise UserError("--data-path stream: its documents hold no tokens")
        return Round(np.ascontiguousarray(tokens, np.int64), EpochOrder(table), replace(following, cursor=cursor))
