"""An objective, a loss term and a callback that a user adds as one file each: trained by the real script, and continued
at another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.launch import REPO, records, run

TOYS = [str(REPO / "tests" / "toys" / f"{name}.py") for name in ("focal", "squares", "slow_gradients")]


def test_each_is_one_file(flags: tuple[str, ...], tmp_path: Path) -> None:
    chosen = {"objective": "focal", "loss_terms": ["squares"], "callbacks": ["slow_gradients"], "extensions": TOYS}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"base": "cdrmix-test", "training": chosen}))
    more = ("--train-iters", "5", "--lr", "4e-3", "--lr-decay-style", "constant", "--save-interval", "3")
    line = ("pretrain_cdrmix.py", "--config", str(tmp_path / "recipe.yaml"), *flags[2:], *more)
    found = []
    for ranks, layout in (
        (2, ("--pp", "2")),
        (1, ("--load", str(tmp_path / "2" / "step_0000003"))),
    ):
        metrics = tmp_path / f"{ranks}.jsonl"
        outcome = run(ranks, *line, *layout, "--save", str(tmp_path / str(ranks)), "--metrics-file", str(metrics))
        assert outcome.status == 0, outcome.err
        found.append([record for record in records(metrics) if record["kind"] == "step"])
    whole, resumed = found
    assert "the learning rate goes on multiplied by 0.5 (halving)" in outcome.out + outcome.err
    assert [step["lr"] for step in whole] == [4e-3, 4e-3, 2e-3, 2e-3, 1e-3]
    assert [step["halvings"] for step in whole] == [0, 1, 1, 2, 2], "the callback comes before the record"
    for step in whole:
        # For the bulk of labels p is small, so that the loss is nearly the cross-entropy.
        assert step["loss"] ** 2 < step["squares"] and step["loss"] > 4
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert ours["lr"] == theirs["lr"]
        for name in ("loss", "squares", "grad_norm", "load_balance_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
