"""A quantizer that a user adds as one file: trained by the real script, and continued at another layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.launch import REPO, records, run

TOY = REPO / "tests" / "toys" / "int8_linear.py"


def losses(path: Path) -> dict[int, float]:
    return {record["iteration"]: record["loss"] for record in records(path) if record["kind"] == "step"}


def test_a_quantizer_is_one_file(flags: tuple[str, ...], tmp_path: Path) -> None:
    recipe = {"base": "cdrmix-test", "model": {"converters": ["int8"]}, "training": {"extensions": [str(TOY)]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    rest = (*flags[2:], "--train-iters", "4", "--lr", "1e-2", "--save-interval", "2")
    line = ("pretrain_cdrmix.py", "--config", str(tmp_path / "recipe.yaml"), *rest)
    found = []
    for ranks, layout in (
        (4, ("--tp", "2", "--pp", "2", "--sequence-parallel")),
        (1, ("--load", str(tmp_path / "4" / "step_0000002"))),
    ):
        metrics = tmp_path / f"{ranks}.jsonl"
        outcome = run(ranks, *line, *layout, "--save", str(tmp_path / str(ranks)), "--metrics-file", str(metrics))
        assert outcome.status == 0, outcome.err
        assert len(re.findall(r"int8: \d\d matrices", outcome.err)) == 1, "of the model that trains alone"
        found.append(losses(metrics))
    assert list(found[0]) == [1, 2, 3, 4] and list(found[1]) == [3, 4]
    # A difference in the last bit may become another code, 1/127 of a token's largest value.
    assert found[1] == pytest.approx({step: found[0][step] for step in (3, 4)}, rel=1e-4)
