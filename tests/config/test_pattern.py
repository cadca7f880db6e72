"""Layer patterns and schedules."""

from __future__ import annotations

import pytest

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import (
    BlockKind,
    ahead_of,
    attention_positions,
    blocks_of,
    kinds_of,
    layer_pattern,
    parse_pattern,
    pipeline_cuts,
)
from megaforge.errors import UserError
from megaforge.registry import LAYER_KINDS

R, MAMBA, ATTENTION, E, DENSE = (LAYER_KINDS.get(letter) for letter in "RM*E-")


def pattern(**changes: object) -> str:
    return layer_pattern(ModelConfig(**changes))  # type: ignore[arg-type]


def test_parse() -> None:
    assert parse_pattern("RE*-R*E") == (
        BlockKind(R, E, first=True),
        BlockKind(ATTENTION, DENSE, first=True),
        BlockKind(R, None),
        BlockKind(ATTENTION, E),
    )
    assert [block.mixer.token_shift for block in parse_pattern("R-*-")] == [True, False]


def test_an_ffn_without_a_mixer_is_a_block_of_its_own() -> None:
    assert parse_pattern("-M--|E*") == (
        BlockKind(DENSE, None, first=True),
        BlockKind(MAMBA, DENSE, first=True),
        BlockKind(DENSE, None),
        BlockKind(E, None, first=True),
        BlockKind(ATTENTION, None, first=True),
    )
    assert parse_pattern("M|E") == parse_pattern("M|E*")[:2]
    assert pipeline_cuts(ModelConfig(hybrid_layer_pattern="-M--|E*|E")) == (3, 5)


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "holds no block"),
        ("REX", "unknown letter 'X' at position 2"),
        ("-R-", "first mixer must be R"),
        ("RE/X", "unknown letter 'X' at position 0"),
        ("*ERE", "first mixer must be R"),
        ("*-/*-/*", "the same for all of them"),
        ("*-/", "the same for all of them"),
        ("*-/*|*-", "without |"),
        ("/*-", "holds no block"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match="--hybrid-layer-pattern") as caught:
        kinds_of(ModelConfig(hybrid_layer_pattern=text))
    assert message in str(caught.value)


@pytest.mark.parametrize("schedule", ["interleave-x", "top-of-x", "hybrid"])
@pytest.mark.parametrize("layers", range(1, 65))
def test_every_schedule_has_exactly_its_share_and_starts_with_rwkv(schedule: str, layers: int) -> None:
    for percent in (0, 10, 25, 33.4, 50, 75, 99, 100):
        blocks = blocks_of(ModelConfig(num_layers=layers, layer_schedule=schedule, transformer_pct=percent))
        mixers = [block.mixer for block in blocks]
        assert len(mixers) == layers
        assert mixers.count(ATTENTION) == round(layers * percent / 100)
        assert mixers[0] is R or R not in mixers


def test_placements() -> None:
    assert pattern(num_layers=8, ffn="dense") == "R-R-R-*-R-R-R-*-"
    assert pattern(num_layers=8, layer_schedule="top-of-x") == "RERERERERERE*E*E"
    assert attention_positions("interleave-x", 24, 6) == (3, 7, 11, 15, 19, 23)
    assert attention_positions("hybrid", 24, 6) == (6, 13, 20, 21, 22, 23)
    assert pattern(num_layers=3, layer_schedule="attention", ffn="dense") == "*-*-*-"
    assert pattern(num_layers=3, layer_schedule="rwkv") == "RERERE"
    assert pattern(num_layers=3, hybrid_layer_pattern="R*") == "R*"


def test_cuts_are_no_part_of_the_model() -> None:
    assert parse_pattern("RE|*E|R-") == parse_pattern("RE*ER-")
    assert pipeline_cuts(ModelConfig(hybrid_layer_pattern="RE*E|R|R-*")) == (2, 3)
    assert pipeline_cuts(ModelConfig(num_layers=8)) == ()


def test_further_predictions_stand_behind_the_model() -> None:
    """What is behind the ``/``, or blocks like the last one; each is a model of its own."""
    cfg = ModelConfig(hybrid_layer_pattern="RE|*E|R-/R*-/R*-")
    assert blocks_of(cfg) == blocks_of(ModelConfig(hybrid_layer_pattern="RE|*E|R-"))
    assert pipeline_cuts(cfg) == (1, 2)
    assert ahead_of(cfg) == ((BlockKind(R, None, first=True), BlockKind(ATTENTION, DENSE, first=True)),) * 2
    assert ahead_of(ModelConfig(hybrid_layer_pattern="RERE", mtp_num_layers=2)) == ((BlockKind(R, E, first=True),),) * 2
    assert ahead_of(ModelConfig(num_layers=4)) == ahead_of(ModelConfig(num_layers=4, mtp_num_layers=0)) == ()
    assert MAMBA in kinds_of(ModelConfig(hybrid_layer_pattern="*-/M-"))
    for count, right in ((2, True), (1, False), (0, False)):
        both = ModelConfig(hybrid_layer_pattern="*-/*/*", mtp_num_layers=count)
        if right:
            assert len(ahead_of(both)) == 2
            continue
        with pytest.raises(UserError, match=f"--mtp-num-layers {count}: the pattern has layers for 2"):
            ahead_of(both)


def test_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError, match="--layer-schedule sideways"):
        pattern(layer_schedule="sideways")
