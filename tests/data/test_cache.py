"""Copies on a fast disk: made once, whole, and gone when there is no room."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from megaforge.config.cli import parse_config
from megaforge.data.cache import Cache, cached_dataset
from megaforge.data.data_source import source_kind
from megaforge.errors import UserError
from tests.data.datasets import random_documents, write_dataset


def test_datasets_are_read_from_their_copies(tmp_path: Path) -> None:
    prefix, cache = write_dataset(tmp_path / "far" / "web", random_documents(1, 40, 20)), tmp_path / "near"
    flags = ("--data-path", prefix, "--seq-length", "16")
    plain, kept = (
        source_kind(config.data).open(config, None)
        for config in (parse_config([*flags, *more]).config for more in ((), ("--data-cache-dir", str(cache))))
    )
    copies = sorted(path.suffix for path in cache.rglob("web.*") if path.suffix != ".lock")
    assert copies == [".bin", ".idx"] and str(cache) in str(kept._sources[0].dataset.bin_path)  # type: ignore[attr-defined]
    plain.check_state(kept.state(9) | {"consumed_samples": 9})
    write_dataset(tmp_path / "far" / "web", random_documents(2, 40, 20))
    again = cached_dataset(prefix, Cache(str(cache), 1 << 20))
    assert Path(f"{again}.bin").read_bytes() == Path(f"{prefix}.bin").read_bytes(), "other content, another copy"
    assert again.endswith("/web") and cached_dataset(prefix, None) == prefix


def test_room(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "c"), 250)
    for number in range(5):
        path = cache.made(f"{number}.txt", lambda target: target.write_bytes(b"x" * 100))
        os.utime(path, (number, number))
    assert sorted(path.name for path in (tmp_path / "c").glob("*.txt")) == ["3.txt", "4.txt"]
    kept = Cache(str(tmp_path / "c"), 150)
    kept.made("3.txt", lambda target: target.write_bytes(b""), keep=True)
    kept.made("5.txt", lambda target: target.write_bytes(b"x" * 100))
    assert sorted(path.name for path in (tmp_path / "c").glob("*.txt")) == ["3.txt", "5.txt"]
    prefix = write_dataset(tmp_path / "big", [[1] * 500])
    with pytest.raises(UserError, match=r"--data-cache-size 1.5e-07: .*big has .* GB; allow as many"):
        cached_dataset(prefix, kept)


def test_one_makes_it_and_others_wait(tmp_path: Path) -> None:
    made: list[str] = []

    def make(target: Path) -> None:
        made.append(target.name)
        target.write_text("whole")

    threads = [threading.Thread(target=lambda: Cache(str(tmp_path / "c"), 99).made("deep/a", make)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a"] and (tmp_path / "c" / "deep" / "a").read_text() == "whole"


def test_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-cache-dir .*file: a cannot be copied there"):
        Cache(str(tmp_path / "file"), 9).made("a", lambda target: target.write_text(""))
