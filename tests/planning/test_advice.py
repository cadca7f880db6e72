"""What a run that is short of memory is told to change."""

from __future__ import annotations

from megaforge.config.cli import parse_config
from megaforge.planning.advice import memory_advice
from megaforge.planning.layout import layout_of
from megaforge.planning.search import worst_rank
from megaforge.planning.stages import cut_stages, model_parts

SMALL = ("--config", "cdrmix-test", "--vocab-size", "500", "--global-batch-size", "8", "--micro-batch-size", "4")
LONG = ("--seq-length", "4096", "--device", "cpu")


def total(*more: str) -> float:
    config = parse_config([*SMALL, *LONG, *more]).config
    layout = layout_of(config, 2)
    parts = model_parts(config.model, layout.dtype)
    return worst_rank(parts, layout, cut_stages(parts, layout)).total


def test_advice_names_flags_and_what_the_plan_says_they_save() -> None:
    told = memory_advice(parse_config([*SMALL, *LONG]).config, 2)
    now, saved = total(), {}
    for line in told:
        flags, _, rest = line.partition(" saves ")
        saved[flags] = now - total(*flags.split())
        assert rest == f"{saved[flags] / 1e9:.3g} of {now / 1e9:.3g} GB"
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    assert {"--recompute full", "--micro-batch-size 1", "--tp 2 --sp"} <= saved.keys()
    assert "--zero 1" not in saved, "a small model's state is not what fills the memory"
    assert not any("offload" in flags for flags in saved), "a CPU has nowhere to put it"
    # What is impossible on one rank is no advice, and a run that needs little gets none.
    assert memory_advice(parse_config([*SMALL, "--micro-batch-size", "1", "--seq-length", "64"]).config, 1) == []
