"""What was found once is read again, and the fuzzer sees what it is there to see."""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from pathlib import Path

import pytest

from megaforge.errors import UserError
from tests.fuzz import fuzz as fuzz_module
from tests.fuzz.fuzz import CORPUS, fuzz, replay
from tests.fuzz.mutate import mutated
from tests.fuzz.readers import READERS, Reader


def _by_reader() -> dict[str, list[Path]]:
    found = defaultdict(list)
    for path in sorted(CORPUS.iterdir()):
        found[path.name.rpartition("-")[0].replace("_", " ")].append(path)
    return dict(found)


def test_every_reader_reads_its_good_file(tmp_path):
    for name, reader in READERS.items():
        folder = tmp_path / name
        folder.mkdir()
        reader.read(reader.make(folder))


@pytest.mark.parametrize("name", _by_reader())
def test_what_was_found_is_refused_by_a_clear_error(name, tmp_path):
    reader = READERS[name]
    for number, path in enumerate(_by_reader()[name]):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = reader.make(folder)
        file.write_bytes(path.read_bytes())
        with pytest.raises(UserError, match=f"{file.name}|{folder.name}"):
            reader.read(file)


def _fake(read) -> Reader:
    def make(folder: Path) -> Path:
        (folder / "file").write_bytes(b'{"a": [1, 2]}')
        return folder / "file"

    return Reader(make, read)


def _fails(path: Path) -> None:
    raise ValueError(path.name)


def _refuses(path: Path) -> None:
    raise UserError("a clear error")


def _dies(path: Path) -> None:
    os._exit(7)


def _hoards(path: Path) -> None:
    bytearray(8 << 30)


def _hangs(path: Path) -> None:
    time.sleep(600)


def test_the_fuzzer_tells_what_a_reader_does_not_bear(monkeypatch):
    reads = {"refuses": _refuses, "fails": _fails, "dies": _dies, "hoards": _hoards, "hangs": _hangs}
    for name, read in reads.items():
        monkeypatch.setitem(READERS, name, _fake(read))
    said = {}
    for name in reads:
        monkeypatch.setattr(fuzz_module, "SECONDS", 1.0 if name == "hangs" else 600.0)
        said[name] = [finding.what for finding in fuzz(name, 1, cases=1 + (name == "fails"))[1]]
    assert said["refuses"] == []
    assert said["dies"] == ["the process ended with 7"] and said["hangs"] == ["a read took more than 1 s"]
    assert said["hoards"][0].startswith("MemoryError") and said["fails"][0].startswith("ValueError")
    assert len(said["fails"]) == 1, "one of a kind"
    assert replay("refuses", b"x") is None and replay("fails", b"x").content == b"x"


def test_mutations_follow_the_seed_and_change_something():
    good = b'{"a": [1, 2, {"b": "text"}], "c": 0.5}' * 1
    some = [mutated(good, random.Random(n)) for n in range(200)]
    assert some == [mutated(good, random.Random(n)) for n in range(200)]
    assert sum(each != good for each in some) > 180 and len(set(some)) > 120
    assert isinstance(mutated(b"", random.Random(0)), bytes)
