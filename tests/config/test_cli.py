from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import ParsedConfig, config_from_dict, config_to_dict, format_config, parse_config
from megaforge.config.config import Config
from megaforge.config.run_config import DataConfig
from megaforge.config.schema import Setting, sections, settings
from megaforge.config.yaml_files import preset_names
from megaforge.errors import UserError
from megaforge.registry import UPDATE_RULES


def parse(*argv: str) -> ParsedConfig:
    return parse_config(argv, prog="pretrain")


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``write(name, text)`` makes a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda name, text: (tmp_path / name).write_text(text)


def test_nothing_given_is_all_defaults() -> None:
    parsed = parse()
    assert parsed.config == Config()
    assert set(parsed.origins.values()) == {"default"}
    assert set(parsed.origins) == set(settings())


def test_each_type_of_flag() -> None:
    config = parse(
        "--hidden-size", "768", "--lr=2e-4", "--activation", "gelu", "--bf16", "--no-overlap-grad-reduce",
        "--num-query-groups", "4", "--data-path", "0.3", "a", "0.7", "b", "--save", "out", "--seed", "7",
    ).config  # fmt: skip
    assert (config.model.hidden_size, config.optimizer.lr, config.model.activation) == (768, 2e-4, "gelu")
    assert (config.training.bf16, config.parallel.overlap_grad_reduce) == (True, False)
    assert (config.model.num_query_groups, config.data.data_path) == (4, ("0.3", "a", "0.7", "b"))
    assert (config.checkpoint.save, config.training.seed) == ("out", 7)


def test_aliases_underscores_and_megatron_spellings() -> None:
    for argv in (["--tp", "2"], ["--tensor-model-parallel-size", "2"], ["--tensor_model_parallel_size=2"]):
        assert parse(*argv).config.parallel.tensor_model_parallel_size == 2
    assert parse("--sp").config.parallel.sequence_parallel
    assert not parse("--sequence-parallel", "--no-sp").config.parallel.sequence_parallel
    assert parse("--swiglu").config.model.activation == "swiglu"
    assert not parse("--disable-bias-linear").config.model.add_bias_linear
    assert parse("--hybrid-override-pattern=R-*-").config.model.hybrid_layer_pattern == "R-*-"


def test_none_unsets_an_optional_value() -> None:
    assert parse("--config", "base").config.model.vocab_size == 32000
    assert parse("--config", "base", "--vocab-size", "none").config.model.vocab_size is None
    assert complaint("--hidden-size", "none") == "--hidden-size none: expected an integer"


def test_the_command_line_beats_the_file_beats_its_base_beats_the_default(write) -> None:
    write(
        "mine.yaml", "name: mine\nbase: cdrmix-test\nmodel:\n  num_layers: 6\noptimizer:\n  lr: 1e-4\n  min_lr: 1e-5\n"
    )
    parsed = parse("--config", "mine.yaml", "--lr", "3e-4")
    config, origins = parsed.config, parsed.origins
    assert (config.name, config.optimizer.lr, config.optimizer.min_lr) == ("mine", 3e-4, 1e-5)
    assert (config.model.num_layers, config.model.hidden_size) == (6, 64)
    assert origins["optimizer.lr"] == "command line --lr"
    assert origins["optimizer.min_lr"] == "mine.yaml:7"
    assert origins["model.hidden_size"] == "preset cdrmix-test"
    assert origins["model.init_std"] == "default"


def test_a_base_may_be_a_file_beside_and_circles_are_refused(write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write("sub/b.yaml", "base: a.yaml\noptimizer: {lr: 5e-4}\n")
    write("sub/a.yaml", "parallel: {tp: 2}\n")
    config = parse("--config", "sub/b.yaml").config
    assert (config.name, config.optimizer.lr, config.parallel.tensor_model_parallel_size) == ("b", 5e-4, 2)
    write("sub/a.yaml", "base: b.yaml\n")
    assert "'base' leads back to itself: sub/b.yaml -> sub/a.yaml -> sub/b.yaml" in complaint("--config", "sub/b.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer:\n  lrr: 1\n", "f.yaml:2: unknown key 'optimizer.lrr'; did you mean lr?"),
        ("optimiser:\n  lr: 1\n", "f.yaml:2: unknown section 'optimiser'; did you mean optimizer?"),
        ("model:\n  lr: 1\n", "f.yaml:2: unknown key 'model.lr'; it belongs in section 'optimizer'"),
        ("model:\n  num_layers: many\n", "f.yaml:2: model.num_layers: expected an integer, got 'many'"),
        ("model:\n  num_layers: 2.5\n", "f.yaml:2: model.num_layers: expected an integer, got '2.5'"),
        ("model:\n  num_layers: [1, 2]\n", "f.yaml:2: model.num_layers: expected one value, got a list"),
        ("model:\n  num_layers: '3'\n", "f.yaml:2: model.num_layers: got the text '3' in quotes; leave the quotes out"),
        ("model:\n  num_layers:\n", "f.yaml:2: model.num_layers: needs a value"),
        ("training:\n  bf16: 1\n", "f.yaml:2: training.bf16: expected true or false, got '1'"),
        ("optimizer:\n  lr: .inf\n", "f.yaml:2: optimizer.lr: expected a number, got '.inf'"),
        ("model:\n  ffn: sparse\n", "f.yaml:2: model.ffn: choose moe or dense, got 'sparse'"),
        ("parallel:\n  tp: 2\n  tensor_model_parallel_size: 2\n",
         "f.yaml:3: 'tensor_model_parallel_size' is 'tp' by another name; keep one"),
        ("model:\n  ffn: moe\n  ffn: dense\n", "f.yaml:3: 'ffn' occurs twice; keep one"),
        ("model: 3\n", "f.yaml:1: section 'model' must hold 'key: value' lines"),
        ("- 1\n", "f.yaml:1: the file must hold 'key: value' lines"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named_with_line_and_key(write, text: str, message: str) -> None:
    write("f.yaml", text)
    assert complaint("--config", "f.yaml") == message


def test_files_that_cannot_be_read(write) -> None:
    assert complaint("--config", "no.yaml") == "--config no.yaml: cannot read it: No such file or directory"
    write("bad.yaml", "model:\n  ffn: [moe\n")
    assert complaint("--config", "bad.yaml").startswith("bad.yaml:3: this is not YAML:")
    assert "did you mean cdrmix-tiny?" in complaint("--config", "cdrmix-tny")
    write("empty.yaml", "")
    assert parse("--config", "empty.yaml").config.model == Config().model


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--micro-bach-size", "2"], "--micro-bach-size: unknown flag; did you mean --micro-batch-size?"),
        (["--qqqqq"], "--qqqqq: unknown flag; see --help"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--lr", "nan"], "--lr nan: expected a finite number"),
        (["--tp", "2.0"], "--tp 2.0: expected an integer"),
        (["--activation", "relu"], "--activation relu: choose relu2, gated_relu2, swiglu, gelu or gelu_exact"),
        (["--optimizer", "shampoo"], "--optimizer 'shampoo' is not a known update rule "
                f"(there are {', '.join(UPDATE_RULES.names())}); a file that registers another is named by "
            "--extensions"),
        (["--lr"], "--lr: expected one argument"),
        (["--data-path"], "--data-path: expected at least one argument"),
        (["stray"], "stray: no flag takes this word; see --help"),
        (["--global-batch-size", "0"], "--global-batch-size 0: must be at least 1 and at most 16777216"),
        (["--tp", "0"], "--tp 0: must be at least 1 and at most 1048576"),
        (["--weight-decay", "-0.1"], "--weight-decay -0.1: must be at least 0"),
        (["--lr", "0"], "--lr 0: must be positive"),
        (["--optimizer", "muon", "--muon-num-ns-steps", "3", "--muon-coefficient-type", "cans"],
         "--muon-num-ns-steps 3: the first steps of cans are made to be followed by the rest; "
         "use at least 5, or --muon-coefficient-type simple"),
        (["--min-lr", "1"], "--min-lr 1.0: must not exceed --lr 0.0003"),
        (["--bf16", "--fp16"], "--bf16, --fp16 and --fp64 exclude each other; choose one"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_named(argv: list[str], message: str) -> None:
    assert complaint(*argv) == message


def test_dp_is_explained() -> None:
    assert complaint("--dp", "2").startswith("--dp 2: data parallelism is what --tp, --pp and --cp leave")


def test_print_config_shows_origins_and_reads_back(write, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "cdrmix-core-1b", "--tp", "2", "--data-path", "0.5", "a b", "1", "c:d", "--run-name", "null"]
    argv += ["--save", "true", "--clip-grad", "1e-7"]
    with pytest.raises(SystemExit) as ended:
        parse(*argv, "--print-config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["hidden_size:", "2048", "#", "preset", "cdrmix-core-1b"] in lines
    assert ["tensor_model_parallel_size:", "2", "#", "command", "line", "--tp"] in lines
    assert ["init_std:", "0.02", "#", "default"] in lines
    write("printed.yaml", printed)
    assert parse("--config", "printed.yaml").config == parse(*argv).config
    assert format_config(parse(*argv)) == printed.rstrip("\n")


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    printed = capsys.readouterr().out
    assert all(setting.flag in printed for setting in settings().values())
    assert "--no-sequence-parallel" in printed and "cdrmix-reason-200b" in printed


def test_dictionaries_survive_json() -> None:
    config = parse("--config", "cdrmix-tiny", "--data-path", "a", "b", "--num-query-groups", "2").config
    text = json.dumps(config_to_dict(config))
    assert config_from_dict(json.loads(text)) == config
    assert config_from_dict({"optimizer": {"lr": 1}}).optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"hiden_size": 3}}, "meta: unknown key 'model.hiden_size'; did you mean hidden_size?"),
        ({"modell": {}}, "meta: 'modell' is not a section; did you mean model?"),
        ({"model": {"hidden_size": "3"}}, "meta: model.hidden_size: expected an integer, got '3'"),
        ({"model": {"hidden_size": True}}, "meta: model.hidden_size: expected an integer, got True"),
        ({"data": {"data_path": "a"}}, "meta: data.data_path: expected a list, got 'a'"),
    ],
)
def test_dictionaries_with_mistakes(data: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_dict(data, "meta")
    assert str(caught.value) == message


def test_every_preset_is_valid_and_can_run() -> None:
    names = preset_names()
    family = {f"cdrmix-{kind}-{size}" for kind in ("core", "reason") for size in ("1b", "4b", "40b", "200b")}
    assert family | {"cdrmix-tiny", "cdrmix-test", "tiny", "small", "base", "large", "xlarge"} <= set(names)
    for name in names:
        sizes = ("--max-position-embeddings", "4096") if name == "megatron" else ()  # its lines give all sizes
        config = parse("--config", name, *sizes).config
        assert config.name == name
        check_layout(config, world_size=2)
        check_layout(parse("--config", name, "--tp", "2", *sizes).config, world_size=2)


@pytest.mark.parametrize(
    ("size", "shape", "clip"),
    [
        ("1b", (24, 2048, 16, 4608), 1.0),
        ("4b", (36, 3072, 24, 8192), 1.0),
        ("40b", (64, 6144, 48, 16384), 0.9),
        ("200b", (96, 12288, 96, 32768), 0.8),
    ],
)
def test_the_cdrmix_family(size: str, shape: tuple[int, ...], clip: float) -> None:
    core, reason = (parse("--config", f"cdrmix-{kind}-{size}").config for kind in ("core", "reason"))
    model = core.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.ffn_hidden_size) == shape
    assert (core.optimizer.clip_grad, model.init_std_scale) == (clip, clip)
    assert (model.vocab_size, model.num_experts, model.moe_router_topk, model.activation) == (50272, 8, 2, "relu2")
    assert (model.transformer_pct, model.layer_schedule) == (25, "interleave-x")
    assert (core.data.seq_length, reason.data.seq_length) == (2048, 4096)
    assert reason.model == model


def test_the_base_size() -> None:
    config = parse("--config", "base").config
    assert (config.model.hidden_size, config.model.num_layers, config.model.num_attention_heads) == (768, 12, 12)
    assert (config.model.vocab_size, config.data.seq_length) == (32000, 2048)


def test_sections_are_the_fields_of_config() -> None:
    expected = [
        "model",
        "parallel",
        "data",
        "chat",
        "tasks",
        "questions",
        "optimizer",
        "qat",
        "distill",
        "evaluation",
        "generation",
        "regularization",
        "rl",
        "rollout",
        "rewards",
        "run_memory",
        "training",
        "stages",
        "core_text",
        "length",
        "checkpoint",
        "resilience",
        "compliance",
        "logging",
        "alerts",
        "prometheus",
        "dry_run",
    ]
    assert list(sections()) == expected


NUMBERS = [setting for setting in settings().values() if setting.kind in (int, float)]
SLIPS = {
    int: ("9223372036854775808", "nan", "-3"),
    float: ("nan", "-inf", "1e-310", "1e300", "-2.5"),
}


def tried(setting: Setting, text: str, folder: Path) -> list[str]:
    """What the flag and the YAML key say to ``text``; nothing where it is taken."""
    file = folder / "c.yaml"
    file.write_text(f"{setting.section}:\n  {setting.name}: {text or 'x'}\n")
    said = []
    for arguments in ([f"{setting.flag}={text}"], ["--config", str(file)]):
        try:
            parse(*arguments)
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.key)
def test_every_number_has_bounds(setting: Setting, tmp_path: Path) -> None:
    for text in SLIPS[setting.kind]:
        said = tried(setting, text, tmp_path)
        assert len(said) == 2, (text, said)
        assert said[0].startswith(f"{setting.flag} {text}") and f"c.yaml:2: {setting.key}" in said[1], said
    default = setting.default
    if default is not None and not setting.sequence:
        assert setting.accept(default) == default


@pytest.mark.parametrize(
    ("flag", "value", "range"),
    [
        ("--lr", "0", "must be positive"),
        ("--adam-beta1", "1", "must be at least 0 and below 1"),
        ("--rotary-percent", "1.01", "must be above 0 and at most 1"),
        ("--num-layers", "100001", "must be at least 1 and at most 100000"),
        ("--seed", "-1", "must be at least 0"),
        ("--lr", "1e-39", "too small: the smallest number above 0 is 1.2e-38"),
    ],
)
def test_a_number_out_of_bounds_is_told_the_range(flag: str, value: str, range: str) -> None:
    with pytest.raises(UserError) as error:
        parse(flag, value)
    assert str(error.value).startswith(f"{flag} {value}: ") and range in str(error.value)


def test_a_configuration_made_in_code_has_the_same_bounds() -> None:
    config = dataclasses.replace(Config(), data=DataConfig(seq_length=0))
    with pytest.raises(UserError, match="--seq-length 0: must be at least 1"):
        config.validate()


def test_mock_data_leave_no_files_to_verify() -> None:
    assert "--verify-data: --mock-data reads no files" in complaint("--mock-data", "--verify-data")


def test_a_word_that_cannot_be_read_hides_no_other_section() -> None:
    """Of its own section nothing more is known; sections that the line does not touch are not looked at."""
    line = "--lr abc --foo 3 --lr-decay-style cosin --hidden-size 100 --num-attention-heads 12".split()
    with pytest.raises(UserError) as refused:
        parse_config(line)
    assert [text in str(refused.value) for text in ("3 things", "--lr abc", "--foo", "--hidden-size 100", "cosin")] == [
        *(True, True, True, True),
        False,
    ]
    with pytest.raises(UserError, match="2 things are wrong:\n  --foo: .*\n  --config nowhere"):
        parse_config(["--config", "nowhere", "--foo", "2"])


def test_a_word_that_cannot_be_read_is_told_once_with_its_flag() -> None:
    with pytest.raises(UserError, match="^--lr-decay-style 'nonsense' is not a known"):
        parse_config(["--config", "cdrmix-test", "--vocab-size", "300", "--lr-decay-style", "nonsense"])
