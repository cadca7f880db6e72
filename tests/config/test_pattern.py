"""Layer patterns and schedules."""

from __future__ import annotations

import pytest

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import (
    BlockKind,
    attention_positions,
    blocks_of,
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
        ("RE/*E", "multi-token prediction blocks are not available"),
        ("*ERE", "first mixer must be R"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match="--hybrid-layer-pattern") as caught:
        parse_pattern(text)
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


def test_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError, match="--layer-schedule sideways"):
        pattern(layer_schedule="sideways")
