"""The parity matrix as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.verification import parity, parity_command

SCRIPT = Path(__file__).parents[2] / "tools" / "parity.py"


def test_it_starts_its_own_ranks() -> None:
    argv = ["--layouts", "pp2-vpp2,tp2-pp2-dp2,dp2-zero1", "--max-ranks", "2"]
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = {words[0]: words for words in lines if words and words[-1] == "agrees"}
    assert {name: words[1] for name, words in rows.items()} == {"pp2-vpp2": "2", "dp2-zero1": "2"}
    for words in rows.values():
        assert all(float(number) <= 1e-10 for number in words[2:7])
        assert any(float(number) > 0 for number in words[2:7]), "a comparison with itself proves nothing"
    assert "2 of 2 layouts agree with one rank" in done.stdout
    assert "not compared, as they need more ranks: tp2-pp2-dp2" in done.stdout


FAILING = """
import sys
from megaforge.config.cli import run_entry
from megaforge.verification import parity, parity_command

train = parity.train

def fail(config, ctx):
    if ctx.world.rank == 1:
        raise ValueError("rank 1 has had enough")
    return train(config, ctx)

parity.train = fail
run_entry(lambda: parity_command.run(sys.argv[1:], __file__))
"""


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    argv = [sys.executable, str(script), "--layouts", "dp2"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 1
    assert "rank 1 has had enough" in done.stderr
    assert "at layout dp2" in done.stderr


def test_a_difference_is_said_and_gives_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(parity.TOLERANCE, "fp32", 0.0)
    assert parity_command.run(["--layouts", "micro1", "--dtype", "fp32"], "unused") == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out
    assert "0 of 1 layouts agree" in out
    assert "differs: micro1 (--micro-batch-size 1): " in out


def test_layouts_that_a_model_cannot_carry(capsys: pytest.CaptureFixture[str]) -> None:
    """The small model of the tests has four blocks: eight stages are left out, unless they are asked for."""
    config = ["--config", "cdrmix-test", "--seq-length", "16", "--train-iters", "50"]
    assert parity_command.run([*config, "--max-ranks", "1"], "unused") == 0
    out = capsys.readouterr().out
    assert "1 of 1 layouts agree" in out
    cannot = next(line for line in out.splitlines() if "cannot carry this model" in line)
    assert "pp8" in cannot and "tp2" not in cannot.split()
    with pytest.raises(UserError, match="layout pp8: .*8 stages.*4 blocks"):
        parity_command.run([*config, "--layouts", "pp8"], "unused")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--layouts", "tp3"), "--layouts tp3.*choose from .*tp2"),
        (("--dtype", "bf16"), "--dtype: invalid choice: 'bf16'"),
        (("--max-ranks", "0"), "--max-ranks 0"),
        (("--layouts", "micro1", "--bf16"), "exclude each other|leave out"),
        (("--layouts", "micro1", "--nonsense"), "--nonsense"),
    ],
)
def test_bad_input(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parity_command.run(argv, "unused")
