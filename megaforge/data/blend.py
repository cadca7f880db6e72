"""Which source each sample comes from: ``--data-path`` and ``--split`` parsing, and the weighted mix.

The mix is a merge of one arithmetic progression a source: its i-th sample (from 0) is due at time (i + 1/2) / weight,
and samples follow in the order of those times, ties by the source's place. That is Webster's (Sainte-Laguë's) method
of apportionment: any prefix of the mix holds each source in proportion to its weight to within about one sample a
source, and the prefix never depends on what follows. The times being explicit, the mix can be entered at any sample.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from megaforge.data.indexed_dataset import bin_path, idx_path
from megaforge.errors import UserError

_BLOCK = 4096
_BLOCKS_HELD = 4


def parse_data_path(values: Sequence[str]) -> list[tuple[float | None, str]]:
    """``--data-path P``, ``--data-path w1 P1 w2 P2 ...`` or ``--data-path P1 P2 ...`` as [(weight, prefix)]; without
    weights (None), each source counts by its size.

    A prefix may hold spaces or be a number: a single word that names a dataset is that dataset, and only then may one
    word hold a whole blend.

    Raises:
        UserError: no prefix, an odd number of words, or a weight that is not a number above zero.
    """
    if len(values) == 1:
        prefix, words = dataset_prefix(values[0]), values[0].split()
        blend = len(words) > 1 and len(words) % 2 == 0 and all(_weight(word) is not None for word in words[::2])
        if dataset_exists(prefix) or not blend:
            return [(1.0, _checked_prefix(prefix))]
    else:
        words = list(values)
    shown = " ".join(words)
    if dataset_exists(dataset_prefix(shown)) and not any(dataset_exists(dataset_prefix(word)) for word in words):
        raise UserError(f"--data-path {shown}: that is one dataset; put its name in quotes: --data-path '{shown}'")
    if len(words) > 1 and not any(_weight(word) is not None for word in words):
        return [(None, dataset_prefix(word)) for word in words]
    if not words or len(words) % 2:
        raise UserError(
            f"--data-path '{shown}': give one dataset prefix, or pairs 'weight prefix weight prefix ...' "
            "such as '0.7 corpus/web 0.3 corpus/code'"
        )
    if all(dataset_exists(dataset_prefix(word)) for word in words):
        raise UserError(
            f"--data-path '{shown}': {' and '.join(words[::2])} may be weights, and are datasets: write a dataset as "
            f"./{words[0]} and give each a weight, such as '1 ./{words[0]} 1 ./{words[1]}'"
        )
    pairs: list[tuple[float | None, str]] = []
    for text, prefix in zip(words[::2], words[1::2], strict=True):
        weight = _weight(text)
        if weight is None or not 0 < weight < math.inf:
            raise UserError(
                f"--data-path '{shown}': the weight of {prefix} is '{text}', which is not a number above zero; "
                "every prefix needs a weight before it, such as '0.7 corpus/web 0.3 corpus/code'"
            )
        pairs.append((weight, dataset_prefix(prefix)))
    return pairs


def dataset_prefix(word: str) -> str:
    """People complete a file name; the prefix is what a dataset's files share."""
    return word if dataset_exists(word) else word.removesuffix(".bin").removesuffix(".idx")


def dataset_exists(prefix: str) -> bool:
    """Whether one of the two files of ``prefix`` is there."""
    return bool(prefix) and any(path(prefix).is_file() for path in (idx_path, bin_path))


def _checked_prefix(prefix: str) -> str:
    """A single prefix; a number without files is a weight that lost its prefix.

    Raises:
        UserError: there is no word at all, or a number that names no dataset.
    """
    if not prefix.strip() or (_weight(prefix) is not None and not dataset_exists(prefix)):
        raise UserError(
            f"--data-path '{prefix}': there is no {prefix or 'PREFIX'}.idx; give one dataset prefix, or pairs "
            "'weight prefix weight prefix ...' such as '0.7 corpus/web 0.3 corpus/code'"
        )
    return prefix


def _weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def parse_split(text: str) -> tuple[float, float, float]:
    """``--split 99,1,0`` (train, valid, test; any scale, missing ones 0; within quotes or not) as three shares of 1.

    Raises:
        UserError: not one to three numbers >= 0 with a sum above zero.
    """
    try:
        numbers = [float(part) for part in text.strip("'\" ").split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(0 <= n < math.inf for n in numbers) or sum(numbers) == 0:
        raise UserError(f"--split '{text}' is not one to three numbers >= 0 such as '99,1,0' (train,valid,test)")
    numbers += [0.0] * (3 - len(numbers))
    total = math.fsum(numbers)
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def split_ranges(shares: Sequence[float], documents: int) -> list[tuple[int, int]]:
    """Contiguous, adjoining document ranges [(first, stop)] in proportion to ``shares``, as Megatron rounds them."""
    stops = [0]
    for index in range(len(shares)):
        stops.append(round(math.fsum(shares[: index + 1]) * documents))
    return [(first, stop) for first, stop in zip(stops, stops[1:], strict=False)]


class Blend:
    """The order of sources for ``weights`` (>= 0, any scale, at least one above zero)."""

    def __init__(self, weights: Sequence[float]) -> None:
        total = math.fsum(weights)
        self.weights = [weight / total for weight in weights]
        self._only = self.weights.index(1.0) if 1.0 in self.weights else None
        self._blocks: OrderedDict[int, tuple[list[int], list[int]]] = OrderedDict()
        self._lock = threading.Lock()

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number of earlier samples from that source) of the mix's ``sample``."""
        if self._only is not None:
            return self._only, sample
        number, place = divmod(sample, _BLOCK)
        sources, ordinals = self._blocks.get(number) or self._block(number)
        return sources[place], ordinals[place]

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` come from each source."""
        if self._only is not None:
            return [samples if source == self._only else 0 for source in range(len(self.weights))]
        firsts, sources, _ = self._merge(samples, 0)
        before = np.bincount(sources[: samples - sum(firsts)], minlength=len(firsts))
        return [first + int(count) for first, count in zip(firsts, before, strict=True)]

    def _block(self, number: int) -> tuple[list[int], list[int]]:
        start = number * _BLOCK
        firsts, sources, ordinals = self._merge(start, _BLOCK)
        skip = start - sum(firsts)
        block = sources[skip : skip + _BLOCK].tolist(), ordinals[skip : skip + _BLOCK].tolist()
        with self._lock:
            self._blocks[number] = block
            while len(self._blocks) > _BLOCKS_HELD:
                self._blocks.popitem(last=False)
        return block

    def _merge(self, start: int, count: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Samples around [start, start + count) in order: (each source's first ordinal here, sources, ordinals).

        Before time t there are between t - n/2 and t + n/2 samples of n sources. So, with the margins below, all
        samples left out on the early side come before ``start`` and all on the late side after ``start + count``.
        """
        margin = len(self.weights) + 2
        firsts, sources, ordinals, times = [], [], [], []
        for source, weight in enumerate(self.weights):
            first = max(0, math.floor(weight * (start - margin)) - 2)
            stop = math.ceil(weight * (start + count + margin)) + 2 if weight else 0
            steps = np.arange(first, stop)
            firsts.append(first if weight else 0)
            sources.append(np.full(len(steps), source))
            ordinals.append(steps)
            times.append((steps + 0.5) / weight if weight else np.empty(0))
        order = np.argsort(np.concatenate(times), kind="stable")  # stable: ties go to the earlier source
        return firsts, np.concatenate(sources)[order], np.concatenate(ordinals)[order]
