"""Heads of the audit trail that no run wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megaforge.checkpoint.anchors import check_anchor, replaced
from megaforge.errors import UserError
from megaforge.monitor.audit import AUDIT_FILE, AuditTrail, read_trail


@pytest.mark.parametrize("anchor", [[], "x", 3, {}, {"trail": 1}, {"records": -1}, {"records": "9"}, {"records": None}])
def test_a_malformed_head_is_named(tmp_path: Path, anchor: Any) -> None:
    AuditTrail(tmp_path / AUDIT_FILE).append("replaces", trails=3)
    trail = read_trail(tmp_path / AUDIT_FILE)
    if isinstance(anchor, dict):
        anchor = {"trail": trail.name, **anchor}
    assert check_anchor(anchor, trail) is not None
    assert replaced(trail) == set()
    assert check_anchor(None, trail) is None and check_anchor(trail.head, trail) is None


def test_deep_nesting_is_an_error_of_the_file(tmp_path: Path) -> None:
    (tmp_path / AUDIT_FILE).write_bytes(b'{"kind":"a","x":' + b"[" * 900 + b"]" * 900 + b"}\n")
    with pytest.raises(UserError, match="line 1"):
        read_trail(tmp_path / AUDIT_FILE)
