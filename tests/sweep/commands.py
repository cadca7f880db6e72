"""The commands that are swept, each with arguments that work, and the small world of files that they work on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WORDS = "the cat sat on a mat and saw some birds fly over rivers under grey skies near old stone walls".split()
MODEL = ("--config", "cdrmix-test", "--device", "cpu", "--log-interval", "1", "--seq-length", "32")
DATA = ("--tokenizer-model", "tok.json", "--data-path", "ds_text_document")


@dataclass(frozen=True)
class Command:
    """One entry point.

    Attributes:
        script: its file, from the repository's root.
        arguments: a short run that works, in the world's folder.
        only_wrong: leave out values that may be legal: the command would do a lot of work with them.
        reads_nothing: it takes the flags of a run and looks at no file of theirs.
    """

    script: str
    arguments: tuple[str, ...]
    only_wrong: bool = False
    reads_nothing: bool = False


COMMANDS: dict[str, Command] = {
    "pretrain": Command("pretrain_cdrmix.py", (*MODEL, *DATA, "--train-iters", "1", "--save", "new_run")),
    "preprocess": Command(
        "tools/preprocess_data.py", ("--input", "c.jsonl", "--output-prefix", "new", "--tokenizer-model", "tok.json")
    ),
    "tokenizer": Command(
        "tools/train_tokenizer.py", ("--input", "c.jsonl", "--vocab-size", "300", "--output", "n.json")
    ),
    "directory": Command("tools/directory_to_jsonl.py", ("--input", "texts", "--output", "new.jsonl")),
    "generate": Command(
        "tools/generate.py", ("--load", "r", "--prompt", "the cat", "--max-new-tokens", "2", "--device", "cpu")
    ),
    "evaluate": Command("tools/evaluate.py", ("--load", "r", "--input", "e.jsonl", "--device", "cpu")),
    "convert": Command("tools/convert_checkpoint.py", ("--load", "r", "--save", "new.safetensors")),
    "plot": Command("tools/plot_loss.py", ("--metrics-file", "m.jsonl", "--output", "new.png")),
    "plan params": Command(
        "tools/plan.py", ("params", "--config", "cdrmix-test", "--vocab-size", "300"), reads_nothing=True
    ),
    "plan schedule": Command("tools/plan.py", ("schedule", "--pp", "2", "--microbatches", "4", "--schedule", "1f1b")),
    "plan memory": Command(
        "tools/plan.py", ("memory", "--config", "cdrmix-test", "--vocab-size", "300", "--gpu", "h100-80g"), True, True
    ),
    "parity": Command("tools/parity.py", ("--layouts", "dp2", "--dtype", "fp64"), only_wrong=True),
}


def make_world(folder: Path, run: Callable[[str, tuple[str, ...], Path], int]) -> None:
    """Fills ``folder`` with a corpus, a tokenizer, a dataset, a run and its metrics, by the commands themselves.

    Args:
        run: (script, arguments, working directory) -> status.
    """
    draw = random.Random(1)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) + ".\n" for _ in range(80)]
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    (folder / "e.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:3]), encoding="utf-8")
    (folder / "texts").mkdir()
    for number, line in enumerate(lines[:5]):
        (folder / "texts" / f"{number}.txt").write_text(line, encoding="utf-8")
    steps = [
        ("tools/train_tokenizer.py", ("--input", "c.jsonl", "--vocab-size", "300", "--output", "tok.json")),
        (
            "tools/preprocess_data.py",
            ("--input", "c.jsonl", "--output-prefix", "ds", "--tokenizer-model", "tok.json", "--append-eod"),
        ),
        ("pretrain_cdrmix.py", (*MODEL, *DATA, "--train-iters", "2", "--save", "r", "--metrics-file", "m.jsonl")),
    ]
    for script, arguments in steps:
        status = run(script, arguments, folder)
        if status:
            raise RuntimeError(f"{script} {' '.join(arguments)} ended with {status} in {folder}")
