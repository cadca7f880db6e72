"""The commands that are swept, each with arguments that work, and the small world of files that they work on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

WORDS = "the cat sat on a mat and saw some birds fly over rivers under grey skies near old stone walls".split()
MODEL = ("--config", "cdrmix-test", "--device", "cpu", "--log-interval", "1", "--seq-length", "32")
DATA = ("--tokenizer-model", "tok.json", "--data-path", "ds_text_document")


@dataclass(frozen=True)
class Command:
    """One entry point.

    Attributes:
        script: its file, from the repository's root.
        arguments: a short run that works, in the world's folder.
        reads: the files of the world that it reads, as patterns; damaged ones are swept too.
        only_wrong: leave out values that may be legal: the command would do a lot of work with them.
        reads_nothing: it takes the flags of a run and looks at no file of theirs.
    """

    script: str
    arguments: tuple[str, ...]
    reads: tuple[str, ...] = ()
    only_wrong: bool = False
    reads_nothing: bool = False


DATASET = ("ds_text_document.bin", "ds_text_document.idx", "ds_text_document.json")
RUN = ("r/latest", "r/*/manifest.json", "r/*/*.safetensors")
TRAIN = (*MODEL, *DATA, "--train-iters")
AGENT = (
    *("--config", "cdrmix-test", "--device", "cpu", "--objective", "agent", "--agent-heads", "--memory-dim", "8"),
    *(
        "--data-path",
        "tasks://kv_chunks",
        "--tokenizer-model",
        "words.json",
        "--seq-length",
        "96",
        "--agent-chunks",
        "4",
    ),
    *("--rl-group-size", "4", "--micro-batch-size", "4", "--global-batch-size", "4", "--train-iters", "1"),
)
DECAY = ("--lr-decay-iters", "4")
PREPROCESS = ("--output-prefix", "new", "--input")
GENERATE = ("--load", "r", "--max-new-tokens", "2", "--device", "cpu")
EVALUATE = ("--load", "r", "--device", "cpu", "--input")
CORPUS = """
sources: [{name: c, files: [c.jsonl]}]
stages: [length: {minimum: 9}, exact]
shard: {tokenizer_model: tok.json}
"""
COMMANDS: dict[str, Command] = {
    "pretrain": Command("pretrain_cdrmix.py", (*TRAIN, "1", "--save", "new_run"), ("tok.json", *DATASET)),
    "continue": Command("pretrain_cdrmix.py", (*TRAIN, "3", "--load", "r", "--save", "r", *DECAY), (*RUN, *DATASET)),
    "preprocess": Command(
        "tools/preprocess_data.py", (*PREPROCESS, "c.jsonl", "--tokenizer-model", "tok.json"), ("c.jsonl", "tok.json")
    ),
    "preprocess parquet": Command(
        "tools/preprocess_data.py",
        (*PREPROCESS, "c.parquet", "--vocab-file", "vocab.json", "--merge-file", "merges.txt"),
        ("c.parquet", "vocab.json", "merges.txt"),
    ),
    "tokenizer": Command(
        "tools/train_tokenizer.py", ("--input", "c.jsonl", "--vocab-size", "300", "--output", "n.json"), ("c.jsonl",)
    ),
    "directory": Command(
        "tools/directory_to_jsonl.py", ("--input", "texts", "--output", "new.jsonl"), ("texts/0.txt",)
    ),
    "corpus": Command(
        "tools/prepare_corpus.py",
        ("--config", "corpus.yaml", "--output", "new"),
        ("corpus.yaml", "c.jsonl", "tok.json"),
    ),
    "answer": Command(
        "tools/answer.py",
        (*GENERATE, "--input", "texts/0.txt", "--question", "cat", "--chunk-tokens", "8"),
        ("tok.json", *RUN),
    ),
    "generate": Command("tools/generate.py", (*GENERATE, "--prompt", "the cat"), ("tok.json", *RUN)),
    "generate file": Command(
        "tools/generate.py",
        (
            *(*GENERATE, "--prompt-file", "p.jsonl", "--num-samples", "2", "--stop", "mat", "--json"),
            *("--chat-template", "chat.jinja"),
        ),
        ("p.jsonl", "chat.jinja"),
    ),
    "evaluate": Command("tools/evaluate.py", (*EVALUATE, "e.jsonl"), ("e.jsonl", "tok.json", *RUN)),
    "evaluate dataset": Command("tools/evaluate.py", (*EVALUATE, "ds_text_document"), (*DATASET, *RUN)),
    "evaluate tasks": Command(
        "tools/evaluate.py",
        (*("--load", "r", "--device", "cpu", "--tasks", "copying"), *("--lengths", "99", "--examples", "1")),
        ("tok.json", *RUN),
    ),
    "agent": Command(
        "tools/agent.py",
        ("--load", "a", "--device", "cpu", "--task", "kv_chunks", "--examples", "1", "--chunks", "3"),
        ("words.json", *(f"a{name[1:]}" for name in RUN)),
    ),
    "convert": Command("tools/convert_checkpoint.py", ("--load", "r", "--save", "new.safetensors"), RUN),
    "plot": Command("tools/plot_loss.py", ("--metrics-file", "m.jsonl", "--output", "new.png"), ("m.jsonl",)),
    "plot names": Command(
        "tools/plot_loss.py",
        ("--metrics-file", "m.jsonl", "--output", "new.svg", "--x-axis", "tokens", "--name", "a"),
        ("m.jsonl",),
    ),
    "plan params": Command(
        "tools/plan.py", ("params", "--config", "cdrmix-test", "--vocab-size", "300"), reads_nothing=True
    ),
    "plan schedule": Command("tools/plan.py", ("schedule", "--pp", "2", "--microbatches", "4", "--schedule", "1f1b")),
    "plan data": Command(
        "tools/plan.py",
        ("data", "--data-schedule", "corpus/standard", "--train-samples", "100"),
        only_wrong=True,
        reads_nothing=True,
    ),
    "plan memory": Command(
        "tools/plan.py",
        ("memory", "--config", "cdrmix-test", "--gpu", "h100-80g", "--vocab-size", "300"),
        only_wrong=True,
        reads_nothing=True,
    ),
    "plan scaling": Command(
        "tools/plan.py",
        ("scaling", "--config", "cdrmix-test", "--gpus", "1", "2", "--global-batch-size", "4", "--vocab-size", "300"),
        only_wrong=True,
        reads_nothing=True,
    ),
    "plan goodput": Command(
        "tools/plan.py", ("goodput", "--gpus", "64", "--mtbf-hours", "7.9"), only_wrong=True, reads_nothing=True
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
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), folder / "c.parquet")
    (folder / "p.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a cat sat on"}\n', encoding="utf-8")
    (folder / "chat.jinja").write_text(
        "{% for message in messages %}cat {{ message.content }}\n{% endfor %}", encoding="utf-8"
    )
    (folder / "corpus.yaml").write_text(CORPUS, encoding="utf-8")
    (folder / "texts").mkdir()
    for number, line in enumerate(lines[:5]):
        (folder / "texts" / f"{number}.txt").write_text(line, encoding="utf-8")
    steps = [
        ("tools/train_tokenizer.py", ("--input", "c.jsonl", "--vocab-size", "300", "--output", "tok.json")),
        (
            "tools/preprocess_data.py",
            ("--input", "c.jsonl", "--output-prefix", "ds", "--tokenizer-model", "tok.json", "--append-eod"),
        ),
        ("pretrain_cdrmix.py", (*TRAIN, "2", "--save", "r", "--metrics-file", "m.jsonl", *DECAY)),
        ("tools/make_task_tokenizer.py", ("--tasks", "kv_chunks", "--output", "words.json")),
        ("pretrain_cdrmix.py", (*AGENT, "--save", "a")),
    ]
    for script, arguments in steps:
        status = run(script, arguments, folder)
        if status:
            raise RuntimeError(f"{script} {' '.join(arguments)} ended with {status} in {folder}")
    model = json.loads((folder / "tok.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("".join(f"{merge}\n" for merge in merges), encoding="utf-8")
