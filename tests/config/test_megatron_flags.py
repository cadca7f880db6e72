"""Every flag of Megatron-LM's: taken with its meaning, taken and named, or refused with what to write instead."""

from __future__ import annotations

import pytest

from megaforge.config.cli import ParsedConfig, parse_config
from megaforge.config.megatron.table import ROWS, VALUES, own_flags
from megaforge.config.schema import settings
from megaforge.errors import UserError

GPT = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --lr 1e-3 --train-iters 2"
)
SAID = "--position-embedding-type rope --attention-dropout 0.0 --hidden-dropout 0.0"


def gpt(*more: str) -> ParsedConfig:
    return parse_config((*GPT.split(), *SAID.split(), *more), as_megatron=True)


def test_a_flag_of_ours_is_in_no_table() -> None:
    assert not own_flags() & {f"--{row.flag}" for row in ROWS}
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
