"""The report: its numbers against the documents, its words safe in both formats."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaforge.data.corpus.lineage import LINEAGE
from megaforge.data.corpus.report import write_report
from megaforge.data.corpus.report_data import LENGTHS, entropies, gather

ROW: dict[str, Any] = {"source": "web", "domain": "web", "path": "a|b<c>.txt", "characters": 100, "rewrites": []}
ROWS = [
    {**ROW, "dataset": "web-web-l0", "language": "en", "licence": "MIT"},
    {**ROW, "dataset": "web-web-l0", "language": "de", "characters": 5},
    {**ROW, "stage": "length", "reason": "too short (3 characters)", "characters": 3},
    {**ROW, "stage": "exact", "reason": "the same text as another document (of 0-0)", "characters": 100},
    {**ROW, "stage": "exact", "reason": "the same text as another document (of 0-0)", "characters": 2_000_000},
]
MANIFEST: dict[str, Any] = {
    "digest": "ab" * 32,
    "documents": 2,
    "bytes": 105,
    "tokens": 40,
    "stages": [
        {"name": "read", "documents": 5, "bytes": 500, "kept": 5, "kept_bytes": 500, "rewritten": 0, "counts": {}},
        {"name": "pii", "documents": 5, "bytes": 500, "kept": 2, "kept_bytes": 105, "rewritten": 1, "counts": {"e": 7}},
    ],
    "datasets": [{"name": "web-web-l0", "documents": 2, "bytes": 105, "tokens": 40, "prefix": "datasets/web-web-l0"}],
    "recipe": {"stages": [["length", {"minimum": 50}]], "sources": [{"name": "web"}], "shard": {}},
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for folder in ("lineage", "pairs"):
        (tmp_path / folder).mkdir()
    for part, rows in enumerate((ROWS[:3], ROWS[3:])):
        table = [{"id": part << 32 | number, **row} for number, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(table, schema=LINEAGE), tmp_path / "lineage" / f"{part:06d}.parquet")
    np.save(tmp_path / "pairs" / "000000.npy", np.ones(1 << 16, np.int64))
    return tmp_path


def test_numbers_are_those_of_the_lineage(corpus: Path) -> None:
    data = gather(corpus / "lineage", corpus / "pairs")
    assert data.read["source"] == {"web": 5} and data.kept["source"] == {"web": 2}
    assert data.read["language"] == {"en": 1, "de": 1, "?": 3} and data.characters["language"] == {"en": 100, "de": 5}
    assert data.dropped == {("length", "too short"): 1, ("exact", "the same text as another document"): 2}
    assert data.clusters == {"0-0": 2} and data.lengths.sum(1).tolist() == [2, 3]
    assert data.lengths[0][0] == 1 and data.lengths[1][len(LENGTHS)] == 1, "shorter and longer than all intervals"
    assert data.entropy == (8.0, 8.0)


def test_entropies_are_those_of_the_definition() -> None:
    text = b"abracadabra, abracadabra; a cab"
    pairs = Counter(zip(text, text[1:], strict=False))
    first = Counter(text[:-1])
    total = len(text) - 1
    bits = -sum(n / total * math.log2(n / total) for n in first.values())
    given = -sum(n / total * math.log2(n / first[pair[0]]) for pair, n in pairs.items())
    counts = np.zeros(1 << 16, np.int64)
    for (one, two), number in pairs.items():
        counts[one << 8 | two] = number
    assert entropies(counts) == pytest.approx((bits, given))
    assert entropies(np.zeros(1 << 16, np.int64)) == (0.0, 0.0)


def test_both_reports_say_the_same_and_escape_names(corpus: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the train extra")
    write_report(corpus, MANIFEST, gather(corpus / "lineage", corpus / "pairs"))
    text, page = ((corpus / name).read_text() for name in ("report.md", "report.html"))
    assert "| exact | the same text as another document | 2 | 1-0 a\\|b&lt;c>.txt: the same text" in text
    assert "a|b&lt;c&gt;.txt" in page and "<c>" not in page
    for words in ("2 of 5 documents are kept", "1 kept documents stand for 2 others", "minimum 50"):
        assert words in text and words in page
    pictures = [f"pictures/{name}.png" for name in ("stages", "reasons", "lengths", "language", "licence", "clusters")]
    for picture in pictures:
        assert picture in text and picture in page
        assert (corpus / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(str(path.relative_to(corpus)) for path in (corpus / "pictures").iterdir()) == sorted(pictures)


def test_without_matplotlib_pictures_are_left_out_and_said_to_be(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    write_report(corpus, MANIFEST, gather(corpus / "lineage", corpus / "pairs"))
    assert "Pictures are left out: they need matplotlib" in (corpus / "report.md").read_text()
    assert not (corpus / "pictures").exists()
