"""What a line takes from a checkpoint before torch is imported: one step of it, its model, its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaforge.checkpoint.compatible import describe_run
from megaforge.config.checkpoint_source import newest_meta
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.errors import UserError

MODEL = ("--hidden-size", "64", "--num-attention-heads", "4", "--hybrid-layer-pattern", "*-|*-", "--activation", "gelu")


def config_of(*argv: str) -> Config:
    return parse_config(argv).config


def checkpoint(folder: Path, step: int, *argv: str) -> Path:
    """The manifest of a checkpoint of such a run, all that is read."""
    path = folder / f"step_{step:07d}"
    path.mkdir(parents=True)
    tokenizer = {"type": "NullTokenizer", "model": "61", "vocab_size": 61, "fingerprint": "x", "eod": None}
    meta = describe_run(config_of(*argv), tokenizer)
    del meta["config"]["model"]["norm_epsilon"]  # as if of a version that did not know it
    (path / "manifest.json").write_text(json.dumps({"meta": meta}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    checkpoint(folder, 3, *MODEL, "--hidden-size", "96")
    checkpoint(folder, 7, *MODEL)
    (folder / "step_0000009.damaged").mkdir()
    return str(folder)


def test_one_step_of_a_directory(run: str) -> None:
    config = config_of("--load", run, "--ckpt-step", "3")
    assert config.checkpoint.load == f"{run}/step_0000003"
    again = config_of("--load", str(config.checkpoint.load), "--ckpt-step", "3")
    assert again.checkpoint.load == config.checkpoint.load
    with pytest.raises(UserError, match="--ckpt-step 4: --load .*step_0000003 is one checkpoint"):
        config_of("--load", str(config.checkpoint.load), "--ckpt-step", "4")
    with pytest.raises(UserError, match="--ckpt-step 4: there is no directory of it: add --load DIR"):
        config_of("--ckpt-step", "4")


def test_the_model_and_tokenizer_are_the_checkpoints(run: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of("--load", run, "--use-checkpoint-args")
    assert config.model == config_of(*MODEL).model and config.optimizer == config_of().optimizer
    assert (config.data.tokenizer_type, config.data.tokenizer_model) == ("NullTokenizer", "61")
    assert capfd.readouterr().err == "", "idle flags of another's choice are not told"
    assert config_of("--load", run, "--ckpt-step", "3", "--use-checkpoint-args").model.hidden_size == 96
    sizes = ("--seq-length", "8", "--micro-batch-size", "1", "--lr", "1e-3", "--train-iters", "2")
    sizes += ("--attention-dropout", "0.0", "--hidden-dropout", "0.0")
    there = parse_config([*sizes, "--load", run, "--use-checkpoint-args"], as_megatron=True).config
    assert there.model == config.model and there.optimizer.adam_beta2 == 0.999
    own = ("--tokenizer-type", "NullTokenizer", "--tokenizer-model", "64", "--hidden-size", "96")
    pattern = ("--hybrid-layer-pattern", "*-*-", "--activation", "gelu")
    config = config_of("--load", run, "--use-checkpoint-args", *own, *pattern)
    assert (config.model.hidden_size, config.data.tokenizer_model) == (64, "64")
    assert config.model.hybrid_layer_pattern == "*-*-", "cuts are layout"
    said = capfd.readouterr().err
    assert f"--use-checkpoint-args: --hidden-size is 64, as in {run}/step_0000007, not 96" in said
    assert "activation" not in said and said.count("use-checkpoint-args") == 1


def test_without_a_checkpoint(run: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = str(tmp_path / "none")
    with pytest.raises(UserError, match="--use-checkpoint-args: there is no checkpoint to take them from; add --load"):
        config_of("--use-checkpoint-args")
    with pytest.raises(UserError, match=f"--use-checkpoint-args: no checkpoint in --load {empty}; name"):
        config_of("--load", empty, "--use-checkpoint-args")
    for more in (("--save", empty), ("--no-exit-on-missing-checkpoint",)):
        assert config_of("--load", empty, "--use-checkpoint-args", *more, *MODEL).model.hidden_size == 64
        assert "so this line's model flags hold" in capfd.readouterr().err
    line = ("--load", empty, "--pretrained-checkpoint", run, "--use-checkpoint-args")
    assert config_of(*line).model.hidden_size == 64


def test_manifests_that_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "step_0000001").mkdir()
    assert newest_meta(tmp_path) is None
    for text in ("", "[]", '{"meta": 3}', "{}"):
        (tmp_path / "step_0000001" / "manifest.json").write_text(text, encoding="utf-8")
        assert newest_meta(tmp_path) is None
    (tmp_path / "step_0000001" / "manifest.json").write_text('{"meta": {}}', encoding="utf-8")
    with pytest.raises(UserError, match="step_0000001 does not say which model it is of"):
        config_of("--load", str(tmp_path), "--use-checkpoint-args")


def test_checkpoints_to_retain_are_among_those_saved() -> None:
    config_of("--save", "r", "--save-interval", "5", "--save-retain-interval", "10")
    with pytest.raises(UserError, match=r"--save-retain-interval 12: .* multiple of --save-interval 5"):
        config_of("--save", "r", "--save-interval", "5", "--save-retain-interval", "12")
