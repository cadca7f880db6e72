"""``tools/evaluate.py --tasks`` as a user runs it: tables, JSON, samples, a picture, a cache; and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from megaforge.inference.requests import Scored, Writing
from megaforge.inference.task_run import BITS, TaskRun
from megaforge.tasks.example import Example
from megaforge.tasks.task_file import TaskSettings, read_task
from tests.data.corpus_files import bpe_tokenizer
from tests.inference.text_model import Bytes
from tests.training.tiny import dense_arguments, make_trainer, write_dataset
from tools import evaluate


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = bpe_tokenizer(folder / "tok.json")
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--train-iters", "1")
    prefix = write_dataset(folder / "d", vocab=load_tokenizer("HuggingFaceTokenizer", tokenizer).vocab_size)
    make_trainer(dense_arguments(prefix, "R-", *flags, "--save", str(folder / "run"))).train()
    return str(folder / "run")


def run(save: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--load", save, "--device", "cpu", *flags])
    assert evaluate.main() == 0
    return capsys.readouterr().out


def test_tasks_become_a_table_json_samples_and_a_picture(
    save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs the train extra")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("prompts: questions.jsonl\nmetrics: [contains, refusal]\nmax_new_tokens: 3\n")
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Who?", "answers": ["I", "you"]}\n\n{"prompt": "Why?"}\n')
    flags = ("--tasks", "copying", "mine.yaml", "--lengths", "120", "60", "--examples", "3", "--cache", "c.jsonl")
    shown = run(save, monkeypatch, capsys, *flags, "--plot", "p.png", "--log-samples", "s/s.jsonl")
    lines = [line.split() for line in shown.splitlines() if line.startswith(("copying", "mine"))]
    assert [(line[0], line[1]) for line in lines[:4]] == [("copying", "120")] * 2 + [("copying", "60")] * 2
    assert [line[2] for line in lines[4:]] == ["contains", "refusal", BITS] and "(described, not judged)" in shown
    samples = [json.loads(line) for line in (tmp_path / "s" / "s.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and samples[-1]["prompt"] == "Why?" and samples[-1]["answers"] == []
    assert (tmp_path / "p.png").stat().st_size > 5000
    kept = (tmp_path / "c.jsonl").read_bytes()
    found = json.loads(run(save, monkeypatch, capsys, *flags, "--json"))
    assert (tmp_path / "c.jsonl").read_bytes() == kept, "nothing was computed again"
    assert [(one["task"], one["length"], one["metric"]) for one in found["results"]][1::2][:2] == [
        ("copying", 120, BITS),
        ("copying", 60, BITS),
    ]
    assert found["iteration"] == 1 and all(one["low"] <= one["value"] <= one["high"] for one in found["results"])


def test_prompts_that_are_cut_are_said(
    save: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--tasks", "passkey", "--lengths", "200", "--examples", "2", "--max-length", "100")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--load", save, "--device", "cpu", *flags])
    assert evaluate.main() == 0
    assert "4 prompts are longer than 100 tokens (--max-length)" in capsys.readouterr().err


class Knowing:
    """A model that knows every answer."""

    def __call__(self, requests):  # type: ignore[no-untyped-def]
        likely = {one.context: one.continuation for one in requests if not isinstance(one, Writing)}
        written = [bytes(likely[one.prompt]).decode() if isinstance(one, Writing) else None for one in requests]
        return [
            Scored(-float(len(r.continuation)), True) if t is None else t
            for r, t in zip(requests, written, strict=True)
        ]


@pytest.mark.parametrize("task", ["passkey", "needle", "recall", "variable_tracking", "copying", "modular_arithmetic"])
def test_a_model_that_knows_is_right(task: str) -> None:
    results, _ = TaskRun(Knowing(), Bytes(), (700,), 4).results(read_task(task))
    assert results[0].value == results[0].high == 1.0 and results[0].low == pytest.approx(0.5101, abs=1e-4)
    assert results[1].metric == BITS and results[1].value == pytest.approx(1 / 0.6931472)


def test_questions_as_people_publish_them(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "6*7?", "answer": "It is 42.\\n#### 42"}\n' * 3)
    (tmp_path / "gsm8k.yaml").write_text("questions: q.jsonl\nmetrics: [last_number]\n")
    task = read_task(str(tmp_path / "gsm8k.yaml"))
    assert task.examples_of(0, 2, len) == [Example("Question: 6*7?\nAnswer:", ("42",))] * 2
    assert (task.name, task.judged_by) == ("gsm8k", ("last_number",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: passkey\nlenghts: [3]", "t.yaml:2: the task: unknown key 'lenghts'; did you mean lengths"),
        ("task: passkye", "'passkye' is not a known task"),
        ("lengths: [3]", "give either task .* or prompts"),
        ("task: recall\nprompts: q.jsonl", "give either task .* or prompts"),
        ("prompts: q.jsonl\nlengths: [8]", "leave them out beside prompts"),
        ("prompts: q.jsonl\nquestions: q.jsonl", "give either task .* or prompts"),
        ("questions: gone.jsonl", "gone.jsonl: it cannot be read"),
        ("questions: q.jsonl", "q.jsonl: line 1: its question is empty"),
        ("prompts: gone.jsonl", "gone.jsonl: cannot be read"),
        ("prompts: q.jsonl", 'q.jsonl: line 1 is no example; give {"prompt"'),
        ("task: recall\nmetrics: [exact]", "'exact' is not a known metric"),
        ("task: [", "t.yaml:1: this is not YAML"),
        ("task: recall\nlengths: [0]", "lengths: must be at least 1, got '0'"),
    ],
)
def test_bad_task_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    (tmp_path / "q.jsonl").write_text('{"prompt": "", "answer": 3}\n')
    with pytest.raises(UserError, match=message):
        read_task(str(tmp_path / "t.yaml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "passkey", "--part", "valid"), "--part valid: it goes with --input, not with --tasks"),
        (("--input", "x", "--lengths", "3", "4"), "--lengths 3 4: it goes with --tasks, not with --input"),
        (("--tasks", "passkye"), "did you mean passkey"),
        (("--tasks", "none.yaml"), "--tasks none.yaml: cannot be read"),
        (("--tasks", "copying", "--plot", "x.gif"), "--plot x.gif: its ending"),
        (("--tasks", "copying", "--input", "x"), "--input: not allowed with argument --tasks"),
        ((), "one of the arguments --input --tasks is required"),
    ],
)
def test_bad_flags(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.parse_arguments(["--load", "x", *flags])


def test_a_task_that_says_more_than_its_name(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("task: needle\nlengths: [300, 600]\nexamples: 2\nstop: [END]\nseed: 4\n")
    task = read_task(str(tmp_path / "long.yaml"))
    assert task == TaskSettings("needle", "needle", None, (), (300, 600), 2, None, ("END",), 4)
    assert task.judged_by == ("contains",) and task.stops == ("END",)
    results, samples = TaskRun(Knowing(), Bytes(), (50,), 9).results(task)
    assert [(one.length, one.examples) for one in results[::2]] == [(300, 2), (600, 2)] and len(samples) == 4
