"""A quantizer that a user adds as one file: trained by the real script, at two layouts, with a stop between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.launch import REPO, records, run

TOY = REPO / "tests" / "toys" / "int8_linear.py"
LAYOUT = ("--tp", "2", "--pp", "2", "--sequence-parallel")


def losses(path: Path) -> list[float]:
    return [record["loss"] for record in records(path) if record["kind"] == "train"]


def test_a_quantizer_is_one_file(flags: tuple[str, ...], tmp_path: Path) -> None:
    recipe = {"base": "cdrmix-test", "model": {"converters": ["int8"]}, "training": {"extensions": [str(TOY)]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    metrics, save = tmp_path / "metrics.jsonl", str(tmp_path / "checkpoints")
    rest = (*flags[2:], "--train-iters", "4", "--save-interval", "2", "--lr", "1e-2")
    line = ("pretrain_cdrmix.py", "--config", str(tmp_path / "recipe.yaml"), *rest)
    files = ("--save", save, "--load", save, "--metrics-file", str(metrics))
    for ends in (("--exit-interval", "2"), ()):
        outcome = run(4, *line, *LAYOUT, *files, *ends)
        assert outcome.status == 0, outcome.err
    assert "continuing after iteration 2" in outcome.out
    alone = tmp_path / "alone.jsonl"
    assert run(1, *line, "--metrics-file", str(alone)).status == 0
    # A difference in the last bit may become another code, 1/127 of a token's largest value.
    assert losses(metrics) == pytest.approx(losses(alone), rel=1e-4) and len(losses(alone)) == 4
    plain = tmp_path / "plain.jsonl"
    assert run(1, line[0], *flags[:2], *rest, "--metrics-file", str(plain)).status == 0
    assert losses(plain) != pytest.approx(losses(alone), rel=1e-4)
    outcome = run(1, line[0], *flags[:2], *rest, *files)
    assert outcome.status == 2 and "--converters" in outcome.errors[0]
