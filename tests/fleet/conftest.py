"""No waiting between looks at models that take no time."""

from __future__ import annotations

import pytest

from megaforge.fleet import supervisor


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_TICK", 0.001)
