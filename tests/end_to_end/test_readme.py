"""A new user's first hour: the README's own lines make a model of one text file; killed, the same line goes on."""

from __future__ import annotations

import os
import signal
import sysconfig
import time
from pathlib import Path

import pytest

from megaforge.monitor.sinks import read_metrics
from tests.end_to_end.readme import bash, bash_blocks, commands, fresh_copy, inline_commands, understand

LIMIT = 300


def finish(code: str, folder: Path) -> str:
    """What the block prints; it must succeed."""
    process = bash(code, folder)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, f"{code}\n{out}"
    return out


def kill_after_a_checkpoint(code: str, folder: Path) -> None:
    """Starts a training block and kills all its processes once it has saved."""
    process = bash(code, folder)
    deadline = time.monotonic() + LIMIT
    try:
        while not list(folder.glob("runs/*/step_*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_blocks_of_the_readme_train_a_model_of_one_text_file(tmp_path: Path) -> None:
    home = fresh_copy(tmp_path / "megaforge")
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "\n\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "inspect"))
    (home / "my_text.txt").write_text(text, encoding="utf-8")
    blocks = [code for code, runs in bash_blocks("README.md") if runs]
    assert len(blocks) >= 3, "the README has lost its marks"
    shown = ""
    for code in blocks:
        code = f"source .venv/bin/activate\n{code}"
        if "torchrun" in code:
            kill_after_a_checkpoint(code, home)
            assert "continuing after iteration" in finish(code, home)
        else:
            shown = finish(code, home)
    [metrics] = home.glob("runs/*.jsonl")
    steps = [record["iteration"] for record in read_metrics(str(metrics)) if record["kind"] == "step"]
    assert steps == list(range(1, steps[-1] + 1)), "each step once, though the run was killed"
    losses = [record["loss"] for record in read_metrics(str(metrics)) if record["kind"] == "step"]
    assert losses[-1] < losses[0] - 1
    assert "bits per byte" in shown


DOCUMENTS = ["README.md", "docs/data.md", "docs/layouts.md", "docs/planner.md", "docs/runs.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_block_leaves_something_out(document: str) -> None:
    for code, _ in bash_blocks(document):
        assert "..." not in code, f"a command that does not run as printed:\n{code}"


VARIABLES = {
    "$DATA": "--tokenizer-model corpus/tok.json --data-path corpus/train_text_document",
    "$RUN": "--save runs/4b --load runs/4b",
    "$FLAGS": "--zero 1",
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_understood(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = [command for code, _ in bash_blocks(document) for command in commands(code)] + inline_commands(document)
    scripts = []
    for command in printed:
        for name, value in VARIABLES.items():
            command = command.replace(name, value)
        scripts.append(understand(command.partition(" > ")[0], monkeypatch))
    assert any(scripts), "no command of ours was found"
