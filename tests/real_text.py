"""A small real dataset, made by the real tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
MODULES = ("argparse", "ast", "bisect", "calendar", "csv", "dataclasses", "difflib", "heapq", "inspect", "textwrap")


def write_text(folder: Path) -> None:
    """Some modules of the standard library as a dataset, made by the real tools."""
    if (folder / "text_text_document.idx").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for name in MODULES:
            file.write(json.dumps({"text": (library / f"{name}.py").read_text(encoding="utf-8")}) + "\n")
    source, tokenizer = str(folder / "text.jsonl"), str(folder / "tok.json")
    learn = ("--vocab-size", "600", "--output", tokenizer)
    write = ("--output-prefix", str(folder / "text"), "--tokenizer-model", tokenizer, "--append-eod")
    for tool, words in (("train_tokenizer", learn), ("preprocess_data", write)):
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        subprocess.run(
            [sys.executable, str(REPO / f"tools/{tool}.py"), "--input", source, *words], check=True, env=environment
        )
