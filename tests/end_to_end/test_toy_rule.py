"""An update rule that a user adds as one file: trained by the real script, and continued at another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.launch import REPO, records, run

TOY = REPO / "tests" / "toys" / "centred_descent.py"


def test_an_update_rule_is_one_file(flags: tuple[str, ...], tmp_path: Path) -> None:
    recipe = {"base": "cdrmix-test", "optimizer": {"optimizer": "centred"}, "training": {"extensions": [str(TOY)]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    rest = (*flags[2:], "--train-iters", "4", "--lr", "1e-3", "--save-interval", "2")
    line = ("pretrain_cdrmix.py", "--config", str(tmp_path / "recipe.yaml"), *rest)
    found = []
    for ranks, layout in (
        (4, ("--tp", "2", "--pp", "2", "--sequence-parallel")),
        (2, ("--zero", "1", "--load", str(tmp_path / "4" / "step_0000002"))),
    ):
        metrics = tmp_path / f"{ranks}.jsonl"
        outcome = run(ranks, *line, *layout, "--save", str(tmp_path / str(ranks)), "--metrics-file", str(metrics))
        assert outcome.status == 0, outcome.err
        found.append({record["iteration"]: record["loss"] for record in records(metrics) if record["kind"] == "step"})
    assert list(found[0]) == [1, 2, 3, 4] and list(found[1]) == [3, 4]
    assert found[1] == pytest.approx({step: found[0][step] for step in (3, 4)}, rel=1e-5)
    other = run(1, *line, "--optimizer", "sgd", "--load", str(tmp_path / "4" / "step_0000002"), "--save", str(tmp_path))
    assert other.status == 2 and "is that of --optimizer centred" in other.err and "--no-load-optim" in other.err
