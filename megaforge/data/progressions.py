"""``--data-path progressions://N``: arithmetic progressions modulo N, which small models learn in minutes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.data.data_source import DataSourceKind
from megaforge.data.mock import MockData
from megaforge.data.sample_order import key_of, splitmix64
from megaforge.data.sample_schedule import SampleSchedule
from megaforge.data.sidecar import digest_of
from megaforge.errors import UserError

STRIDES = 7  # 1, 2, ... of which a sample has one
_SCHEME = "progressions://"


class Progressions(MockData):
    """Endless samples ``(a + b i) mod N``, with a first number a below N and a stride b from 1 to 7 of their own: from
    the second number on, each follows from the two before it.

    Args:
        schedule, part: as :class:`megaforge.data.mock.MockData`.
        modulus: N.
    """

    def __init__(self, schedule: SampleSchedule, modulus: int, part: str = "train") -> None:
        super().__init__(schedule, modulus, part=part)
        self._modulus = modulus
        self.notices = []
        self.digest = digest_of(["progressions", 1, modulus])
        self._key = ["progressions", 1, part, schedule.seed]

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        """Writes sample ``k``, one document of [S + n] tokens; all labels count."""
        first, stride = splitmix64(key_of(*self._key, k), np.arange(2, dtype=np.uint64))
        begin, step = int(first) % self._modulus, 1 + int(stride) % STRIDES
        tokens[:] = (begin + step * np.arange(len(tokens), dtype=np.int64)) % self._modulus
        marks[:] = False
        marks[0] = True
        return len(tokens) - 1

    def validation(self, split: str = "valid") -> Progressions:
        return Progressions(self._schedule, self._modulus, part=split)


def modulus_of(config: Config) -> int:
    """The N of ``--data-path progressions://N``.

    Raises:
        UserError: it is not a number from 2, or the vocabulary is smaller.
    """
    path, vocabulary = config.data.data_path[0], config.model.vocab_size
    text = path.removeprefix(_SCHEME)
    if not text.isdecimal() or not 2 <= int(text) <= 1 << 30:
        raise UserError(f"--data-path {path}: {_SCHEME} is followed by a number from 2, such as {_SCHEME}64")
    if vocabulary is not None and vocabulary < int(text):
        raise UserError(f"--data-path {path}: --vocab-size {vocabulary} is smaller; give at least {text}")
    return int(text)


def check(config: Config) -> None:
    """What can be seen before torch is imported."""
    _ = modulus_of(config)


PROGRESSIONS = DataSourceKind(
    lambda config, tokenizer: Progressions(SampleSchedule.of(config), modulus_of(config)), check
)
