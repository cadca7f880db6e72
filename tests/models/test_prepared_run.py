"""One answer to whether a run is valid, given before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.models import stages
from megaforge.models.prepared_run import check_run

SMALL = ("--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "48", "--layer-schedule=attention")


def config(*more: str) -> Config:
    return parse_config([*SMALL, "--num-layers", "4", "--vocab-size", "61", *more], prog="test").config


def test_a_valid_run_has_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    run = check_run(config("--pp", "2", "--micro-batch-size", "1", "--global-batch-size", "6"), 4, notes=["said"])
    assert (run.layout.dp, run.layout.micro_batches, run.notes[0]) == (2, 3, "said")
    plan = run.plan
    assert [list(blocks) for blocks in plan.layers] == [[0, 1], [2, 3]] and plan.schedule.num_microbatches == 3
    monkeypatch.setattr(stages, "plan_pipeline", None)
    assert run.plan is plan


@pytest.mark.parametrize(
    ("flags", "ranks", "named"),
    [
        (("--tp", "3"), 3, "--tp 3 does not divide"),
        (("--tp", "8", "--make-vocab-size-divisible-by", "1"), 8, "--tp 8 does not divide"),
        (("--pp", "8"), 8, "has only 4 blocks"),
        (("--pp", "2", "--vpp", "2"), 2, "are not a multiple of --pp"),
        (("--vocab-size", "none"), 1, "vocab"),
    ],
)
def test_what_is_wrong_is_named(flags: tuple[str, ...], ranks: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_run(config(*flags), ranks)


def test_the_answer_needs_no_torch() -> None:
    code = (
        "import sys\nfrom megaforge.config.cli import parse_config\n"
        "from megaforge.models.prepared_run import check_run\n"
        f"check_run(parse_config({[*SMALL, '--num-layers', '4', '--vocab-size', '61']!r}).config, 1)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
