"""``--evaluate-at-end``: by the real script, at other layouts, and tried before the first step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from megaforge.inference.asked import Asked
from megaforge.inference.at_end import FILE, evaluate_at_end
from megaforge.tasks.at_end import check_tasks, why_not
from megaforge.training.prepare import prepare
from tests.data.corpus_files import bpe_tokenizer
from tests.end_to_end.launch import run
from tests.inference.text_model import restored, saved_model
from tests.training.tiny import dense_arguments, make_config, write_dataset


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("end")
    tokenizer = bpe_tokenizer(folder / "tok.json")
    prefix = write_dataset(folder / "d", vocab=load_tokenizer("HuggingFaceTokenizer", tokenizer).vocab_size)
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--train-iters", "1")
    tasks = ("--evaluate-at-end", "copying", "modular_arithmetic", "--evaluate-at-end-lengths", "60", "90")
    more = (*tasks, "--evaluate-at-end-examples", "3", "--fp64", "--save", str(folder / "run"))
    return dense_arguments(prefix, "R-*-", *flags, *more)


def again(argv: list[str]) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    with mock.patch.dict(os.environ, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}):
        evaluate_at_end(make_config(argv))


def test_a_complete_run_is_asked_at_every_layout(argv: list[str], ranks) -> None:
    """By torchrun over tp at the end of training, and over pp as a command; beside one rank and replicas."""
    done = run(2, "pretrain_cdrmix.py", "--tp", "2", *argv)
    assert done.status == 0, done.err
    path = Path(argv[-1]) / FILE
    found = json.loads(path.read_text())
    assert found["iteration"] == 1 and [(one["task"], one["length"], one["examples"]) for one in found["results"]] == [
        (task, length, 3) for task in ("copying", "modular_arithmetic") for length in (60, 90) for _ in range(2)
    ]
    assert "answer_bits_per_byte" in done.out + done.err and "95 % interval" in done.out + done.err
    tasks = ("--tasks", "copying", "modular_arithmetic", "--lengths", "60", "90", "--examples", "3")
    asked = run(2, "tools/evaluate.py", "--load", argv[-1], "--pp", "2", *tasks, "--device", "cpu", "--json")
    assert asked.status == 0, asked.err
    others = [json.loads(asked.out)]
    for world, layout in ((1, ()), (4, ("--pp", "2", "--global-batch-size", "4"))):
        path.unlink()
        _ = again([*argv, *layout]) if world == 1 else ranks.run(world, again, [*argv, *layout])
        others.append(json.loads(path.read_text()))
    for other in others:
        for one, same in zip(other["results"], found["results"], strict=True):
            assert one["value"] == pytest.approx(same["value"], rel=1e-9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--evaluate-at-end", "coppying"), "'coppying' is not a known task .*did you mean copying"),
        (("--evaluate-at-end-lengths", "5"), "--evaluate-at-end: task copying at length 5: an example has at least"),
        (("--evaluate-at-end", "gone.yaml"), "gone.yaml: cannot be read"),
        (
            ("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "64"),
            "90 tokens, and the model has positions for 64",
        ),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_first_step(
    argv: list[str], more: tuple[str, ...], message: str
) -> None:
    more = (*more, "--hybrid-layer-pattern", "*-") if "--max-position-embeddings" in more else more
    with pytest.raises(UserError, match=message):
        prepare(make_config([*argv, *more]))


def test_a_presets_tasks_are_left_out_aloud(argv: list[str]) -> None:
    config = make_config(["--config", "cdrmix-core-1b", "--data-path", "d", "--device", "cpu"])
    assert config.evaluation.evaluate_at_end and "nothing is saved" in (why_not(config, True) or "")
    saved = make_config(["--config", "cdrmix-core-1b", "--data-path", "d", "--save", "s", "--device", "cpu"])
    assert why_not(saved, True) is None and "no tokenizer" in (why_not(saved, False) or "")
    check_tasks(saved, len)


def test_sequences_have_room_for_examples_and_answers(tmp_path: Path) -> None:
    trained = restored(saved_model(tmp_path))
    assert Asked(["copying"]).room(trained) == 24 + 8 and Asked(["copying"], [9, 70]).room(trained) == 70 + 8
    assert Asked(["copying"], [9], max_length=5).room(trained) == 5
    (tmp_path / "t.yaml").write_text("task: copying\nlengths: [100]\n")
    assert Asked([str(tmp_path / "t.yaml")]).room(trained) == 108
    flags = ("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "30")
    (tmp_path / "bound").mkdir()
    bound = restored(saved_model(tmp_path / "bound", *flags, pattern="*-"))
    assert Asked(["copying"]).room(bound) == 30
    with pytest.raises(UserError, match="--lengths 31: the model has positions for 30"):
        Asked(["copying"], [31]).room(bound)
