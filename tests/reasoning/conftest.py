"""What tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.data.task_tokenizer import make_task_tokenizer


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the words of ``kv_chunks``."""
    path = tmp_path_factory.mktemp("words") / "words.json"
    make_task_tokenizer(["kv_chunks"], str(path))
    return path
