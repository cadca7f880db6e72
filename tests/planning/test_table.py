"""Columns of text."""

from __future__ import annotations

from megaforge.planning.table import table


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert table([("name", "bytes"), ("a", "1,024"), ("longer", "")]) == "name    bytes\na       1,024\nlonger"
    assert table([("one",)]) == "one"
