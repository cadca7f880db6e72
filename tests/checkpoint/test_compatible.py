"""A checkpoint of another model or tokenizer is refused by the names of what differs."""

from __future__ import annotations

import dataclasses

import pytest

from megaforge.checkpoint.compatible import check_compatible, describe_run
from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError

TOKENIZER = {"type": "HuggingFaceTokenizer", "vocab_size": 4096, "fingerprint": "ab" * 32}


def _config(**model) -> Config:
    return Config(model=ModelConfig(**{"vocab_size": 4096, **model}))


INITIAL = (
    *("init_", "rwkv_init", "bound_tied_embedding", "hidden_dropout", "attention_dropout"),
    *(
        "mtp_loss_scaling_factor",
        "mod_loss_coeff",
        "lora_dropout",
        "lora_bias",
        "peft_from",
        "lora_rank_steps",
        "lora_rank_energy",
        "adalora_",
    ),
)


def test_the_same_run_is_accepted():
    check_compatible(describe_run(_config(), TOKENIZER), _config(), TOKENIZER)


def test_every_differing_field_is_named_with_both_values():
    saved = describe_run(_config(hidden_size=512, num_attention_heads=8), TOKENIZER)
    with pytest.raises(UserError) as caught:
        check_compatible(
            saved, _config(hidden_size=768, num_attention_heads=12), TOKENIZER, source="runs/a/step_0000100"
        )
    text = str(caught.value)
    assert "runs/a/step_0000100" in text
    assert "--hidden-size 512 in the checkpoint, 768 here" in text
    assert "--num-attention-heads 8 in the checkpoint, 12 here" in text
    assert "--num-layers" not in text


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig) if not f.name.startswith(INITIAL)])
def test_no_field_of_the_model_is_overlooked(name):
    default = getattr(ModelConfig(), name)
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + "x"}
    other[tuple] = lambda v: (*v, "x")
    value = 96 if default is None else other[type(default)](default)
    if name == "hybrid_layer_pattern":
        value = "R-"
    if name == "max_position_embeddings":
        assert check_compatible(describe_run(_config(), None), _config(max_position_embeddings=96)) is None
        with pytest.raises(UserError, match="max-position-embeddings 48 .* 96"):
            check_compatible(
                describe_run(_config(max_position_embeddings=48), None), _config(max_position_embeddings=96)
            )
        return
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        check_compatible(describe_run(_config(), None), _config(**{name: value}))


def test_a_default_and_the_value_it_stands_for_are_the_same_model():
    written_out = _config(ffn_hidden_size=3072, kv_channels=64, num_query_groups=12)
    check_compatible(describe_run(_config(), None), written_out)
    check_compatible(describe_run(written_out, None), _config())


def test_how_weights_were_initialised_and_trained_may_change():
    other = dataclasses.replace(_config(init_std=0.5), training=dataclasses.replace(Config().training, train_iters=7))
    check_compatible(describe_run(_config(), TOKENIZER), other, TOKENIZER)


def test_another_tokenizer_is_refused():
    with pytest.raises(UserError, match=f"tokenizer fingerprint: {'ab' * 32} in the checkpoint, {'cd' * 32} here"):
        check_compatible(describe_run(_config(), TOKENIZER), _config(), TOKENIZER | {"fingerprint": "cd" * 32})


def test_versions_older_and_newer():
    older = describe_run(_config(), None)
    del older["config"]["model"]["rotary_percent"]
    check_compatible(older, _config())
    with pytest.raises(UserError, match=r"--rotary-percent 1\.0 in the checkpoint, 0\.5 here"):
        check_compatible(older, _config(rotary_percent=0.5))
    newer = describe_run(_config(), None)
    newer["config"]["model"]["mamba_state"] = 128
    with pytest.raises(UserError, match="mamba_state 128 in the checkpoint, unknown"):
        check_compatible(newer, _config())


def test_meta_that_is_no_runs():
    with pytest.raises(UserError, match="does not say which model"):
        check_compatible({"iteration": 3}, _config())
