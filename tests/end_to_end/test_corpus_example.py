"""The corpus example in small: from found text to two trained models, and what is made is not made again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megaforge.data.corpus.explain import explain_documents
from tests.end_to_end.launch import REPO


@pytest.fixture(scope="module")
def arms() -> ModuleType:
    pytest.importorskip("ftfy", reason="needs the corpus extra")
    spec = importlib.util.spec_from_file_location("corpus_arms", REPO / "examples" / "corpus" / "arms.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_found_text_becomes_two_models(arms: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    line = ["--output", str(output), "--small", "--workers", "1"]
    assert arms.main(line) == 0
    *_, head, raw, cleaned, report = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["corpus", "documents"] and raw.startswith("raw ") and cleaned.startswith("cleaned ")
    manifests = [json.loads((output / name / "corpus.json").read_text()) for name in ("raw", "cleaned")]
    assert manifests[0]["read"] == manifests[1]["read"], "both are of the same documents"
    assert manifests[0]["documents"] >= manifests[1]["documents"] > 10
    names = [stage["name"] for stage in manifests[1]["stages"]]
    assert names == ["read", "html", "normalise", "length", "pii", "quality", "exact", "minhash", "decontaminate"]
    assert report.endswith("report.html") and (output / "cleaned" / "report.html").is_file()
    kept = explain_documents(str(output / "cleaned"), None, None, next(iter(paths(output))))
    assert "kept, in the dataset python-code-" in kept
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.bin")}
    assert arms.main(line) == 0
    assert capsys.readouterr().out.splitlines()[-3:-1] == [raw, cleaned]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.bin")} == before


def paths(output: Path) -> list[str]:
    """The files of the kept documents."""
    import pyarrow.parquet as pq

    files = sorted((output / "cleaned" / "lineage").glob("*.parquet"))
    return [row["path"] for file in files for row in pq.read_table(file).to_pylist() if row["dataset"]]
