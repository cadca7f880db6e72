"""A run made again from its receipt is the same to the bit; what is not as it was is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaforge.data.sidecar import digest_of
from megaforge.errors import UserError
from megaforge.monitor.provenance import source_digest
from megaforge.parallel.context import ParallelContext
from megaforge.training.receipt import RECEIPT_FILE
from megaforge.verification.reproduce import compare, differences_of_machine, read_receipt, reproduce
from tests.training.tiny import dense_arguments, make_trainer, write_dataset
from tools import reproduce as tool

Receipt = dict[str, Any]


def alone(_: object) -> ParallelContext:
    return ParallelContext.single()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began with another's weights, paused once, and is complete."""
    folder = tmp_path_factory.mktemp("receipts")
    prefix = write_dataset(folder / "data")
    evaluated = ("--eval-iters", "1", "--eval-interval", "3")
    make_trainer(dense_arguments(prefix, "*-", "--save", str(folder / "start"), "--train-iters", "2")).train()
    first = ("--load", str(folder / "start"), "--finetune")
    save = folder / "run"
    make_trainer(dense_arguments(prefix, "*-", "--save", str(save), *evaluated, *first, "--exit-interval", "2")).train()
    paused = json.loads((save / RECEIPT_FILE).read_text())
    assert paused["results"]["complete"] is False and paused["results"]["iteration"] == 2
    with pytest.raises(UserError, match="before it was complete"):
        reproduce(paused, folder / "again", alone)
    later = ("--load", str(save), "--metrics-file", str(folder / "metrics.jsonl"))
    make_trainer(dense_arguments(prefix, "*-", "--save", str(save), *evaluated, *later)).train()
    return save


def test_a_run_is_made_again_to_the_bit(run: Path, tmp_path: Path, capsys: Any) -> None:
    metrics = (run.parent / "metrics.jsonl").read_bytes()
    receipt = read_receipt(run)
    assert receipt["started_from"]["path"] == "step_0000002" and receipt["results"]["iteration"] == 6
    assert reproduce(receipt, tmp_path / "again", alone) == 0
    said = capsys.readouterr().out
    assert "NOT" not in said and "the same: all 1 files of step_0000006" in said and "the same: loss" in said
    assert (run.parent / "metrics.jsonl").read_bytes() == metrics  # it writes into its own directory alone
    ours = read_receipt(tmp_path / "again")
    assert ours["results"]["loss"] == receipt["results"]["loss"] and ours["results"]["evaluation"]["iteration"] == 6
    with pytest.raises(UserError, match="it is not empty"):
        reproduce(receipt, tmp_path / "again", alone)


CHANGED: dict[str, tuple[Callable[[Receipt], object], str]] = {
    "a loss": (lambda r: r["results"].update(loss=1.0), "loss "),
    "a file": (lambda r: r["results"]["checkpoint"]["files"].update(x="0"), "x of step_0000006"),
    "data": (lambda r: r["data"].update(digest="0"), "data and tokenizer"),
    "an evaluation": (lambda r: r["results"].update(evaluation=None), "evaluation"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_not_the_same_is_named(run: Path, name: str) -> None:
    then, now = read_receipt(run), read_receipt(run)
    assert all(same for _, same in compare(then, now))
    change, text = CHANGED[name]
    change(then)
    apart = [said for said, same in compare(then, now) if not same]
    assert len(apart) == 1 and apart[0].startswith(text)
    then["results"]["checkpoint"]["encrypted"] = True
    assert not any("step_" in said for said, _ in compare(then, now))


def test_another_machine_is_named(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = read_receipt(run)
    assert differences_of_machine(receipt) == [] and len(source_digest()) == 64
    receipt["environment"]["packages"]["torch"] = "1.0"
    receipt["environment"]["python"] = "2.7"
    receipt["code"]["commit"] = "c"
    found = differences_of_machine(receipt)
    assert [one.split(" was")[0] for one in found] == ["code: commit", "python", "torch"]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", str(run / RECEIPT_FILE), "--check"])
    assert tool.main() == 0 and "as they were" in capsys.readouterr().out


def test_bad_receipts_are_named(run: Path, tmp_path: Path) -> None:
    good = (run / RECEIPT_FILE).read_text()
    file = tmp_path / RECEIPT_FILE
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a receipt of version 1"),
        (good.replace('"train_iters": 6', '"train_iters": 7'), "the receipt was altered"),
        (json.dumps({"format": "megaforge-receipt", "version": 1, "code": {}}), "lacks configuration, data"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_receipt(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_receipt(tmp_path / "none")
    receipt = read_receipt(run)
    assert digest_of(receipt["configuration"]["values"]) == receipt["configuration"]["digest"]
    receipt["layout"]["world"] = 3
    with pytest.raises(UserError, match="had 3 ranks, and 1 was started.*--nproc-per-node 3"):
        reproduce(receipt, tmp_path / "x", alone)
    receipt = read_receipt(run)
    receipt["started_from"]["directory"] = str(tmp_path)
    with pytest.raises(UserError, match="step_0000002: the run began with this checkpoint"):
        reproduce(receipt, tmp_path / "x", alone)
