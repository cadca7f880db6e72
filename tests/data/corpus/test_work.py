"""Files of a corpus being made appear whole, once the disk has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="needs the corpus extra")

from megaforge.data.corpus.work import write_json
from tests.disk_log import disk_log


def test_the_disk_has_a_file_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, partial = disk_log(tmp_path, monkeypatch), f".a.json.tmp-{os.getpid()}"
    write_json(tmp_path / "a.json", {"rows": 3})
    assert done == [("fsync", partial), ("replace", partial, "a.json"), ("fsync", ".")]
    assert (tmp_path / "a.json").read_text() == '{"rows": 3}\n'
