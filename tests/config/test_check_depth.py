"""Flags of Mixture of Depths that cannot be had: each error says what would work."""

from __future__ import annotations

import re

import pytest

from megaforge.config.check_depth import check_depth
from megaforge.config.cli import parse_config
from megaforge.errors import UserError

MODEL = ("--config", "cdrmix-test", "--vocab-size", "64", "--mock-data", "--train-iters", "1", "--seq-length", "128")


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ("--mod-capacity-factor 0", "--mod-capacity-factor 0"),
        ("--mod-capacity-factor -0.5", "--mod-capacity-factor -0.5"),
        ("--mod-capacity-factor 1.01", "--mod-capacity-factor 1.01"),
        ("--mod-capacity-factor nan", "--mod-capacity-factor nan"),
        ("--mod-capacity-factor 0.5 --mod-every 0", "--mod-every 0"),
        ("--mod-capacity-factor 0.5 --mod-inference topk", "predictor"),
        ("--mod-capacity-factor 0.5 --mod-every 5", "use --mod-every 4 or less"),
        ("--mod-capacity-factor 0.5 --hybrid-layer-pattern R-", "every token goes through the first block"),
        ("--mod-capacity-factor 0.699 --cp 2 --tp 2 --sp", "90 of --seq-length 128"),
        ("--mod-capacity-factor 0.699 --cp 2 --tp 2 --sp", "use --mod-capacity-factor 0.6875 or 0.75"),
        ("--mod-capacity-factor 0.7 --cp 2", "use --mod-capacity-factor 0.6875 or 0.71875"),
    ],
)
def test_refused(flags: str, advice: str) -> None:
    with pytest.raises(UserError, match=re.escape(advice)):
        check_depth(parse_config([*MODEL, *flags.split()]).config)


def test_accepted() -> None:
    for flags in (
        "--mod-capacity-factor 1",
        "--mod-capacity-factor 0.75 --cp 2 --tp 2 --sp",
        "--mod-capacity-factor 1e-9",
    ):
        check_depth(parse_config([*MODEL, *flags.split()]).config)
