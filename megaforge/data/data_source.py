"""What a run trains on: samples by number, from dataset files, at random, or from a source of the user's own.

``--data-path NAME://...`` names another source than files; a user's file registers it::

    from megaforge.data.data_source import DataSource, DataSourceKind
    from megaforge.registry import DATA_SOURCES

    class Squares(DataSource): ...

    DATA_SOURCES.register("squares", DataSourceKind(lambda config, tokenizer: Squares(config.data.seq_length)))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.config.data_schedule import read_schedule
from megaforge.config.run_config import DataConfig
from megaforge.config.schema import settings
from megaforge.data.blend import parse_data_path, parse_split
from megaforge.data.indexed_dataset import check_files
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.registry import DATA_SOURCES


class SampleView(Protocol):
    """What a loader reads from: training data, or a validation view, which also has a length where it ends."""

    eod_mask_loss: bool = False

    @property
    def stage_starts(self) -> Sequence[int]:
        """The samples at which the sequence length may change, from 0 on."""
        return (0,)

    def sequence_length(self, k: int) -> int:
        """S of sample ``k``."""
        raise NotImplementedError

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        """Writes sample ``k`` into ``tokens`` and its document starts into ``marks`` (False before), both [S + n].

        The n >= 1 tokens beyond the S inputs are those that follow them, labels of the last inputs.

        Returns:
            How many labels count, from the left: S + n - 1 but at the end of what there is.
        """
        raise NotImplementedError

    def shown(self, k: int, inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What the model reads in place of the ``inputs`` of sample ``k``, int64 [S]; the labels stay as they are."""
        return inputs

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        """Sets to 0 in ``counts`` [S + n - 1], one value a label, what of sample ``k`` gives no loss."""
        return


class DataSource(SampleView, Protocol):
    """What a run trains on: samples of which the k-th never depends on layout or length of the run.

    A class of one's own derives from this one; what it does not define is as below.

    Attributes:
        eod_mask_loss: whether predicting the first token of a document gives no loss.
        notices: things to say once to the user.
    """

    notices: Sequence[str] = ()

    @property
    def end(self) -> int | None:
        """How many samples there are; None: without end."""
        return None

    @property
    def epoch_tokens(self) -> Sequence[int]:
        """Training tokens of one epoch of each source; empty where there are no epochs."""
        return ()

    def passes(self, samples: int) -> Sequence[float]:
        """How often samples [0, samples) read each source; empty where there are no epochs."""
        tokens = sum(self.epoch_tokens)
        return [self.tokens_before(samples) / tokens] if tokens else ()

    def domain(self, k: int) -> str | None:
        """What kind of text sample ``k`` is (web, code, ...); None where nobody said."""
        return None

    def tokens_before(self, samples: int) -> int:
        """Labels in samples [0, samples)."""
        raise NotImplementedError

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """What the order of samples [0, consumed_samples) depended on, as checkpoints keep it (JSON)."""
        raise NotImplementedError

    def check_state(self, saved: dict[str, Any]) -> None:
        """Refuses to go on from a checkpoint whose samples would not have been these.

        Args:
            saved: :meth:`state` of then, and its ``consumed_samples``.

        Raises:
            UserError: names what differs.
        """
        for name, now in self.state(saved["consumed_samples"]).items():
            if saved.get(name) != now:
                raise UserError(
                    f"the checkpoint was trained on another order of samples: {name} was {saved.get(name)} and is now "
                    f"{now}; restore it, add --reset-data to go on with these data from their beginning, or start a "
                    "new run without --load"
                )

    def bytes_per_token(self, split: str = "valid") -> float | None:
        """UTF-8 bytes that a token of the split stands for; None if unknown."""
        return None

    def validation(self, split: str = "valid") -> SampleView:
        """What an evaluation reads.

        Raises:
            UserError: there is nothing to evaluate on.
        """
        raise UserError(f"--eval-iters: this data source has no '{split}' samples; use --eval-iters 0")


# Settings of the data section that dataset files heed, and other sources may.
OF_FILES = (
    *("split", "split_order", "verify_data", "data_lanes", "valid_data_path", "test_data_path"),
    *("data_order", "data_cache_dir"),
)


@dataclass(frozen=True)
class DataSourceKind:
    """How a source is opened.

    Attributes:
        open: ``open(config, tokenizer)``; raises UserError for data that do not fit the run.
        check: ``check(config)``; raises UserError for what can be seen before torch is imported.
        reads: settings of the data section that it heeds, of :data:`OF_FILES` and ``data_schedule``; a run says so of
            others that are given.
    """

    open: Callable[[Config, Tokenizer | None], DataSource]
    check: Callable[[Config], None] = lambda config: None
    reads: tuple[str, ...] = ()


def source_kind(data: DataConfig) -> DataSourceKind:
    """The kind of source that the flags ask for.

    Raises:
        UserError: a name that is not registered, or one within a blend.
    """
    schemes = [match[1] for path in data.data_path if (match := re.match(r"([a-z][a-z0-9+.-]*)://", path))]
    if schemes and len(data.data_path) > 1:
        raise UserError(
            f"--data-path {' '.join(data.data_path)}: a blend is of dataset files; give {schemes[0]}://... alone"
        )
    try:
        kind: DataSourceKind = DATA_SOURCES.get(_name_of(data, schemes))
    except UserError as error:
        raise UserError(f"--data-path {data.data_path[0]}: {error}") from error
    return kind


def _name_of(data: DataConfig, schemes: Sequence[str]) -> str:
    """The name of the kind of source, in the registry."""
    if data.mock_data:
        return "mock"
    return schemes[0] if schemes else "stream" if data.streams else "files"


def unread_settings(data: DataConfig) -> Iterator[str]:
    """What to tell of settings that the source does not heed."""
    kind, source = source_kind(data), "--mock-data" if data.mock_data else f"--data-path {' '.join(data.data_path)}"
    if "data_schedule" not in kind.reads and data.data_schedule and not read_schedule(data.data_schedule).optional:
        yield f"--data-schedule {data.data_schedule}: {source} does not heed it: it changes nothing"
    for name in (name for name in OF_FILES if name not in kind.reads):
        value, flag = getattr(data, name), settings()[f"data.{name}"]
        if value != flag.default:
            shown = " ".join(value) if isinstance(value, tuple) else "" if value is True else str(value)
            yield f"{f'{flag.flag} {shown}'.strip()}: {source} does not heed it: it changes nothing"


def held_out(data: DataConfig) -> dict[str, list[str]]:
    """The prefixes of ``--valid-data-path`` and ``--test-data-path``, whose weights nothing reads."""
    found = {}
    for part, values in (("valid", data.valid_data_path), ("test", data.test_data_path)):
        try:
            found[part] = [prefix for _, prefix in parse_data_path(values)] if values else []
        except UserError as error:
            raise UserError(str(error).replace("--data-path", f"--{part}-data-path")) from error
    return found


def _check_files(config: Config) -> None:
    if not config.data.data_path:
        raise UserError(
            "--data-path is missing; give the prefix of a dataset, such as corpus/train_text_document (or --mock-data, "
            "to measure speed on random tokens)"
        )
    if config.data.data_schedule is not None:
        schedule = read_schedule(config.data.data_schedule)
        schedule.check_lengths(config.data.seq_length, config.parallel.seq_len_divisor)
    shares = parse_split(config.data.split)
    for _, prefix in parse_data_path(config.data.data_path):
        check_files(prefix)
    for share, (part, prefixes) in zip(shares[1:], held_out(config.data).items(), strict=True):
        if prefixes and share:
            raise UserError(
                f"--{part}-data-path {' '.join(getattr(config.data, f'{part}_data_path'))}: --split "
                f"{config.data.split} holds out documents of --data-path for that; write --train-data-path in place of "
                "--data-path"
            )
        for prefix in prefixes:
            check_files(prefix)


# Reading needs torch, which is not imported before the checks.
FILES = DataSourceKind(
    lambda config, tokenizer: resolve_name("megaforge.data.samples:open_files")(config, tokenizer),
    _check_files,
    (*OF_FILES, "data_schedule"),
)
MOCK = DataSourceKind(lambda config, tokenizer: resolve_name("megaforge.data.mock:open_mock")(config))
CHAT = DataSourceKind(
    lambda config, tokenizer: resolve_name("megaforge.data.chat:open_chat")(config, tokenizer),
    reads=("valid_data_path",),
)
