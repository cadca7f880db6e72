"""A data source of a user's own: sample k counts up from k, in steps that ``--data-path counting://3`` names."""

from __future__ import annotations

from typing import Any

import numpy as np

from megaforge.config.config import Config
from megaforge.data.data_source import DataSource, DataSourceKind
from megaforge.errors import UserError
from megaforge.registry import DATA_SOURCES


class Counting(DataSource):
    def __init__(self, step: int, length: int, first: int = 0) -> None:
        self.step, self.length, self.first = step, length, first
        self.notices = [f"counting by {step}"]

    def sequence_length(self, k: int) -> int:
        return self.length

    def fill(self, k: int, tokens: np.ndarray, marks: np.ndarray) -> int:
        tokens[:] = (self.first + k + self.step * np.arange(len(tokens))) % 64
        marks[0] = True
        return len(tokens) - 1

    def tokens_before(self, samples: int) -> int:
        return samples * self.length

    def state(self, consumed_samples: int) -> dict[str, Any]:
        return {"step": self.step}

    def validation(self, split: str = "valid") -> Counting:
        return Counting(self.step, self.length, first=32)


def step_of(config: Config) -> str:
    return config.data.data_path[0].removeprefix("counting://")


def check(config: Config) -> None:
    if not step_of(config).isdecimal():
        raise UserError(f"--data-path {config.data.data_path[0]}: counting:// is followed by a number")


def open_counting(config: Config, tokenizer: object) -> Counting:
    return Counting(int(step_of(config)), config.data.seq_length)


DATA_SOURCES.register("counting", DataSourceKind(open_counting, check))
