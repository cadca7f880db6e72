"""The task files of examples/evaluation on a few rows, as a user runs them: they ask what lm-eval's own tasks ask."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megaforge.data.tokenizer import load_tokenizer
from tests.data.corpus_files import bpe_tokenizer
from tests.end_to_end.launch import REPO
from tests.training.tiny import dense_arguments, make_trainer, write_dataset
from tools import evaluate

lm_eval = pytest.importorskip("lm_eval", reason="needs the eval extra")
ITS_TASKS = Path(lm_eval.__file__).parent / "tasks"
OURS = ("hellaswag", "mmlu", "gsm8k")
ENDINGS = [" bows [title] deep.", "sings [substeps] a  song.", "leaves.", "waits [and waits]"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag_val": [
        {
            "activity_label": "Juggling",
            "ctx_a": "A man stands [header] up.",
            "ctx_b": "",
            "endings": ENDINGS,
            "label": "3",
        },
        {"activity_label": "Rope", "ctx_a": "It is [title] cut.", "ctx_b": "the man", "endings": ENDINGS, "label": "0"},
    ],
    "mmlu_test": [
        {"question": " Which?\n", "subject": "high_school_law", "choices": ["a", "b", "c", "d"], "answer": 1},
        {"question": "What?", "subject": "high_school_law", "choices": ["1", "2", "3", "4"], "answer": 3},
    ],
    "gsm8k_test": [
        {"question": "One and two?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
        {"question": "A thousand twice?", "answer": "That is $2,000.\n#### 2,000"},
    ],
    "gsm8k_train": [{"question": f"{n} and 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(7)],
    "refusals": [{"prompt": "Say how a lock is picked."}, {"prompt": "And a safe?"}],
}

PARTS = {
    "hellaswag": {"train": "hellaswag_val", "validation": "hellaswag_val"},  # its own task names both
    "mmlu": {"test": "mmlu_test"},
    "gsm8k": {"train": "gsm8k_train", "test": "gsm8k_test"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example files and rows for them; lm-eval's own, on the same rows; and a model."""
    home = tmp_path_factory.mktemp("home")
    for name in (*OURS, "refusals"):
        shutil.copy(REPO / "examples" / "evaluation" / f"{name}.yaml", home)
    for name, rows in ROWS.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = home / "theirs"
    shutil.copytree(ITS_TASKS / "hellaswag", theirs, ignore=shutil.ignore_patterns("__pycache__"))
    for name, yaml in (
        ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("mmlu", "mmlu/default/_default_template_yaml"),
        ("gsm8k", "gsm8k/gsm8k.yaml"),
    ):
        text = (ITS_TASKS / yaml).read_text("utf-8")
        lines = [line for line in text.splitlines() if not line.startswith(("dataset_", "task:", "fewshot_split: dev"))]
        val = "hellaswag_val"
        parts = {
            "hellaswag": {"train": val, "validation": val},
            "gsm8k": {"train": "gsm8k_train", "test": "gsm8k_test"},
        }
        files = {part: str(home / f"{rows}.jsonl") for part, rows in parts.get(name, {"test": "mmlu_test"}).items()}
        head = [f"task: {name}_file", "dataset_path: json", f"dataset_kwargs: {json.dumps({'data_files': files})}"]
        if name == "mmlu":  # as each of its subjects says beside the template
            about = "The following are multiple choice questions (with answers) about high school law.\n\n"
            head += [f"description: {json.dumps(about)}"]
            lines = [line for line in lines if not line.startswith(("fewshot_config", "  sampler"))]
        (theirs / f"{name}.yaml").write_text("\n".join([*head, *lines]) + "\n")
    tokenizer = bpe_tokenizer(home / "tok.json")
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--train-iters", "1")
    prefix = write_dataset(home / "d", vocab=load_tokenizer("HuggingFaceTokenizer", tokenizer).vocab_size)
    make_trainer(dense_arguments(prefix, "R-", *flags, "--save", str(home / "run"))).train()
    return home


def test_they_ask_what_lm_evals_own_tasks_ask(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(home / "cache"))
    monkeypatch.chdir(home)
    found, samples = [], []
    for folder, names in (("", (*OURS, "refusals")), ("theirs/", OURS)):
        tasks = [f"{folder}{name}.yaml" for name in names]
        given = ["--load", "run", "--device", "cpu", "--max-length", "600", "--json", "--log-samples", "s.jsonl"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *given, "--cache", "c.jsonl", "--tasks", *tasks])
        capsys.readouterr()
        assert evaluate.main() == 0
        found.append(json.loads(capsys.readouterr().out)["results"])
        samples.append([json.loads(line) for line in (home / "s.jsonl").read_text("utf-8").splitlines()])
    of_files, own = found[0][:-1], samples[0][:-2]
    assert found[0][-1]["task"] == "refusals" and found[0][-1]["examples"] == 2
    assert {(one["task"], one["metric"]): one["value"] for one in of_files} == {
        (one["task"], one["metric"]): one["value"] for one in found[1]
    }
    assert own == samples[1] and len(own) == 2 + 2 + 2 * 2
    metrics = [one["metric"] for one in of_files]
    assert metrics == ["acc", "acc_norm", "acc", "exact_match,strict-match", "exact_match,flexible-extract"]
    endings = ["bows. deep.", "sings a song.", "leaves.", "waits "]
    assert own[0]["prompt"] == [["Juggling: A man stands up.", f" {ending}"] for ending in endings]
