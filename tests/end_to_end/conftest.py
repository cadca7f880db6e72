"""A small real corpus, made once a session by the real tools."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from tests.end_to_end.launch import run

pytest.importorskip("tokenizers")

MODULES = ("argparse", "ast", "bisect", "calendar", "csv", "dataclasses", "difflib", "heapq", "inspect", "textwrap")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl, tok.json and text_text_document.{bin,idx,json} of some standard-library modules."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_paths()["stdlib"])
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for name in MODULES:
            file.write(json.dumps({"text": (library / f"{name}.py").read_text(encoding="utf-8")}) + "\n")
    source, tokenizer = str(folder / "text.jsonl"), str(folder / "tok.json")
    learn = ("--vocab-size", "600", "--output", tokenizer)
    write = ("--output-prefix", str(folder / "text"), "--tokenizer-model", tokenizer, "--append-eod")
    for tool, arguments in (("train_tokenizer", learn), ("preprocess_data", write)):
        outcome = run(1, f"tools/{tool}.py", "--input", source, *arguments)
        assert outcome.status == 0, outcome.err
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
