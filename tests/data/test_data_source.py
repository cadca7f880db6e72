"""What a data source has without defining it, and which one the flags name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.cli import parse_config
from megaforge.data.data_source import FILES, MOCK, DataSourceKind, source_kind, unread_settings
from megaforge.data.loader import GlobalBatchLoader
from megaforge.errors import UserError
from megaforge.registry import DATA_SOURCES
from tests.data.datasets import write_dataset
from tests.toys.counting_source import Counting


def test_flags_name_a_source() -> None:
    for flags, kind in (
        ((), FILES),
        (("--data-path", "a"), FILES),
        (("--data-path", "1", "a", "2", "b"), FILES),
        (("--mock-data",), MOCK),
        (("--data-path", "counting://3"), DATA_SOURCES.get("counting")),
    ):
        assert source_kind(parse_config(flags).config.data) is kind
    for paths, complaint in (
        (["s3://bucket/a"], "--data-path s3://bucket/a: 's3' is not a known data source .there are files, mock"),
        (["1", "counting://3", "2", "b"], "a blend is of dataset files; give counting://... alone"),
    ):
        with pytest.raises(UserError, match=complaint):
            source_kind(parse_config(["--data-path", *paths]).config.data)
    with pytest.raises(UserError, match="--data-path is missing"):
        FILES.check(parse_config([]).config)


def test_settings_that_a_source_does_not_heed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--split", "1,1,0", "--data-lanes", "4", "--verify-data", "--split-order", "shuffled")

    def told(*flags: str) -> list[str]:
        return list(unread_settings(parse_config([*flags, *given]).config.data))

    assert told("--data-path", "a") == told("--data-path", "stream:a")[2:] == []
    assert [text[:14] for text in told("--data-path", "stream:a")] == ["--verify-data:", "--data-lanes 4"]
    mock = parse_config(["--mock-data", "--data-order", "streamed"]).config.data
    assert list(unread_settings(mock)) == ["--data-order streamed: --mock-data does not heed it: it changes nothing"]
    assert told("--data-path", "counting://3") == [
        f"{flag}: --data-path counting://3 does not heed it: it changes nothing"
        for flag in ("--split 1,1,0", "--verify-data", "--data-lanes 4")
    ]
    reader = DataSourceKind(DATA_SOURCES.get("counting").open, reads=("split", "data_lanes"))
    monkeypatch.setitem(DATA_SOURCES._parts, "counting", reader)
    assert [text[:14] for text in told("--data-path", "counting://3")] == ["--verify-data:"]


def test_a_small_source_has_the_rest() -> None:
    source = Counting(3, 4)
    (batch,) = next(iter(GlobalBatchLoader(source, BatchSchedule(2), 2)))
    assert batch.tokens.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10]] and batch.labels[1].tolist() == [4, 7, 10, 13]
    assert batch.loss_mask.min() == 1 and np.flatnonzero(batch.document_start[0]).tolist() == [0]
    assert (source.stage_starts, source.epoch_tokens, source.bytes_per_token()) == ((0,), (), None)
    source.check_state({"step": 3, "consumed_samples": 8})
    for saved in ({"step": 5, "consumed_samples": 8}, {"consumed_samples": 8}):
        with pytest.raises(UserError, match="another order of samples: step was (5|None) and is now 3; .*--reset-data"):
            source.check_state(saved)


def test_held_out_datasets_exclude_held_out_shares(tmp_path: Path) -> None:
    files = [write_dataset(tmp_path / name, [[1, 2, 3]]) for name in "ab"]
    apart = ("--eval-iters", "1", "--valid-data-path")
    FILES.check(parse_config(["--train-data-path", files[0], *apart, files[1]]).config)
    with pytest.raises(UserError, match="--valid-data-path .*: --split 99,1,0 holds out .*write --train-data-path"):
        FILES.check(parse_config(["--data-path", files[0], *apart, files[1]]).config)
    with pytest.raises(UserError, match="none"):
        FILES.check(parse_config(["--train-data-path", files[0], *apart, str(tmp_path / "none")]).config)
    with pytest.raises(UserError, match="--valid-data-path '0.5': there is no 0.5.idx"):
        FILES.check(parse_config(["--train-data-path", files[0], *apart, "0.5"]).config)
