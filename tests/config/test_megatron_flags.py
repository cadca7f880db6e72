"""Every flag of Megatron-LM's: taken with its meaning, taken and named, or refused with what to write instead."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megaforge.config.cli import ParsedConfig, parse_config
from megaforge.config.megatron.rules import TAKES, TAKES_ANY
from megaforge.config.megatron.table import ROWS, VALUES, own_flags
from megaforge.config.schema import settings
from megaforge.errors import UserError

GPT = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --lr 1e-3 --train-iters 2"
)
SAID = "--position-embedding-type rope --attention-dropout 0.0 --hidden-dropout 0.0"


def gpt(*more: str) -> ParsedConfig:
    base = GPT.replace(" --train-iters 2", "") if "--train-samples" in more else GPT
    return parse_config((*base.split(), *SAID.split(), *more), as_megatron=True)


def test_a_flag_of_ours_is_in_no_table() -> None:
    assert not own_flags() & {*(f"--{row.flag}" for row in ROWS), *TAKES, *TAKES_ANY}
    assert len({row.flag for row in ROWS}) == len(ROWS)
    flags = {spelling: one for one in settings().values() for spelling in (one.flag, *one.aliases)}
    for flag, values in VALUES.items():
        refused = {value for value, outcome in values.items() if outcome.refused}
        assert not [value for value in refused if value in (flags[f"--{flag}"].choices or ())], flag


def test_silence_means_what_it_means_there() -> None:
    config = gpt().config
    model, optimizer = config.model, config.optimizer
    assert (model.layer_schedule, model.ffn, model.activation, model.add_bias_linear) == (
        *("attention", "dense", "gelu", True),
    )
    assert (model.normalization, model.norm_epsilon, model.reset_at_document_boundaries) == ("layernorm", 1e-5, False)
    assert (model.moe_aux_loss_coeff, model.moe_z_loss_coeff, model.moe_token_drop_policy) == (0, 0, "probs")
    assert (optimizer.adam_beta2, optimizer.weight_decay, optimizer.lr_decay_style) == (0.999, 0.01, "linear")
    assert (optimizer.initial_loss_scale, optimizer.lr_wsd_decay_style) == (2**32, "exponential")
    assert (config.training.eval_iters, config.training.eval_interval, config.logging.log_interval) == (100, 1000, 100)
    assert (config.data.split, config.data.num_workers, config.checkpoint.keep_last) == ("969,30,1", 2, 0)
    assert (config.parallel.cp_comm_type, config.parallel.distributed_timeout_minutes) == ("p2p", 10)


@pytest.mark.parametrize(
    ("line", "activation"),
    [
        ((), "gelu"),
        (("--disable-bias-linear",), "gelu_exact"),
        (("--no-bias-gelu-fusion",), "gelu_exact"),
        (("--disable-bias-linear", "--openai-gelu"), "gelu"),
    ],
)
def test_gelu_is_by_tanh_in_the_fused_kernel_alone(line: tuple[str, ...], activation: str) -> None:
    assert gpt(*line).config.model.activation == activation


def test_positions_are_learned_and_the_tied_embedding_starts_as_told() -> None:
    model = parse_config(GPT.split(), as_megatron=True).config.model
    assert (model.position_embedding_type, model.bound_tied_embedding) == ("learned_absolute", False)
    assert (model.attention_dropout, model.hidden_dropout) == (0.1, 0.1)


def test_what_is_required_there_is_required() -> None:
    with pytest.raises(UserError) as found:
        parse_config((*SAID.split(), "--save", "x"), as_megatron=True)
    for flag in (*GPT.split()[::2], "--save-interval"):
        assert flag in str(found.value)


def test_all_refusals_are_told_together_and_what_cannot_be_read_before_what_it_means() -> None:
    with pytest.raises(UserError) as found:
        gpt("--fp8-format", "hybrid", "--use-torch-fsdp2", "--muon-scale-mode", "unit_rms_norm", "--keep-best", "2")
    for words in (
        "--fp8-format hybrid: ",
        "--use-torch-fsdp2: ",
        "--muon-scale-mode unit_rms_norm: ",
        "--keep-best 2: ",
    ):
        assert words in str(found.value)
    with pytest.raises(UserError) as found:
        gpt("--fp8-format", "hybrid", "--lr", "fast", "--micro-batch", "1", "--keep-best", "2")
    text = str(found.value)
    assert text.startswith("3 things") and "--lr fast: expected a number" in text and "--keep-best" not in text


def test_experts_make_it_a_mixture_and_swiglu_two_thirds() -> None:
    moe = gpt("--num-experts", "4", "--swiglu", "--hidden-size", "1024").config.model
    assert (moe.ffn, moe.num_experts, moe.ffn_size) == ("moe", 4, 2688)
    assert gpt("--num-experts", "0").config.model.ffn == "dense"
    pattern = gpt("--num-experts", "4", "--hybrid-layer-pattern", "*-*E").config.model
    assert pattern.hybrid_layer_pattern == "*-*E"


def table() -> list[tuple[str, tuple[str, ...], str]]:
    lines = Path(__file__).with_name("megatron_flags.txt").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split(" |")] for line in lines if line and not line.startswith("#")]
    return [(verdict, tuple(line.split()), "|".join(rest).strip()) for verdict, line, *rest in rows]


TABLE = table()


@pytest.mark.parametrize(("verdict", "line", "expected"), TABLE, ids=[" ".join(line) for _, line, _ in TABLE])
def test_each_row(verdict: str, line: tuple[str, ...], expected: str) -> None:
    if verdict == "ADVICE":
        with pytest.raises(UserError) as found:
            gpt(*line)
        [said] = [text for text in str(found.value).split("\n  ") if text.startswith(line[0].replace("_", "-"))]
        assert expected in said and len(said) < 400
        return
    parsed = gpt(*line)
    if verdict == "NOOP":
        [note] = [note for note in parsed.told if "change nothing" in note]
        assert (expected or " ".join(line)) in note and parsed.config == gpt().config
    elif expected.startswith("~"):
        [note] = [note for note in parsed.notes if expected[1:] in note]
    else:
        assert verdict in ("SAME", "ALIAS", "DIFFERS")
        for pair in expected.split():
            key, _, value = pair.partition("=")
            section, name = key.split(".")
            assert str(getattr(getattr(parsed.config, section), name)).replace(" ", "") == value, key
            assert parsed.origins[key] != "default" or value == "None"


def test_the_verdicts_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(verdict for verdict, _, _ in TABLE)
    with capsys.disabled():
        print(f"\nflags of Megatron-LM: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    tried = {word for _, line, _ in TABLE for word in line}
    untried = {row.flag for row in ROWS if f"--{row.flag}" not in tried and not row.flag.endswith("*")}
    assert not untried, "a row of the tables without a line here"


def test_arity_is_minded() -> None:
    for line, words in (
        (("--attention-backend",), "--attention-backend: expected one argument"),
        (("--use-wandb", "yes"), "yes: no flag takes this word; --use-wandb takes none"),
        (("--recompute-granularity",), "--recompute-granularity: expected one argument"),
        (("--use-flash-attn", "yes"), "yes: no flag takes this word; --use-flash-attn takes none"),
        (("--attention-backend", ""), "--attention-backend '': the value is empty"),
    ):
        with pytest.raises(UserError) as found:
            gpt(*line)
        assert str(found.value).startswith(words)
    assert gpt("--attention_backend=flash").config == gpt().config


def test_meaning_comes_before_spelling() -> None:
    for flag, words in (
        ("--learning-rate", "write --lr"),
        ("--use-mcore-model", "did you mean --use-mcore-models?"),
        ("--resum", "mean --resume"),
    ):
        with pytest.raises(UserError, match=words):
            gpt(flag)
