"""The 5B family: its presets are of the sizes that they name, and the example's arms in small."""

from __future__ import annotations

from pathlib import Path

from megaforge.config.cli import parse_config
from megaforge.models.parameter_count import count_parameters, total
from tests.end_to_end.launch import run


def test_the_presets_are_one_family() -> None:
    """The small one has every part of the large one."""
    large, small = (parse_config(["--config", name, "--vocab-size", "2048"]).config for name in ("moe-5b", "moe-test"))
    whole = total(count_parameters(parse_config(["--config", "moe-5b"]).config.model))
    assert 4.9e9 < whole.stored < 5.2e9 and 1.4e9 < whole.active < 2e9
    assert large.length.train_tokens == 100_000_000_000 and small.length.train_tokens == 1_000_000
    for name in (
        "mod_capacity_factor",
        "mtp_num_layers",
        "mtp_mode",
        "num_experts",
        "moe_router_topk",
        "rom_num_experts",
    ):
        assert getattr(large.model, name) == getattr(small.model, name)
    letters = [set(config.model.hybrid_layer_pattern or "") for config in (large, small)]
    assert letters == [{"O", "E", "*"}] * 2
    assert all(config.model.query_groups < config.model.num_attention_heads for config in (large, small))


def test_arms_are_trained_once_and_listed(corpus: Path, tmp_path: Path) -> None:
    line = (
        "examples/moe_5b/arms.py",
        "--small",
        "--output",
        str(tmp_path),
        "--arms",
        "all",
        "without routing (Mamba-2)",
    )
    line += ("--data", str(corpus / "text_text_document"), "--tokenizer", str(corpus / "tok.json"))
    both = run(1, *line, "--train-tokens", "64")
    assert both.status != 0 and "--train-tokens: --small has its own length" in both.err
    first = run(1, *line)
    assert first.status == 0, first.err
    rows = first.out.splitlines()[-3:]
    assert rows[0].split()[:2] == ["arm", "loss"] and [row[:3] for row in rows[1:]] == ["all", "wit"]
    again = run(1, *line)
    assert "pretrain_cdrmix.py" not in again.out and again.out.splitlines()[-3:] == rows
