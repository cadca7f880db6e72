"""The table is whole and says what stands in the program; what its rows show, ``python -m tests.mutations`` runs."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.mutations.table import MUTATIONS, ROOT, Mutation, sites


def test_every_wait_and_rename_has_a_row() -> None:
    code = {file: " ".join(row.code for row in MUTATIONS if row.file == file) for file, _ in sites()}
    rows = {file: Counter(call for other, call in sites() if other == file) for file in code}
    lacking = [
        (file, call)
        for file, calls in rows.items()
        for call, count in calls.items()
        if _plain(code[file]).count(_plain(call)) < count
    ]
    assert lacking == []


@pytest.mark.parametrize("row", MUTATIONS, ids=str)
def test_a_row_names_one_place_and_a_test(row: Mutation) -> None:
    assert (ROOT / "megaforge" / row.file).read_text(encoding="utf-8").count(row.code) == 1
    assert (ROOT / row.test.partition("::")[0]).exists()


def _plain(code: str) -> str:
    return "".join(code.split()).replace("'", '"')
