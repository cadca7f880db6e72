"""The table is whole and says what stands in the program; what its rows show, ``python -m tests.mutations`` runs."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.mutations.__main__ import taken_out
from tests.mutations.checks import named_test, sampled
from tests.mutations.table import MUTATIONS, ROOT, Mutation, sites


def test_every_wait_and_rename_has_a_row() -> None:
    found = list(sites())
    code = {file: " ".join(row.code for row in MUTATIONS if row.file == file) for file, _ in found}
    rows = {file: Counter(call for other, call in found if other == file) for file in code}
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


def test_checks_are_drawn_by_a_seed_and_taken_out_where_they_stand() -> None:
    drawn = list(sampled(12, 3))
    assert drawn == list(sampled(12, 3)) != list(sampled(12, 4)) and len(drawn) == 12
    for line, row in drawn:
        whole = (ROOT / "megaforge" / row.file).read_text(encoding="utf-8")
        without = taken_out(whole, row, line)
        assert whole != without and without.splitlines()[: line - 1] == whole.splitlines()[: line - 1]
        assert "pass" in without.splitlines()[line - 1] and (ROOT / row.test).is_file()
        compile(without, row.file, "exec")
    assert named_test("monitor/audit.py") == "tests/monitor/test_audit.py"
    assert named_test("nn/moe/routing.py") == "tests/nn/test_moe.py" and named_test("no_such.py") is None


def _plain(code: str) -> str:
    return "".join(code.split()).replace("'", '"')
