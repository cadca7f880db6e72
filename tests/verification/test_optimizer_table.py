"""The table of rules and schedules has a row for each, of what it says of itself and what the planner says of it."""

from __future__ import annotations

import pytest

from megaforge.optim.adamw import AdamW
from megaforge.registry import UPDATE_RULES
from megaforge.verification.optimizer_table import optimizer_table


class ThreeMoments(AdamW):
    """Keeps ``three`` of them | for
    a test.

    More is not shown.
    """

    @classmethod
    def states(cls, config):
        return ("one", "two", "three")


def test_a_rule_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UPDATE_RULES._parts, "three", ThreeMoments)
    monkeypatch.setattr(UPDATE_RULES, "builtin", (*UPDATE_RULES.builtin, "three"))
    rows = [row.strip("| ").split(" | ") for row in optimizer_table().splitlines()]
    by_flag = {row[0]: row[1:] for row in rows}
    assert len(by_flag) == len(rows) >= 6 and all(len(row) == 5 for row in rows)
    assert [by_flag["`--optimizer adam`"][i] for i in (1, 2, 3)] == ["12.00", "1.50", "1.50"]
    assert by_flag["`--optimizer three`"] == ["Keeps `three` of them \\| for a test", "16.00", "2.00", "2.00"]
    assert all(row[-3:] == ["0", "0", "0"] for flag, *row in rows if "lr-decay-style" in flag)
