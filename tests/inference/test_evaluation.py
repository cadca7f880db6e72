"""Text to evaluate: the same reader as every tool's, and nothing to predict is an error."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from megaforge.config.cli import parse_config
from megaforge.data.indexed_dataset import IndexedDataset
from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from megaforge.inference.evaluation import evaluate_stream, is_text, read_dataset, read_text, trained_on
from megaforge.inference.restore import TrainedModel, load_trained_model
from megaforge.training.metrics import EvaluationMetrics
from tests.data.datasets import write_sidecar
from tests.training.tiny import VOCAB, arguments, make_trainer, write_dataset
from tools.evaluate import fit_baseline, load_stream, parse_arguments, report

pytest.importorskip("orjson", reason="needs the data extra")


def test_documents_end_with_the_end_of_document_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("NullTokenizer", "50")
    for name in ("a.jsonl", "A.JSONL", "a.ndjson", "a.json", "a"):
        path = tmp_path / name
        path.write_text('{"text": "1 2"}\n{"text": ""}\n{"text": "3"}\n')
        stream = read_text(str(path), tokenizer)
        assert stream.tokens.tolist() == [1, 2, 50, 3, 50] and stream.documents == 2
        np.testing.assert_array_equal(stream.document_starts, [0, 3])
        assert stream.text_bytes == 4


@pytest.mark.parametrize(("text", "message"), [("1", "nothing to predict"), (" \n", "no text"), ("", "no text")])
def test_fewer_than_two_tokens_are_refused(text: str, message: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("NullTokenizer", "50")
    tokenizer.eod = None
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--input {path}: .*{message}"):
        read_text(str(path), tokenizer)


def test_files_are_told_from_datasets(tmp_path: Path) -> None:
    (tmp_path / "d.idx").touch()
    (tmp_path / "d").touch()
    (tmp_path / "notes").touch()
    assert [is_text(str(tmp_path / name)) for name in ("d", "d.idx", "d.bin", "notes", "missing.JSONL.gz", "x")] == [
        *(False, False, False, True, True, False)
    ]


def evaluated(trained: TrainedModel, prefix: str, part: str | None = None) -> EvaluationMetrics:
    return evaluate_stream(trained, read_dataset(prefix, trained, part), seq_length=24, batch_size=8)


def test_a_checkpoint_is_evaluated_on_its_own_held_out_documents_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own validation loss, to the last digits, from another directory and after the data were moved."""
    monkeypatch.chdir(tmp_path)
    other = write_dataset(tmp_path / "other", seed=5)
    write_dataset(Path("data"))
    flags = ("--eval-iters", "1000", "--fp64", "--save", str(tmp_path / "run"), "--train-iters", "1")
    trainer = make_trainer(arguments("data", *flags, "--moe-expert-capacity-factor", "0.5"))
    trainer.train()
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"data{suffix}").rename(tmp_path / f"elsewhere/moved{suffix}")
    trained = load_trained_model(str(tmp_path / "run"), device="cpu")
    moved = str(tmp_path / "elsewhere/moved")
    found, expected = evaluated(trained, moved), trainer.last_evaluation
    assert expected is not None and found.tokens == expected.tokens
    assert found.nats == pytest.approx(expected.nats, rel=1e-12)
    whole, training = (evaluated(trained, moved, part).tokens for part in ("all", "train"))
    assert whole == training + found.tokens + 1
    assert evaluated(trained, other).tokens == IndexedDataset(other).num_tokens - 1, "of a foreign dataset everything"

    flagged = parse_arguments(["--load", "r", "--input", moved, "--baseline", "bigram", "--train-data", moved])
    fit_baseline(flagged, trained, read_dataset(moved, trained))  # fitted on train, measured on valid
    for part, data in (("train", moved), ("all", moved), (None, other)):
        flagged.part, flagged.input, flagged.train_data = part, data, data
        with pytest.raises(UserError, match="the baseline would know the answers"):
            fit_baseline(flagged, trained, read_dataset(data, trained, part))


def measured(save: str, prefix: str, tp: int, pp: int) -> tuple[float, float]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    # The pool's ranks have met already.
    with mock.patch.dict(os.environ, launched), mock.patch("megaforge.inference.restore.initialize"):
        trained = load_trained_model(save, tp=tp, pp=pp, device="cpu")
    found = evaluate_stream(trained, read_dataset(prefix, trained), seq_length=24, batch_size=2)
    return found.nats, found.correct or 0


@pytest.mark.parametrize("world,tp,pp", [(2, 1, 2), (4, 2, 2), (4, 1, 2)])
def test_every_layout_measures_the_same(ranks, tmp_path: Path, world: int, tp: int, pp: int) -> None:
    """Batches of two windows on each stage at once, the last of them shorter; with dp, an uneven number of batches."""
    save, prefix = str(tmp_path / "run"), write_dataset(tmp_path / "d")
    make_trainer(arguments(prefix, "--fp64", "--save", save, "--train-iters", "1")).train()
    nats, correct = measured(save, prefix, 1, 1)
    for found in ranks.run(world, measured, save, prefix, tp, pp):
        assert found == (pytest.approx(nats, rel=1e-12), correct)


def test_a_layout_that_does_not_divide_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--pp 2 does not divide the 1 ranks"):
        load_trained_model("nowhere", pp=2)
    with pytest.raises(UserError, match="--tp 2 does not divide the 1 ranks of a pipeline stage"):
        load_trained_model("nowhere", tp=2)


def test_a_checkpoint_of_before_split_orders_is_evaluated_on_its_ranges(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d")
    save = str(tmp_path / "run")
    make_trainer(arguments(prefix, "--split-order", "sequential", "--save", save, "--train-iters", "1")).train()
    trained = load_trained_model(save, device="cpu")
    expected = evaluated(trained, prefix)
    for name in ("split_order", "sources"):
        del trained.meta["state"]["data"][name]
    del trained.meta["config"]["data"]["split_order"]
    assert evaluated(trained, prefix) == expected


def test_a_baseline_is_not_fitted_on_the_text_its_dataset_was_made_of(tmp_path: Path) -> None:
    save, prefix = str(tmp_path / "run"), write_dataset(tmp_path / "d")
    make_trainer(arguments(prefix, "--save", save, "--train-iters", "1")).train()
    trained = load_trained_model(save, device="cpu")
    text, other = tmp_path / "t.txt", write_dataset(tmp_path / "o", seed=3)
    text.write_text("1 2 3")
    digest = hashlib.sha256(b"1 2 3").hexdigest()
    write_sidecar(other, tokenizer={}, sources=[{"path": "gone", "sha256": digest}])
    flags = parse_arguments(["--load", "r", "--input", str(text), "--baseline", "bigram", "--train-data", other])
    stream = load_stream(flags, trained)
    with pytest.raises(UserError, match="the baseline would know the answers"):
        fit_baseline(flags, trained, stream)


def test_text_is_ended_as_the_training_documents_were(tmp_path: Path) -> None:
    save, prefix = str(tmp_path / "run"), write_dataset(tmp_path / "d")
    tokenizer = load_tokenizer("NullTokenizer", str(VOCAB))
    described = {"type": "NullTokenizer", "fingerprint": tokenizer.fingerprint, "vocab_size": VOCAB + 1, "eod": VOCAB}
    write_sidecar(prefix, tokenizer=described, settings={"append_eod": False, "json_key": "body"})
    make_trainer(arguments(prefix, "--save", save, "--train-iters", "1")).train()
    trained = load_trained_model(save, device="cpu")
    text = tmp_path / "t.jsonl"
    text.write_text('{"body": "1 2"}\n{"body": "3"}\n')
    stream = load_stream(parse_arguments(["--load", "r", "--input", str(text)]), trained)
    assert stream.tokens[:].tolist() == [1, 2, 3]
    write_sidecar(prefix, tokenizer=described, settings={"append_eod": True})
    with pytest.raises(UserError, match="--append-eod is True in .* and was False"):
        load_stream(parse_arguments(["--load", "r", "--input", prefix]), trained)


@pytest.mark.parametrize("masked", [False, True])
def test_what_in_run_validation_leaves_out_is_said(
    masked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save, prefix = str(tmp_path / "run"), write_dataset(tmp_path / "d")
    flags = ("--eod-mask-loss",) if masked else ()
    make_trainer(arguments(prefix, *flags, "--save", save, "--train-iters", "1")).train()
    trained = load_trained_model(save, device="cpu")
    stream = read_dataset(prefix, trained)
    capsys.readouterr()
    report(parse_arguments(["--load", save, "--input", prefix]), trained, stream, {"ours": evaluated(trained, prefix)})
    assert ("--eod-mask-loss" in capsys.readouterr().out) == masked


def test_a_run_on_a_source_of_ones_own_was_trained_on_no_dataset() -> None:
    """Its state is its own, and names no digests."""
    config = parse_config(["--data-path", "counting://3"]).config
    trained = SimpleNamespace(data={"step": 3, "consumed_samples": 8}, config=config, path="r")
    assert not trained_on("a" * 64, trained)  # type: ignore[arg-type]
