"""lm-eval over our models: what it says of the same weights in transformers, at every layout; and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megaforge.checkpoint.export_hf import export_hf
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from megaforge.inference.leading import led
from megaforge.inference.lm_eval_backend import _task, results
from megaforge.inference.requests import Answerer
from megaforge.tasks.lm_eval_file import check_task, is_lm_evals
from tests.data.corpus_files import bpe_tokenizer, documents
from tests.inference.text_model import restored
from tests.training.tiny import dense_arguments, make_trainer, write_dataset
from tools import evaluate

lm_eval = pytest.importorskip("lm_eval", reason="needs the eval extra")
MOST = 40
FILES = {
    "choice.yaml": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{right}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "write.yaml": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs: {until: ['. '], max_gen_toks: 9}\nmetric_list: [{metric: exact_match}, {metric: bleu}]\n",
    "text.yaml": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and tasks on made-up text: some longer than a sequence."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = bpe_tokenizer(home / "tok.json")
    (home / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--activation", "swiglu")
    prefix = write_dataset(home / "d", vocab=390)
    more = ("--fp64", "--train-iters", "3", "--lr", "3e-2", "--save", str(home / "run"))
    make_trainer(dense_arguments(prefix, "*-*-", *flags, *more)).train()
    texts = documents(40, seed=3, longest=40)
    for control in ("<|endoftext|>", "<|pad|>"):  # which transformers takes for a control token, and we for text
        texts = [text.replace(control, "").strip() for text in texts]
    texts = [text for text in texts if len(text) > 20][:12]
    records = [
        {"question": text[: 4 + 9 * n], "choices": [text[-5:], "the", "漢字 x"], "right": n % 3, "text": text}
        for n, text in enumerate(texts)
    ]
    (home / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for name, text in FILES.items():
        head = f"task: {name[:-5]}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: data.jsonl}}}}\n"
        (home / name).write_text(head + "test_split: test\n" + text)
    return home


def theirs(home: Path) -> tuple[dict[tuple[str, str], float], dict[str, Any]]:
    """What lm-eval says of the model in transformers."""
    import transformers
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    export_hf(open_source(home / "run"), home / "hf")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(home / "tok.json"), eos_token="<|endoftext|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "hf", dtype="float64").eval()
    backend = HFLM(pretrained=model, tokenizer=tokenizer, max_length=MOST, batch_size=2)
    tasks = [_task(str(home / name), TaskManager)[0] for name in FILES]
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(model=backend, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    values = {
        (task, key.removesuffix(",none")): value
        for task, own in found["results"].items()
        for key, value in own.items()
        if key.endswith(",none") and "_stderr" not in key
    }
    return values, {one["doc_id"]: one["resps"] for one in found["samples"]["write"]}


def test_transformers_gives_the_same_results(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks
) -> None:
    monkeypatch.setenv("HF_HOME", str(home / "cache"))
    monkeypatch.chdir(home)
    names, flags = list(FILES), ("--max-length", str(MOST), "--batch-size", "3")
    argv = [
        "evaluate.py",
        "--load",
        "run",
        "--device",
        "cpu",
        "--tasks",
        *names,
        *flags,
        "--json",
        "--log-samples",
        "s",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    assert evaluate.main() == 0
    found = json.loads(capsys.readouterr().out)["results"]
    ours = {(one["task"], one["metric"]): one["value"] for one in found}
    expected, written = theirs(home)
    assert len(expected) == 7 and ours.keys() == expected.keys()
    assert {key: f"{value:.6g}" for key, value in ours.items()} == {k: f"{v:.6g}" for k, v in expected.items()}
    samples = [json.loads(line) for line in (home / "s").read_text().splitlines()]
    mine = [one["written"] for one in samples if one["task"] == "write"]
    assert mine == [written[number] for number in range(12)] and len({str(text) for text in mine}) > 3
    choice = next(one for one in found if one["metric"] == "acc")
    assert choice["low"] < choice["value"] < choice["high"] and choice["higher_is_better"] is True

    [(shared, texts), *others] = ranks.run(4, split, str(home), names)
    assert {k: f"{v:.6g}" for k, v in shared.items()} == {k: f"{v:.6g}" for k, v in ours.items()}
    assert texts == mine and others == [None] * 3


def split(home: str, names: list[str]) -> tuple[dict[tuple[str, str], float], list[Any]] | None:
    """The results of two stages, each over two ranks; on the first rank."""
    trained = restored(f"{home}/run", tp=2, pp=2)
    tokenizer = trained.load_tokenizer()

    def work(ask):  # type: ignore[no-untyped-def]
        found, samples = [], []
        for name in names:
            more, own = results(f"{home}/{name}", ask, tokenizer, MOST, None)
            found, samples = found + more, samples + own
        written = [json.loads(json.dumps(one["written"])) for one in samples if one["task"] == "write"]
        return {(one.task, one.metric): one.value for one in found}, written

    return led(Answerer(trained, tokenizer, MOST, 2), work)


def test_which_tasks_are_lm_evals(home: Path, tmp_path: Path) -> None:
    assert is_lm_evals(str(home / "text.yaml")) and is_lm_evals("lm_eval/hellaswag") and not is_lm_evals("hellaswag")
    own = tmp_path / "own.yaml"
    own.write_text("task: passkey\n")
    assert not is_lm_evals(str(own))


def test_files_that_are_wrong(home: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    text = (home / "choice.yaml").read_text()
    bad.write_text(text + "metric_lst: []\n")
    with pytest.raises(UserError, match=r"bad.yaml:\d+: unknown key 'metric_lst' of a task of lm-eval; did you mean m"):
        check_task(str(bad))
    trained = restored(str(home / "run"))
    answerer = Answerer(trained, trained.load_tokenizer(), MOST)
    for content, message in (
        (text, "data file .*/data.jsonl does not exist"),
        (
            text.replace("data.jsonl", str(home / "data.jsonl")).replace("{{choices}}", "{{nothing}}"),
            "lm-eval ends with",
        ),
    ):
        bad.write_text(content)
        with pytest.raises(UserError, match=message):
            led(answerer, lambda ask: results(str(bad), ask, answerer.tokenizer, MOST, None))
    write = tmp_path / "write.yaml"
    (tmp_path / "data.jsonl").write_bytes((home / "data.jsonl").read_bytes())
    whole = (home / "write.yaml").read_text()
    for settings, message in (
        ("max_gen_toks: 40", "--max-length 40: leaves no room for a prompt before 40 new tokens"),
        ("do_sample: true, temperature: 0.5, top_p: 0.9", "generation_kwargs top_p: draws know temperature alone"),
    ):
        write.write_text(whole.replace("max_gen_toks: 9", settings))
        with pytest.raises(UserError, match=message):
            led(answerer, lambda ask: results(str(write), ask, answerer.tokenizer, MOST, None))
