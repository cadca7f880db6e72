"""Text, tokenizers and command lines that the tests of the offline tools share."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = (
    "the of state attention token café naïve 漢字 данные def return self <|endoftext|> </s> 3.14 x_1 ::= \n\t \u200d "
    "👩\u200d👧 tensor parallel loss <|pad|> \r\n ---- ==== {} [0] import yield"
).split(" ")


def documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Random texts with odd Unicode and literal control tokens; every tenth is empty."""
    source = random.Random(seed)
    return [
        "" if number % 10 == 7 else " ".join(source.choices(WORDS, k=source.randint(1, longest)))
        for number in range(count)
    ]


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    """One record a line, the key among others."""
    lines = [json.dumps({"id": n, key: text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def bpe_tokenizer(path: Path, vocab_size: int = 400) -> str:
    """A small byte-level BPE with <|endoftext|> and <|pad|> as control tokens."""
    pytest.importorskip("tokenizers", reason="needs the data extra")
    from megaforge.data.train_tokenizer import TokenizerSettings, train_tokenizer

    corpus = write_jsonl(path.with_suffix(".training.jsonl"), documents(300, seed=5))
    settings = TokenizerSettings((str(corpus),), str(path), vocab_size, special_tokens=("<|pad|>",))
    train_tokenizer(settings)
    return str(path)


def command(tool: str, *arguments: object) -> list[str]:
    """The command line of ``tools/TOOL.py``."""
    return [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)]


def run_tool(
    tool: str, *arguments: object, prefix: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a tool to its end, from a directory that is not the repository."""
    return subprocess.run(
        [*prefix, *command(tool, *arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
        env={**os.environ, **environment},
    )
