"""A new user's first hour: the README's own lines make a model of one text file; killed, the same line goes on."""

from __future__ import annotations

import os
import re
import signal
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from megaforge.monitor.sinks import read_metrics
from tests.checkpoint.rwkv7_weights import published_weights
from tests.end_to_end.launch import descendants
from tests.end_to_end.readme import (
    LIMIT,
    bash,
    bash_blocks,
    commands,
    finish,
    fresh_copy,
    inline_commands,
    run_blocks,
    understand,
)
from tests.held import HeldRun


def kill_after_a_checkpoint(code: str, folder: Path) -> None:
    """Starts a training block and kills all its processes once it has saved, where its second rank waits for that."""
    saves = re.search(r"--save-interval (\d+)", code)
    assert saves is not None, code
    waiting = HeldRun(folder / "held", int(saves[1]) + 1, 1)
    process = bash(code, folder, **waiting.variables)
    deadline = time.monotonic() + LIMIT
    try:
        while not (waiting.stands and list(folder.glob("runs/*/step_*"))):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.01)
    finally:
        for pid in [*descendants(process.pid), process.pid]:  # torchrun gives each rank a session of its own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with a text of the user's, where the README's own lines have made a model; one run was killed."""
    home = fresh_copy(tmp_path_factory.mktemp("clone") / "megaforge")
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "\n\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "inspect"))
    (home / "my_text.txt").write_text(text, encoding="utf-8")
    blocks = run_blocks("README.md")
    assert len(blocks) >= 3, "the README has lost its marks"
    for code in blocks:
        if "torchrun" in code:
            kill_after_a_checkpoint(code, home)
            assert "continuing after iteration" in finish(code, home)
        else:
            (home / "shown").write_text(finish(code, home), encoding="utf-8")
    return home


def losses(metrics: Path) -> dict[int, float]:
    """Those of a run's steps, each there once."""
    steps = [record for record in read_metrics(metrics) if record["kind"] == "step"]
    assert [record["iteration"] for record in steps] == list(range(1, len(steps) + 1))
    return {record["iteration"]: record["loss"] for record in steps}


def test_the_blocks_of_the_readme_train_a_model_of_one_text_file(home: Path) -> None:
    found = losses(home / "runs" / "mine.jsonl")
    assert found[len(found)] < found[1] - 1
    assert "bits per byte" in (home / "shown").read_text(encoding="utf-8")


def test_the_example_trains_the_same_model_on_four_ranks(home: Path) -> None:
    """Its losses are those of the README's run on two."""
    four, *_ = run_blocks("examples/cdrmix/README.md")
    finish(four, home)
    expected, found = (losses(home / "runs" / f"{name}.jsonl") for name in ("mine", "four"))
    assert len(found) == 5
    for iteration, loss in found.items():
        assert loss == pytest.approx(expected[iteration], rel=2e-4), iteration


def test_the_example_goes_on_from_published_weights(home: Path) -> None:
    """Their vocabulary is smaller here, of single printable characters."""
    characters = ["\n", *map(chr, range(32, 127))]
    torch.save(
        {name: value.bfloat16() for name, value in published_weights(vocab=len(characters) + 2).items()},
        home / "RWKV-x070.pth",
    )
    lines = [f"{index} {character!r} {1}\n" for index, character in enumerate(characters, start=1)]
    (home / "rwkv_vocab_v20230424.txt").write_text("".join(lines), encoding="utf-8")
    _, *blocks = run_blocks("examples/cdrmix/README.md")
    shown = [finish(code.replace("65535", f"{len(lines) + 1}"), home) for code in blocks]
    found = losses(home / "runs" / "continued.jsonl")
    assert found[20] < found[1] - 0.1
    assert "bits per byte" in shown[-1]


DOCUMENTS = [
    "README.md",
    "examples/bitnet/README.md",
    "examples/cdrmix/README.md",
    "examples/corpus/README.md",
    "examples/finetune/README.md",
    "examples/fleet/README.md",
    "examples/grokking/README.md",
    "examples/moe_5b/README.md",
    "docs/agent.md",
    "docs/architecture.md",
    "docs/checkpoints.md",
    "docs/corpus.md",
    "docs/dashboard.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/finetuning.md",
    "docs/fleet.md",
    "docs/from_huggingface.md",
    "docs/from_megatron.md",
    "docs/generation.md",
    "docs/layouts.md",
    "docs/losses.md",
    "docs/models.md",
    "docs/optimizers.md",
    "docs/planner.md",
    "docs/reasoning.md",
    "docs/rlvr.md",
    "docs/runs.md",
    "docs/stages.md",
    "docs/tasks.md",
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_block_leaves_something_out(document: str) -> None:
    for code, _ in bash_blocks(document):
        assert "..." not in code, f"a command that does not run as printed:\n{code}"


VARIABLES = {
    "$DATA": "--tokenizer-model corpus/tok.json --data-path corpus/train_text_document",
    "$RUN": "--save runs/4b --load runs/4b",
    "$FLAGS": "--zero 1",
    "--gpu machine.json": "--gpu h100-80g",  # a file of the command before
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_understood(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = [command for code, _ in bash_blocks(document) for command in commands(code)] + inline_commands(document)
    scripts = []
    for command in printed:
        for name, value in VARIABLES.items():
            command = command.replace(name, value)
        scripts.append(understand(re.split(r" >>? ", command)[0], monkeypatch))
    assert any(scripts), "no command of ours was found"
