"""Megatron-LM's command lines here: the same run, a refusal, or one note that says what differs."""

from __future__ import annotations

import pytest

from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.nn.head import TIED_OWN_LOGIT

GPT = ("--num-layers", "12", "--hidden-size", "768", "--num-attention-heads", "12")
DENSE = ("--layer-schedule", "attention", "--ffn", "dense")
SAID = (
    "--activation gelu --add-bias-linear --normalization rmsnorm --norm-epsilon 1e-5 --adam-beta2 0.999 "
    "--position-embedding-type rope --attention-dropout 0.1 --hidden-dropout 0.1"
).split()
SAID += "--no-reset-at-document-boundaries --weight-decay 0.01 --lr-decay-style linear --keep-last 0".split()


def notes(*argv: str) -> tuple[str, ...]:
    return parse_config(argv).notes


def test_a_gpt_line_is_told_what_it_trains() -> None:
    [model, silent] = notes(*GPT)
    assert "8 experts" in model and "--layer-schedule attention --ffn dense" in model
    for words in ("--activation gelu", "--add-bias-linear", "--adam-beta2 0.999", "learned_absolute", "--keep-last 0"):
        assert words in silent
    assert "--ffn moe" in notes(*GPT, *SAID, "--normalization", "rmsnorm", "--layer-schedule", "attention")[0]


def test_a_line_that_says_all_is_told_nothing() -> None:
    assert notes(*GPT, *DENSE, *SAID) == ()
    assert notes("--config", "cdrmix-tiny", "--num-layers", "4") == ()
    assert notes() == ()
    assert notes("--hybrid-layer-pattern", "R-*-") == ()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--swiglu",), "3072 wide here (4 x hidden size), 2048 in Megatron-LM; write --ffn-hidden-size 2048"),
        (("--activation", "gelu"), "--activation gelu_exact"),
        (("--init-std", "0.02"), "the tied embedding starts at 0.00520833"),
        (("--moe-expert-capacity-factor", "1.5"), "of each sequence here, in training only"),
        (("--moe-router-load-balancing-type", "global_aux_loss"), "the load of the previous step"),
        (("--lr-decay-style", "WSD"), "1 - sqrt"),
        (("--step-batch-size-schedule", "0:2 1M:4"), "counts steps of any size"),
        (("--global-batch-size", "4", "--rampup-batch-size", "2", "2", "9"), "counts steps of any size"),
    ],
)
def test_what_differs_is_told_once(argv: tuple[str, ...], words: str) -> None:
    [note] = notes(*argv)
    given = {"--swiglu": "--activation swiglu", "--global-batch-size": "--rampup-batch-size"}.get(argv[0], argv[0])
    assert note.startswith(given) and words in note


@pytest.mark.parametrize(
    "argv",
    [
        ("--swiglu", "--ffn-hidden-size", "2048"),
        ("--activation", "gelu", "--add-bias-linear"),
        ("--normalization", "layernorm"),
        ("--init-std", "0.02", "--untie-embeddings-and-output-weights"),
        ("--init-std", "0.005"),
        ("--global-batch-size", "4", "--rampup-batch-size", "2", "2", "9", "--train-samples", "100"),
    ],
)
def test_what_is_alike_is_told_nothing(argv: tuple[str, ...]) -> None:
    assert notes(*argv) == ()


def test_the_tied_embeddings_scale_is_the_heads() -> None:
    assert f"{TIED_OWN_LOGIT / 768:g}" in notes("--init-std", "0.02")[0]


def test_no_position_embedding_never_removes_positions() -> None:
    beside = parse_config(("--no-position-embedding", "--position-embedding-type", "rope"))
    assert beside.config.model.position_embedding_type == "rope"
    assert parse_config(("--position-embedding-type=none", "--no_position_embedding")).config.model
    with pytest.raises(UserError, match="write --position-embedding-type rope, or none"):
        parse_config(("--no-position-embedding",))


def test_grouped_queries_without_a_number_are_one_group() -> None:
    assert parse_config(("--group-query-attention", "--num-query-groups", "4")).config.model.num_query_groups == 4
    alone = parse_config(("--group-query-attention",))
    assert alone.config.model.num_query_groups == 1 and "one group" in alone.notes[0]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--optimizer-offload-fraction", "write --optimizer paged_adam"),
        ("--yaml_cfg", "write --config FILE.yaml"),
        ("--yaml-cfg", "write --config FILE.yaml"),
        ("--learning-rate", "write --lr"),
        ("--dp", "leave this flag out"),
    ],
)
def test_flags_we_do_not_have_name_ours(flag: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse_config((flag, "1"))
    assert str(error.value).startswith(flag.replace("_", "-"))
