"""A mixer that a user adds as one file: trained by the real script, at two layouts, with a stop between, and asked to
write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.launch import REPO, records, run

TOY = REPO / "tests" / "toys" / "running_mean.py"
PATTERN = "RE*-G-|R-*EG-"  # carried tensors of both mixers cross the cut


def losses(path: Path) -> dict[int, float]:
    return {record["iteration"]: record["loss"] for record in records(path) if record["kind"] == "step"}


def test_a_mixer_is_one_file(flags: tuple[str, ...], tmp_path: Path) -> None:
    model, training = {"hybrid_layer_pattern": PATTERN}, {"extensions": [str(TOY)]}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"base": "cdrmix-test", "model": model, "training": training}))
    rest = (*flags[2:], "--train-iters", "4", "--lr", "1e-2", "--save-interval", "2")
    line = ("pretrain_cdrmix.py", "--config", str(tmp_path / "recipe.yaml"), *rest)
    saves, found = [tmp_path / str(ranks) for ranks in (4, 1)], []
    for ranks, save, layout in (
        (4, saves[0], ("--tp", "2", "--pp", "2", "--sequence-parallel")),
        (1, saves[1], ("--load", str(saves[0] / "step_0000002"))),
    ):
        metrics = tmp_path / f"{ranks}.jsonl"
        outcome = run(ranks, *line, *layout, "--save", str(save), "--metrics-file", str(metrics))
        assert outcome.status == 0, outcome.err
        found.append(losses(metrics))
    assert list(found[0]) == [1, 2, 3, 4] and list(found[1]) == [3, 4]
    assert found[1] == pytest.approx({step: found[0][step] for step in (3, 4)}, rel=1e-5)
    write = ("tools/generate.py", "--prompt", "a b c", "--max-new-tokens", "6", "--temperature", "0", "--device", "cpu")
    outcome = run(1, *write, "--load", str(saves[0]))
    assert outcome.status == 0 and outcome.out.strip(), outcome.err
