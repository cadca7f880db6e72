"""Texts that a run's model writes at its evaluations: the likeliest tokens, the same at any layout, kept in the run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from megaforge.errors import UserError
from megaforge.monitor.samples import WrittenText, newest_samples
from megaforge.training import sampling
from megaforge.training.trainer import Trainer
from tests.training.test_zero_run import run_as_rank
from tests.training.tiny import VOCAB, arguments, make_config, make_trainer, write_dataset

PROMPTS = ("1 2 3", "60")
ASKED = ("--generate-prompts", *PROMPTS, "--generate-tokens", "4", "--eval-iters", "1", "--eval-interval", "1")
LEARNED = (
    *("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "24"),
    *("--generate-tokens", "22"),
)
SHORT = ("--fp64", "--train-iters", "2", "--micro-batch-size", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


@torch.no_grad()
def likeliest(trainer: Trainer, prompt: str, count: int) -> str:
    """Each token by the whole text before it."""
    tokens, model = [int(word) for word in prompt.split()], trainer.model.eval()
    for _ in range(count):
        tokens.append(int(model.logits(torch.tensor([tokens]), last_only=True)[0, -1][: VOCAB + 1].argmax()))
        if tokens[-1] == VOCAB:  # the end of a document
            return " ".join(map(str, tokens[len(prompt.split()) : -1]))
    return " ".join(map(str, tokens[len(prompt.split()) :]))


def test_the_same_texts_at_any_layout(ranks, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(arguments(data, *SHORT, *ASKED, "--save", str(tmp_path / "alone")))
    trainer.train()
    found = newest_samples(tmp_path / "alone", 9)
    assert [(one.iteration, one.prompt) for one in found] == [(i, prompt) for i in (2, 1) for prompt in PROMPTS[::-1]]
    assert [one.text for one in found[:2]] == [likeliest(trainer, prompt, 4) for prompt in PROMPTS[::-1]]
    assert f"sample after 2: '1 2 3' -> {found[1].text!r}" in capsys.readouterr().err
    for number, layout in enumerate((("--tp", "2", "--sequence-parallel"), ("--ep", "2", "--zero", "1"))):
        save = tmp_path / str(number)
        ranks.run(2, run_as_rank, arguments(data, *SHORT, *ASKED, *layout, "--save", str(save)))
        assert newest_samples(save, 9) == found, layout


def test_texts_are_shown_without_a_directory_and_without_a_disk(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(arguments(data, *SHORT, *ASKED, "--train-iters", "1")).train()

    def full(directory: Path, written: WrittenText) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampling, "append_sample", full)
    with caplog.at_level(logging.WARNING):
        make_trainer(arguments(data, *SHORT, *ASKED, "--train-iters", "1", "--save", str(tmp_path))).train()
    assert "samples.jsonl: a sample could not be kept" in caplog.text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--generate-prompts", ""), "--generate-prompts '': the value is empty"),
        (("--generate-prompts", "7", "7"), "--generate-prompts '7': stands there twice"),
        (("--generate-prompts", " "), "--generate-prompts ' ': the tokenizer makes no token of it"),
        (("--generate-tokens", "0"), "--generate-tokens 0: must be at least 1"),
        (LEARNED, "'1 2 3': its 3 tokens and --generate-tokens 22 are more than the 24 positions"),
        (("--data-path", "progressions://64", "--vocab-size", "64"), "the run has no tokenizer: add --tokenizer-model"),
    ],
)
def test_prompts_that_cannot_be(data: str, flags: tuple[str, ...], said: str) -> None:
    line = arguments(data, *SHORT, *ASKED, *flags)
    if "--vocab-size" in flags:
        line = [
            word for word in line if word not in ("--tokenizer-type", "NullTokenizer", "--tokenizer-model", str(VOCAB))
        ]
    with pytest.raises(UserError, match=said):
        make_trainer(line)
    assert make_config(arguments(data, *ASKED)).generation.generate_prompts == PROMPTS
