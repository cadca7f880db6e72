"""The configurations of examples/cdrmix: the preset written out, and AdamW in its optimizer's place."""

from __future__ import annotations

from dataclasses import replace

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from tests.end_to_end.launch import REPO

NORMUON = (
    *("--optimizer", "normuon", "--muon-num-ns-steps", "3", "--muon-momentum", "0.9"),
    *("--lr", "8e-3", "--min-lr", "1.6e-4", "--lr-mult", "embedding=2.5"),
)
ADAMW = ("--optimizer", "adam", "--lr", "4e-3", "--min-lr", "8e-5")


def config_of(*flags: str) -> Config:
    """All but its name."""
    parsed = parse_config(["--config", *flags])
    assert parsed.notes == ()
    return replace(parsed.config, name="")


def test_the_recipe_is_the_preset() -> None:
    recipe, preset = config_of(str(REPO / "examples/cdrmix/recipe.yaml")), config_of("cdrmix-tiny")
    assert recipe == preset
    assert f"`{' '.join(NORMUON)}`" in (REPO / "docs/optimizers.md").read_text(encoding="utf-8")
    assert config_of("cdrmix-tiny", *ADAMW, *NORMUON) == preset


def test_adamw_is_what_the_documents_say() -> None:
    assert config_of(str(REPO / "examples/cdrmix/adamw.yaml")) == config_of("cdrmix-tiny", *ADAMW)
    said = f"`{' '.join(ADAMW)}`"
    assert said in (REPO / "examples/cdrmix/README.md").read_text(encoding="utf-8")
    for document in ("docs/optimizers.md", "megaforge/config/presets/cdrmix-tiny.yaml"):
        assert said.strip("`") in (REPO / document).read_text(encoding="utf-8")


def test_ranks_change_the_layout_alone() -> None:
    four, preset = config_of(str(REPO / "examples/cdrmix/four_ranks.yaml")), config_of("cdrmix-tiny")
    assert (four.model, four.data, four.optimizer) == (preset.model, preset.data, preset.optimizer)
