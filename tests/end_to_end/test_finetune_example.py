"""examples/finetune: every arm is a command that is understood, and what is made of documentation strings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.finetune import arms, documentation
from megaforge.config.cli import parse_config
from megaforge.config.fine_tuning import DEFAULTS
from megaforge.registry import PEFT_METHODS
from tests.training.tiny import dense_arguments, make_trainer, write_dataset


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    data = write_dataset(folder / "train_text_document")
    make_trainer([*dense_arguments(data, "R-*-"), "--train-iters", "1", "--save", str(folder / "run")]).train()
    return str(folder / "run")


def test_every_method_has_an_arm_that_is_understood(base: str, tmp_path: Path) -> None:
    assert set(PEFT_METHODS.names()) - {"plastic"} <= arms.ARMS.keys()  # which has an example of its own
    for small in ((), ("--small",)):
        flags = arms.parse_arguments(["--base", base, "--output", str(tmp_path), *small])
        for name, own in arms.ARMS.items():
            line = [*arms.line_of(flags, tmp_path), *own]
            config = parse_config(line[1:], defaults=DEFAULTS).config
            assert (config.model.quantize_weights == "ternary") == ("ternary" in own), name
            assert config.model.peft == (name if name in PEFT_METHODS else None), name


def test_questions_are_signatures_and_first_sentences(tmp_path: Path) -> None:
    text = '''
def area(width: float, height: float = 1.0) -> float:
    """Return the area of a rectangle of this size. In square metres."""

def same(x):
    """Return the area of a rectangle of this size."""

def short(x):
    """Too short."""

def none(): ...
'''
    (tmp_path / "shapes.py").write_text(text)
    (tmp_path / "broken.py").write_text("def (")
    [row] = documentation.questions(tmp_path)
    assert row["prompt"] == 'def area(width: float, height: float=1.0):  # shapes\n    """'
    assert row["response"] == 'Return the area of a rectangle of this size."""'
    rows = [f"an answer with the number {number}" for number in range(1000)]
    assert 60 < sum(map(documentation.held_out, rows)) < 140
    learnt, judged = documentation.write(tmp_path / "out", most=50)
    assert learnt + judged == 50
    read = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(read) == learnt and not any(documentation.held_out(row["response"]) for row in read)


def test_the_table_has_shares_of_full_fine_tuning() -> None:
    found = {"full": arms.Arm(2.0, 1.0, 200, 1.0), "lora": arms.Arm(2.5, 0.01, 100, 0.5)}
    last = arms.table(4.0, found).splitlines()[-1].split()
    assert last == ["lora", "1.000%", "0", "MB", "0.50", "0.50", "2.5000", "75.0%"]
