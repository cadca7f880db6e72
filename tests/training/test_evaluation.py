"""Text to evaluate: the same reader as every tool's, and nothing to predict is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from megaforge.training.evaluation import is_text, read_text

pytest.importorskip("orjson", reason="needs the data extra")


def test_documents_end_with_the_end_of_document_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("NullTokenizer", "50")
    for name in ("a.jsonl", "A.JSONL", "a.ndjson", "a.json", "a"):
        path = tmp_path / name
        path.write_text('{"text": "1 2"}\n{"text": ""}\n{"text": "3"}\n')
        stream = read_text(str(path), tokenizer)
        assert stream.tokens.tolist() == [1, 2, 50, 3, 50] and stream.documents == 2
        np.testing.assert_array_equal(stream.document_starts, [0, 3])
        assert stream.text_bytes == 4


@pytest.mark.parametrize(("text", "message"), [("1", "nothing to predict"), (" \n", "no text"), ("", "no text")])
def test_fewer_than_two_tokens_are_refused(text: str, message: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("NullTokenizer", "50")
    tokenizer.eod = None
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--input {path}: .*{message}"):
        read_text(str(path), tokenizer)


def test_files_are_told_from_datasets(tmp_path: Path) -> None:
    (tmp_path / "d.idx").touch()
    (tmp_path / "d").touch()
    (tmp_path / "notes").touch()
    assert [is_text(str(tmp_path / name)) for name in ("d", "d.idx", "d.bin", "notes", "missing.JSONL.gz", "x")] == [
        *(False, False, False, True, True, False)
    ]
