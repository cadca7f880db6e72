"""A line of two stages: what each of them reads of it, and where stage B is kept and begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaforge.config.cli import ParsedConfig, format_config, parse_config, parse_stages
from megaforge.config.config import Config
from megaforge.config.stages import StageB
from megaforge.errors import UserError

FILE = """
base: cdrmix-test
data: {data_path: ["progressions://64"]}
optimizer: {lr: 2.0e-3}
stage_b:
  model: {peft: plastic}
  training: {train_iters: 7}
  optimizer: {lr: 5.0e-4}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "two.yaml").write_text(FILE)
    return str(tmp_path / "two.yaml")


def both(file: str, *flags: str, save: str = "runs/x") -> tuple[Config, Config]:
    first, second = parse_stages(["--config", file, "--save", save, "--load", save, *flags])
    return first.config, second.config


def test_the_section_holds_over_the_file_and_over_the_line(file: str) -> None:
    a, b = both(file, "--train-iters", "30", "--lr", "1e-3", "--seed", "9")
    assert (a.model.peft, a.training.train_iters, a.optimizer.lr, a.training.seed) == (None, 30, 1e-3, 9)
    assert (b.model.peft, b.training.train_iters, b.optimizer.lr, b.training.seed) == ("plastic", 7, 5e-4, 9)
    assert b.data == a.data and (a.stages.stage, b.stages.stage) == (None, "b")


def test_flags_of_stage_b_hold_over_its_section(file: str) -> None:
    a, b = both(file, "--train-iters", "30", "--stage-b-flags", "--train-iters 4 --seed 3")
    assert (a.training.train_iters, b.training.train_iters) == (30, 4)
    assert (a.training.seed, b.training.seed, b.optimizer.lr) == (1234, 3, 5e-4)
    with pytest.raises(UserError, match="--stage-b-flags --lr 'x: No closing quotation"):
        StageB.of("--lr 'x")
    with pytest.raises(UserError, match="did you mean --train-iters"):
        both(file, "--stage-b-flags", "--train-itres 4")


def test_what_says_one_thing_is_not_mixed(file: str) -> None:
    """A length in samples, or data in another form, of stage A."""
    a, b = both(file, "--train-samples", "40", "--train-data-path", "mock://", "--valid-data-path", "v")
    assert a.length.train_samples == 40 and a.data.valid_data_path == ("v",)
    assert b.length.train_samples is None and b.training.train_iters == 7 and b.data.valid_data_path == ("v",)
    other = Path(file).with_name("data.yaml")
    other.write_text(FILE + '  data: {data_path: ["tasks://kv_chunks"]}\n')
    a, b = both(str(other), "--train-data-path", "mock://")
    assert (a.data.data_path, b.data.data_path) == (("mock://",), ("tasks://kv_chunks",))
    a, b = both("cdrmix-reason-1b", "--mock-data")
    assert a.data.mock_data and not b.data.mock_data and b.data.data_path == ("tasks://kv_chunks",)


def test_a_stage_alone(file: str) -> None:
    for stage, peft in (("a", None), ("b", "plastic")):
        (only,) = parse_stages(["--config", file, "--stage", stage, "--load", "runs/core", "--lr", "1e-2"])
        assert only.config.model.peft == peft and only.config.optimizer.lr == 1e-2 and only.stage_b is None
    (only,) = parse_stages(["--config", "cdrmix-test", "--mock-data"])
    assert only.config.stages.stage is None


def places(parsed: ParsedConfig | Config) -> tuple[str | None, str | None, str | None]:
    flags = (parsed.config if isinstance(parsed, ParsedConfig) else parsed).checkpoint
    return flags.save, flags.load, flags.pretrained_checkpoint


def test_where_stage_b_is_kept_and_begins(file: str, tmp_path: Path) -> None:
    def alone(*flags: str) -> tuple[str | None, str | None, str | None]:
        return places(parse_config(["--config", file, "--stage", "b", *flags]))

    a, b = both(file)
    assert places(a) == ("runs/x", "runs/x", None) and places(b) == ("runs/x/stage_b", "runs/x/stage_b", "runs/x")
    _, fresh = parse_stages(["--config", file, "--save", "runs/x"])
    assert places(fresh) == ("runs/x/stage_b", None, "runs/x")
    _, other = parse_stages(
        ["--config", file, "--save", "runs/x", "--load", "runs/y", "--finetune", "--ckpt-step", "3"]
    )
    assert places(other) == ("runs/x/stage_b", "runs/x/stage_b", "runs/x")
    assert not other.config.checkpoint.finetune and other.config.checkpoint.ckpt_step is None
    assert alone("--save", "runs/x", "--load", "runs/x") == ("runs/x/stage_b", "runs/x/stage_b", "runs/x")
    assert alone("--save", "runs/r", "--load", "runs/core") == ("runs/r", "runs/r", "runs/core")
    assert alone("--load", "runs/core") == (None, None, "runs/core")
    step = tmp_path / "r" / "step_0000002"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps({"meta": {"config": {"stages": {"stage": "b"}}}}))
    own = str(tmp_path / "r")
    assert alone("--save", own, "--load", own) == (own, own, own), "it is a run of stage B"


def test_what_is_written_beside(file: str) -> None:
    flags = (
        "--metrics-file",
        "m/x.jsonl",
        "--tensorboard-dir",
        "tb/",
        "--digest-file",
        "d.jsonl",
        "--digest-interval",
        "5",
    )
    a, b = both(file, *flags, "--digest-interval", "5")
    assert a.logging.metrics_file == "m/x.jsonl" and a.logging.tensorboard_dir == "tb/"
    assert b.logging.metrics_file == "m/x.stage_b.jsonl" and b.logging.tensorboard_dir == "tb/stage_b"
    assert b.logging.digest_file == "d.stage_b.jsonl" and b.logging.profile_dir == "profile/stage_b"
    (only,) = parse_stages(["--config", file, "--stage", "b", "--load", "x", *flags[:2]])
    assert only.config.logging.metrics_file == "m/x.jsonl"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lr", "1e-3"), "add --save DIR, or --stage a"),
        (("--stage", "b"), "--stage b: there is no model to begin with; add --load DIR"),
        (("--stage", "c"), "--stage c: choose a or b"),
    ],
)
def test_a_stage_without_its_beginning(file: str, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_stages(["--config", file, *flags])


def test_a_base_s_stage_b_and_its_printed_form(file: str, tmp_path: Path) -> None:
    upper = tmp_path / "upper.yaml"
    upper.write_text("base: two.yaml\nstage_b:\n  training: {train_iters: 9}\n  logging: {log_interval: 2}\n")
    _, b = both(str(upper))
    assert (b.training.train_iters, b.logging.log_interval, b.model.peft) == (9, 2, "plastic")
    first, second = parse_stages(["--config", str(upper), "--save", "x"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(format_config(first))
    again = parse_stages(["--config", str(printed)])
    assert [one.config for one in again] == [first.config, second.config]
    assert "  training:\n    train_iters: 9  # " in printed.read_text().partition("stage_b:\n")[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage_b: {training: {train_itres: 3}}", "two.yaml:1: unknown key 'training.train_itres'; did you mean"),
        ("stage_b: {trainin: {}}", "unknown section 'trainin'; did you mean training"),
        ("stage_b: 3", "two.yaml:1: section 'stage_b'"),
    ],
)
def test_bad_sections_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "two.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        parse_stages(["--config", str(tmp_path / "two.yaml"), "--mock-data"])
