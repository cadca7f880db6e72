"""A small real corpus, made once a session by the real tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real_text import write_text

pytest.importorskip("tokenizers")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl, tok.json and text_text_document.{bin,idx,json} of some standard-library modules."""
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder)
    return folder


@pytest.fixture(scope="session")
def flags(corpus: Path) -> tuple[str, ...]:
    """The flags of a short run of the smallest preset on the corpus."""
    return (
        *("--config", "cdrmix-test", "--device", "cpu", "--train-iters", "10", "--split", "80,20,0"),
        *("--data-path", str(corpus / "text_text_document"), "--tokenizer-model", str(corpus / "tok.json")),
        *("--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4"),
        *("--eval-iters", "1", "--eval-interval", "4", "--save-interval", "3", "--keep-last", "0"),
    )
