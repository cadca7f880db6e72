#!/usr/bin/env python3
"""How many pairs a plastic adapter of a given rank remembers:

python examples/reasoning/recall.py --ranks 8 24 --pairs 4 8 16 24

A layer sees pairs of one of 32 keys and one of 16 values, one after the other, and then one of these keys alone, for
which it has to give the value. Its own matrix only passes the value on: what is recalled comes from fast weights, which
begin as zero. Printed is how often that is right with the first A, which is random, with the A that gradients through
what was written have made, and with fast weights that stay zero.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.cli import parse_config
from megaforge.config.entry import run_entry
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.layers import ColumnParallelLinear
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters
from megaforge.peft.targets import Target
from megaforge.reasoning.plastic import Plasticity, adapt
from megaforge.reasoning.segments import segments_of
from megaforge.registry import PLASTIC_RULES

KEYS, VALUES = 32, 16  # how many there are
KEY, OUT = 64, 32  # width of a key; outputs of the layer, of which the first are for values


class Recall(nn.Module):
    """A layer that passes the last features of its input on, with fast weights beside it."""

    def __init__(self, rank: int, rule: str, decay: float = 0.98) -> None:
        super().__init__()
        cfg = parse_config(["--vocab-size", "64", "--data-path", "mock://"]).config.model
        ctx = ParallelContext.single()
        layer = make_layer_context(cfg, ctx, dtype=torch.float32)
        self.layer = ColumnParallelLinear(layer, KEY + VALUES, OUT, init=Constant(0.0))
        how = Plasticity(PLASTIC_RULES.get(rule), alpha=1.0, rate=1.0, decay=decay, clamp=2.0)
        self.adapter = adapt([Target("layer", self.layer)], rank, ctx, how)
        name_parameters(self, "")
        initialize_parameters(self, ctx, seed=0)
        with torch.no_grad():
            self.layer.weight[:VALUES, KEY:] = torch.eye(VALUES)
        self.layer.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[pairs + 1, b, KEY + VALUES] -> scores [b, VALUES] of the last key's value."""
        self.adapter.segments = segments_of(PackedSequence(x.shape[1], len(x), x.device), 1)
        scores: Tensor = self.layer(x)
        return scores[-1, :, :VALUES]


def episodes(number: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs and a key of one of them, [pairs + 1, number, KEY + VALUES], and its value, int64 [number]."""
    vocabulary = F.normalize(torch.randn(KEYS, KEY, generator=torch.Generator().manual_seed(0)), dim=-1)
    keys = vocabulary[torch.rand(KEYS, number, generator=generator).argsort(0)[:pairs]]
    values = torch.randint(VALUES, (pairs, number), generator=generator)
    asked, each = torch.randint(pairs, (number,), generator=generator), torch.arange(number)
    written = torch.cat((keys, F.one_hot(values, VALUES).float()), -1)
    query = torch.cat((keys[asked, each], torch.zeros(number, VALUES)), -1)
    return torch.cat((written, query[None])), values[asked, each]


def train(model: Recall, pairs: int, steps: int) -> None:
    """Adam on A."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        x, value = episodes(64, pairs, generator)
        optimizer.zero_grad()
        F.cross_entropy(8 * model(x), value).backward()
        optimizer.step()


@torch.no_grad()
def recalled(model: Recall, pairs: int, number: int = 4000) -> float:
    """The share of episodes whose value is given."""
    x, value = episodes(number, pairs, torch.Generator().manual_seed(2))
    return float((model(x).argmax(-1) == value).double().mean())


@torch.no_grad()
def recalled_from_zero(model: Recall, pairs: int) -> float:
    """The same where nothing is written."""
    how, model.adapter.plasticity = model.adapter.plasticity, model.adapter.plasticity._replace(rate=0.0)
    share = recalled(model, pairs)
    model.adapter.plasticity = how
    return share


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=integer(1, KEY), default=[8, 24])
    parser.add_argument("--pairs", nargs="+", type=integer(1, KEYS), default=[4, 8, 16, 24])
    parser.add_argument("--rules", nargs="+", choices=PLASTIC_RULES.names(), default=["hebb", "delta"])
    parser.add_argument("--steps", type=integer(0), default=300, help="of training A, for each row")
    return parser.parse_args(arguments)


def main() -> int:
    flags = parse_arguments()
    print(f"{'rule':6} {'rank':>4} {'pairs':>5} {'random A':>9} {'trained A':>10} {'nothing written':>16}")
    for rule in flags.rules:
        for rank in flags.ranks:
            for pairs in flags.pairs:
                model = Recall(rank, rule)
                before = recalled(model, pairs)
                train(model, pairs, flags.steps)
                after, zero = recalled(model, pairs), recalled_from_zero(model, pairs)
                print(f"{rule:6} {rank:4} {pairs:5} {before:9.1%} {after:10.1%} {zero:16.1%}", flush=True)
    return 0


if __name__ == "__main__":
    run_entry(main)
