"""Tasks in chunks as data: what a sample holds and what of it is learnt, whoever reads it; the words' tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.data.loader import GlobalBatchLoader
from megaforge.data.task_source import TASKS, task_of
from megaforge.data.task_tokenizer import make_task_tokenizer
from megaforge.data.tokenizer import Tokenizer, load_tokenizer
from megaforge.errors import UserError
from megaforge.registry import CHUNKED_TASKS
from megaforge.tasks.chunked import make_window, words_of

PATH = "tasks://kv_chunks"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("words") / "words.json"
    make_task_tokenizer((), str(file))
    return load_tokenizer("HuggingFaceTokenizer", str(file))


def config(*flags: str, length: int = 128) -> Config:
    line = ("--seq-length", str(length), "--train-iters", "2", "--vocab-size", "256", "--data-path", PATH)
    return parse_config([*line, *flags]).config


def test_a_sample_is_windows_and_their_answers_alone_are_learnt(tokenizer: Tokenizer) -> None:
    source = TASKS.open(config(), tokenizer)
    tokens, marks, counts = np.empty(129, np.int64), np.zeros(129, np.bool_), np.ones(128, np.float32)
    found = []
    for k in range(3):
        assert source.fill(k, tokens, marks) == 128
        counts[:] = 1
        source.weigh(k, counts)
        bounds = [*np.flatnonzero(marks), 129]
        documents = [tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
        if set(documents[-1]) == {0}:
            documents.pop()  # what fills the sample up
        assert marks[0] and len(documents) > 1
        learnt = np.flatnonzero(counts) + 1  # labels are one token ahead
        for number, document in enumerate(documents):
            one = make_window("kv_chunks", 1234, 2 * k * 129 + number, 48, 16, 8)
            said = [word for question, answers in one.asked for word in (*question, *answers)]
            assert tokenizer.decode(document) == " ".join((*one.text, *said))
            assert document[-1] == tokenizer.eod and len(document) == len(one.text) + len(said) + 1
            first = bounds[number] + len(one.text)
            answers = {first + 3 * place + 2 for place in range(len(one.asked))} | {first + len(said)}
            assert answers == {place for place in learnt if bounds[number] <= place < bounds[number + 1]}
        found.append(tokens.copy())
    assert not (found[0] == found[1]).all()


def test_samples_are_the_same_however_they_are_dealt_out(tokenizer: Tokenizer) -> None:
    def read(size: int, rank: int, ranks: int, consumed: int, workers: int) -> dict[int, list[int]]:
        loader = GlobalBatchLoader(
            TASKS.open(config(), tokenizer), BatchSchedule(4), size, rank, ranks, consumed, workers
        )
        found = {}
        for batches, _ in zip(loader, range(3 - consumed // 4), strict=False):
            for batch in batches:
                assert batch.samples is not None
                for row, k in enumerate(batch.samples.tolist()):
                    found[k] = [*batch.tokens[row].tolist(), *batch.loss_mask[row].tolist()]
        return found

    whole = read(4, 0, 1, 0, 0)
    assert sorted(whole) == list(range(12))
    assert read(2, 0, 2, 0, 0) | read(2, 1, 2, 0, 2) == whole
    assert read(1, 0, 1, 8, 2) == {k: whole[k] for k in range(8, 12)}


def test_validation_has_other_windows_and_another_seed_another_order(tokenizer: Tokenizer) -> None:
    def tokens(k: int, *flags: str, valid: bool = False) -> tuple[int, ...]:
        source = TASKS.open(config(*flags), tokenizer)
        row, marks = np.empty(129, np.int64), np.zeros(129, np.bool_)
        (source.validation() if valid else source).fill(k, row, marks)
        return tuple(row)

    assert tokens(0) == tokens(0) and len({tokens(0), tokens(0, valid=True), tokens(0, "--seed", "7")}) == 3


@pytest.mark.parametrize("name", CHUNKED_TASKS.builtin)
def test_every_word_is_one_token(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = words_of(name)
    ids = tokenizer.encode(" ".join(words))
    assert len(set(ids)) == len(words) == len(ids) and min(ids) > 1
    assert tokenizer.decode(ids) == " ".join(words) and tokenizer.encode("else") == [1]
    size = make_task_tokenizer([name], str(tmp_path / "own.json"))
    assert size == len(words) + 2 == load_tokenizer("HuggingFaceTokenizer", str(tmp_path / "own.json")).vocab_size


def test_the_tokenizer_is_the_same_for_tasks_in_any_order(tmp_path: Path) -> None:
    names = ["kv_chunks", "running_sum"]
    for number, order in enumerate((names, names[::-1])):
        make_task_tokenizer(order, str(tmp_path / f"{number}.json"))
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert json.loads((tmp_path / "0.json").read_text())["model"]["type"] == "WordLevel"
    with pytest.raises(UserError, match=r"0\.json exists"):
        make_task_tokenizer(names[:1], str(tmp_path / "0.json"))
    assert make_task_tokenizer(names[:1], str(tmp_path / "0.json"), force=True) == 100
    assert make_task_tokenizer(names, str(tmp_path / "1.json")) == 112, "the same once more"
    with pytest.raises(UserError, match=r"words\.txt: .* ends in \.json"):
        make_task_tokenizer(names, str(tmp_path / "words.txt"))
    with pytest.raises(UserError, match="did you mean running_sum"):
        make_task_tokenizer(["running_summ"], str(tmp_path / "2.json"))
    assert not (tmp_path / "2.json").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data-path", "tasks://kv_chunk"), "did you mean kv_chunks"),
        (("--data-path", "tasks://"), "'' is not a known task in chunks"),
        (("--data-path", "tasks://tracking_chunks"), "a window of 48 words has no room for 6 chunks"),
        (("--task-chunk-tokens", "5", "--task-window", "5"), "a chunk of 5 words is too short; give at least 6"),
        ((), "python tools/make_task_tokenizer.py --tasks kv_chunks --output FILE"),
    ],
)
def test_what_cannot_be_is_said_before_torch(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TASKS.check(config(*flags))


def test_a_window_without_room(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"has 73 tokens, more than --seq-length 24; give at least 72"):
        TASKS.open(config(length=24), tokenizer)
    assert TASKS.open(config(length=72), tokenizer)
    assert TASKS.open(config("--task-questions", "1", length=51), tokenizer)
    with pytest.raises(UserError, match="--task-window 15 has no room for a chunk of --task-chunk-tokens 16"):
        config("--task-window", "15")


def test_only_tasks_are_tasks() -> None:
    assert task_of(config().data) == "kv_chunks"
    assert task_of(config("--data-path", "mock://").data) is None
    assert task_of(config("--data-path", "a", "b").data) is None


def test_samples_of_an_agent_are_numbers_and_evaluations_are_of_text(tokenizer: Tokenizer) -> None:
    plays = ("--objective", "agent", "--agent-heads", "--tokenizer-model", "words.json", "--global-batch-size", "16")
    source, usual = TASKS.open(config(*plays), tokenizer), TASKS.open(config(), tokenizer)
    tokens, marks, counts = np.ones(129, np.int64), np.ones(129, np.bool_), np.ones(128, np.float32)
    assert source.fill(3, tokens, marks) == 128
    source.weigh(3, counts)
    assert not (tokens.any() or marks.any() or counts.any())
    expected = np.empty(129, np.int64)
    source.validation().fill(3, tokens, marks)
    usual.validation().fill(3, expected, marks)
    assert (tokens == expected).all() and tokens.any()
    assert source.state(5) == usual.state(5)
