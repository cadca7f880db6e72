"""--shrink: a preset's depth and layout with small widths."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import format_config, parse_config
from megaforge.errors import UserError

REPO = Path(__file__).parents[2]
LADDER = [line.split() for line in (REPO / "run_scripts" / "slurm" / "cdrmix.txt").read_text().splitlines()]
EIGHT = [(words[0], int(words[1]), shlex.join(words[2:])) for words in LADDER if words[0].startswith("cdrmix-")]


def test_there_are_eight() -> None:
    assert len(EIGHT) == 8


@pytest.mark.parametrize(("name", "servers", "layout"), EIGHT)
def test_each_variant_fits_its_own_layout(name: str, servers: int, layout: str) -> None:
    line = ["--config", name, "--mock-data", "--data-schedule", "none", "--seq-length", "64", *layout.split()]
    whole, small = (parse_config([*line, *more]).config for more in ((), ("--shrink", "64")))
    check_layout(small, 8 * servers)
    for field in ("hidden_size", "ffn_hidden_size"):
        assert getattr(small.model, field) * 64 == getattr(whole.model, field)
    for field in ("num_layers", "num_attention_heads", "num_experts", "vocab_size", "layer_pattern"):
        assert getattr(small.model, field, None) == getattr(whole.model, field, None)
    assert small.model.rwkv_head_size == 4 and small.model.hidden_size % 4 == 0


def test_what_the_line_gives_stands(tmp_path: Path) -> None:
    line = ["--config", "cdrmix-core-1b", "--mock-data", "--shrink", "64"]
    parsed = parse_config([*line, "--ffn-hidden-size", "100"])
    assert (parsed.config.model.hidden_size, parsed.config.model.ffn_hidden_size) == (32, 100)
    assert parsed.origins["model.hidden_size"] == "--shrink 64 of 2048 (preset cdrmix-core-1b)"
    (tmp_path / "p.yaml").write_text(format_config(parsed))
    assert parse_config(["--config", str(tmp_path / "p.yaml")]).config == parsed.config
    with pytest.raises(UserError, match=r"--shrink 7: --hidden-size 2048 is not a multiple of it; use one of 2, 4, 8"):
        parse_config([*line, "--shrink", "7"])
    with pytest.raises(UserError, match="--shrink 0: must be at least 1"):
        parse_config([*line, "--shrink", "0"])
