"""What every script says before torch is imported: its help, and what is wrong with its arguments. One process runs
them all, for starting Python is what costs time here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.launch import REPO, environment

HELP = ("--help",)
CASES: dict[str, list[tuple[tuple[str, ...], str]]] = {  # script -> [(arguments, a word of the error)]
    "pretrain_cdrmix.py": [
        (("--print-config",), ""),
        (("--config", "cdrmix-tinny"), "did you mean cdrmix-tiny?"),
        (("--lr", "nan"), "--lr nan"),
        (("--hybrid-layer-pattern", "RX", "--data-path", "D", "--vocab-size", "64"), "'X' at position 1"),
        (("--config", "cdrmix-test", "--data-path", "D", "--tp", "3", "--vocab-size", "64"), "--tp 3"),
        (("--config", "cdrmix-test", "--data-path", "nowhere"), "nowhere.idx does not exist"),
        (("--config", "cdrmix-test", "--data-path", "D", "--tokenizer-model", "none.json"), "none.json"),
        (
            (
                "--config",
                "cdrmix-test",
            ),
            "--data-path is missing",
        ),
    ],
    "finetune_cdrmix.py": [
        ((), "there is no checkpoint to take them from"),
        (("--peft", "lorra", "--no-use-checkpoint-args"), "did you mean lora"),
    ],
    "pretrain_gpt.py": [(("--lr", "nan"), "--lr nan")],
    "pretrain_hybrid.py": [(("--micro-bach-size", "2"), "did you mean --micro-batch-size?")],
    "tools/agent.py": [
        (("--load", "x", "--task", "kv_chunk"), "did you mean kv_chunks?"),
        (("--load", "x", "--task", "kv_chunks", "--branches", "0"), "--branches 0: must be at least 1"),
        (("--load", "x", "--input", "y"), "add --question TEXT"),
        (("--load", "x", "--task", "kv_chunks", "--agent-accept-threshold", "nan"), "--agent-accept-threshold nan"),
    ],
    "tools/answer.py": [
        (("--load", "x", "--task", "kv_chunk"), "did you mean kv_chunks?"),
        (("--load", "x", "--input", "y"), "add --question TEXT"),
        (
            ("--load", "x", "--input", "y", "--question", "z", "--chunks", "3"),
            "--chunks [3]: it is read with --task, not",
        ),
    ],
    "tools/audit.py": [(("verify",), "RUN is missing"), (("verify", "nowhere"), "nowhere/audit.jsonl: cannot be read")],
    "tools/compliance_report.py": [
        (("nowhere",), "nowhere: no such directory"),
        (("--level", "highest"), "--level: invalid choice: 'highest'"),
        (("--min-score", "2"), "--min-score 2: must be"),
    ],
    "tools/compare_runs.py": [(("a",), "RUN"), (("a", "b", "--rtol", "-1"), "--rtol -1: must be at least 0")],
    "tools/reproduce.py": [
        (("none",), "give either --save DIR"),
        (("none", "--check"), "none: there is no such receipt"),
    ],
    "tools/replay.py": [(("a",), "--step"), (("a", "--step", "0"), "--step 0: must be at least 1")],
    "tools/convert_checkpoint.py": [
        (("--save", "x"), "give either --load"),
        (("--load", "x", "--save", "x.safetensors", "--tp", "2"), "--tp: one file has no layout"),
        (("--load", "x", "--save", "y", "--tp", "0"), "--tp 0: must be at least 1"),
    ],
    "tools/dashboard.py": [
        ((), "--runs"),
        (("--runs", "nowhere"), "--runs nowhere: is not a directory"),
        (("--runs", ".", "--port", "70000"), "--port 70000: must be"),
    ],
    "tools/directory_to_jsonl.py": [(("--output", "x.jsonl", "--max-file-mb", "nan"), "--max-file-mb nan")],
    "tools/evaluate.py": [
        (("--load", "x", "--input", "y", "--baseline", "bigram"), "need each other"),
        (("--load", "x", "--tasks", "passkye"), "did you mean passkey?"),
    ],
    "tools/generate.py": [
        (("--load", "x", "--prompt", "y", "--top-p", "1.5"), "--top-p 1.5: must be"),
        (("--load", "x", "--prompt-file", "none.txt"), "--prompt-file none.txt"),
        (("--load", "x", "--prompt", "y", "--speculate", "mtp"), "add --temperature 0 (it is 0.8)"),
        (("--load", "x", "--prompt", "y", "--tools", "calculater"), "did you mean calculator?"),
    ],
    "tools/make_task_tokenizer.py": [
        ((), "--output"),
        (("--tasks", "kv_chunk", "--output", "none.json"), "did you mean kv_chunks?"),
        (("--output", "words.txt"), "--output words.txt: a tokenizer of words"),
    ],
    "tools/parity.py": [
        (("--dtype", "fp8"), "fp64"),
        (("--max-ranks", "0"), "--max-ranks 0"),
        (("--lr", "-1"), "--lr"),
    ],
    "tools/phase_interface.py": [
        (("take",), "invalid choice: 'take'"),
        (("export", "--load", "x"), "--output"),
        (("config", "none.yaml", "--save", "x.yaml"), "none.yaml: cannot read it"),
        (("export", "--load", "x", "--output", "y", "--tp", "2"), "--tp: export takes"),
        (("import", "--phase4", "x", "--save", "y", "--config", "cdrmix-tinny"), "did you mean cdrmix-tiny?"),
    ],
    "tools/plan.py": [
        (("lay",), "choose a command"),
        (("memory", "--gpu", "abacus"), "abacus"),
        (("memory", "--search"), "--search needs --gpus"),
        (("params", "--num-layers", "0"), "--num-layers 0"),
        (("scaling", "--gpus", "0"), "--gpus 0"),
        (("schedule", "--pp", "0"), "--pp 0"),
        (("ladders", "--share", "2"), "--share 2"),
        (("ladders", "none", "--table", f"{REPO}/run_scripts/slurm/cdrmix.txt"), "none: there is no such job"),
        (("ladders", "--table", "none.txt"), "--table none.txt"),
        (("detect", "--output", "machine.yaml"), "must end in .json"),
        (("docs", "three"), "three: there is no such place"),
        (("data",), "there is nothing to show: give --data-schedule"),
        (("data", "--data-schedule", "corpus/standrd"), "did you mean corpus/standard?"),
        (("compression", "--micro-batch-size", "64"), "use --micro-batch-size 63 or less"),
        (("activations", "now"), "now: plan.py activations takes no arguments"),
    ],
    "tools/plot_loss.py": [(("--metrics-file", "x", "--output", "y", "--smooth", "1"), "--smooth 1: must be")],
    "tools/prepare_corpus.py": [
        (("--config", "c.yaml", "--output", "x", "--workers", "0"), "--workers 0"),
        (("--config", "none.yaml", "--output", "x"), "none.yaml"),
        (("explain", "none"), "--document"),
        (("stages", "lenght"), "did you mean length?"),
        (("explain", "none", "--url", "x"), "none: no finished corpus"),
    ],
    "tools/preprocess_data.py": [
        (("--input", "x", "--output-prefix", "y", "--tokenizer-model", "9", "--workers", "0"), "--workers 0"),
    ],
    "tools/watch_runs.py": [
        (("--once",), "--runs"),
        (("--runs", "none"), "--runs none: no such directory"),
        (("--runs", ".", "--interval", "0"), "--interval 0: must be positive"),
        (("--runs", ".", "--alerts-off", "nann"), "did you mean nan?"),
        (("--runs", ".", "--alert-command", "nobody-has-this"), "there is no program 'nobody-has-this'"),
    ],
    "tools/train_fleet.py": [
        (("--config", "none.yaml", "--output", "x"), "--config none.yaml: cannot read it"),
        (("--config", "none.yaml", "--workers", "0"), "--workers 0: must be at least 1"),
        (("show", "none"), "none: is not a directory"),
        (("show", ".", "--follow", "0"), "--follow 0: must be at least 0.1"),
    ],
    "tools/train_tokenizer.py": [(("--input", "x", "--output", "y.json", "--vocab-size", "3"), "--vocab-size 3")],
}
RUN = """
import contextlib, io, json, runpy, sys
for script, arguments in json.loads(sys.stdin.read()):
    out, err, status = io.StringIO(), io.StringIO(), None
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    loaded = [name for name in ("torch", "matplotlib") if name in sys.modules]
    print(json.dumps([script, arguments, status, out.getvalue(), err.getvalue(), loaded]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    folder = tmp_path_factory.mktemp("start")
    for suffix in (".idx", ".bin"):
        (folder / f"D{suffix}").touch()
    asked = [
        (str(REPO / script), arguments)
        for script, cases in CASES.items()
        for arguments in (HELP, ("--no-such-flag-1",), *(given for given, _ in cases))
    ]
    variables = {**environment(), "COLUMNS": "500"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(asked), cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_argument_needs_torch(outcomes: list[list[Any]]) -> None:
    assert [(script, arguments) for script, arguments, *_, loaded in outcomes if loaded] == []


def test_a_wrong_argument_is_one_error_line(outcomes: list[list[Any]]) -> None:
    expected = {(str(REPO / script), given): word for script, cases in CASES.items() for given, word in cases}
    for script, arguments, status, out, err, _ in outcomes:
        word = expected.get((script, tuple(arguments)), "")
        if tuple(arguments) in (HELP, ("--print-config",)):
            assert (status, err) == (0, "") and out, (script, arguments, err)
        else:
            assert status == 2 and err.startswith("error: ") and err.count("\n") <= 2, (script, arguments, err)
            assert word in err, (script, arguments, err)


def test_help_is_written_for_users(outcomes: list[list[Any]]) -> None:
    """No markup of our docstrings, and the default of every flag that has one."""
    helps = {os.path.basename(script): out for script, arguments, _, out, *_ in outcomes if tuple(arguments) == HELP}
    assert len(helps) == len(CASES) == 4 + len(list(Path(REPO, "tools").glob("*.py")))
    for script, text in helps.items():
        assert not re.search(r":\w+:`|``|Raises:|Args:|\[None\]|\[False\]", text), (script, text)
    for script, words in (
        ("pretrain_cdrmix.py", ("--lr X", "peak learning rate [0.0003]", "[1024]")),
        ("generate.py", ("[0.8]", "all [0]")),
        ("preprocess_data.py", ("on each rank [1]", "[text]", "[fail]")),
        ("train_tokenizer.py", ("the kind of tokenizer [bpe]",)),
    ):
        assert all(word in helps[script] for word in words), (script, helps[script])
