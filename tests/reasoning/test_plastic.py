"""Plastic adapters: against the rule applied token by token, at every layout, in generation, and what they recall."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.config.plastic_config import PlasticConfig
from megaforge.errors import UserError
from megaforge.models.generation_state import chosen, side_by_side
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.layers import ColumnParallelLinear
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.peft.targets import Target
from megaforge.reasoning.correlation import CorrelationLoss, correlation
from megaforge.reasoning.fast_weights import FastWeights, PlasticState
from megaforge.reasoning.plastic import PlasticAdapter, Plasticity, adapt, adapters
from megaforge.reasoning.rules import Step, hebb
from megaforge.reasoning.segments import segments_of
from megaforge.registry import PLASTIC_RULES
from tests.nn.support import CTX, filled, layer_context, perturb, random
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, observed, trainer_of
from tests.training.tiny import VOCAB, arguments, make_config, write_dataset

MODEL = ("--hybrid-layer-pattern", "RE*-M-", "--activation", "swiglu", "--moe-aux-loss-coeff", "0.1")
SIZES = ("--mamba-state-dim", "8", "--mamba-head-dim", "8", "--mamba-num-groups", "4")
PLASTIC = ("--peft", "plastic", "--plastic-rank", "3", "--plastic-chunk", "4", "--plastic-alpha", "0.7")
SHORT = ("--train-iters", "2", "--fp64", "--lr", "1e-2", "--micro-batch-size", "1", "--global-batch-size", "4")
LAYOUTS = (
    (4, ("--tp", "2", "--sp", "--cp", "2")),
    (4, ("--tp", "2", "--pp", "2", "--zero", "2", "--recompute", "full")),
)
RULES = ("hebb", "oja", "delta")


def by_hand(
    z: Tensor,
    u: Tensor,
    positions: list[int],
    chunk: int,
    rule: str,
    alpha: float,
    rate: float,
    decay: float,
    clamp: float,
    seen: list[Tensor] | None = None,
) -> Tensor:
    """z [s, out] and u [s, r] of one sequence -> y, by the definition; ``seen`` gets the B of each token."""
    fasts = [] if seen is None else seen
    fast = z.new_zeros(z.shape[1], u.shape[1])
    out: list[Tensor] = []
    pending: list[Tensor] = []
    for t, position in enumerate(positions):
        if position == 0:
            fast, pending = torch.zeros_like(fast), []
        elif position % chunk == 0:
            fast, pending = decay * fast + rate * torch.stack(pending).mean(0), []
        fasts.append(fast)
        read = alpha * fast.clamp(-clamp, clamp) @ u[t]
        out.append(z[t] + read)
        written = {"hebb": u[t], "oja": u[t] - fast.T @ z[t]}
        pending.append(torch.outer(z[t] - read, u[t]) if rule == "delta" else torch.outer(z[t], written[rule]))
    return torch.stack(out)


def small_layer(rule: str, rank: int = 3, width: int = 8, out: int = 6, **how: float) -> tuple[Any, PlasticAdapter]:
    cfg = make_config(["--vocab-size", "64", "--data-path", "mock://"]).model
    layer = ColumnParallelLinear(layer_context(cfg), width, out, init=Normal(0.5), bias=True)
    known = {"alpha": 0.7, "rate": 0.8, "decay": 0.9, "clamp": 0.6} | how
    adapter = adapt([Target("layer", layer)], rank, CTX, Plasticity(PLASTIC_RULES.get(rule), **known))
    return filled(layer, "layer"), adapter


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [(7, 1, 4, 5), (17,), (1,) * 17], ids=str)
def test_a_layer_is_the_rule_token_by_token(rule: str, lengths: tuple[int, ...]) -> None:
    """Documents of one token, of less than a chunk, of several; values beyond the clamp; gradients."""
    layer, adapter = small_layer(rule)
    starts = torch.zeros(2, 17, dtype=torch.bool)
    positions = [p for n in lengths for p in range(n)]
    starts[1, [t for t, p in enumerate(positions) if p == 0]] = True
    adapter.segments = segments_of(PackedSequence(2, 17, torch.device("cpu"), starts), 4)
    x = random(17, 2, 8).mul_(2)
    results = []
    for of in (lambda x: layer(x), lambda x: _oracle(layer, adapter, x, rule, [list(range(17)), positions])):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        y = of(own)
        (y * random(17, 2, 6, seed=3)).sum().backward()
        results.append([y.detach(), own.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def _oracle(layer: Any, adapter: PlasticAdapter, x: Tensor, rule: str, positions: list[list[int]]) -> Tensor:
    z, how = F.linear(x, layer.weight, layer.bias), adapter.plasticity
    u = F.normalize(F.linear(x, adapter.A), dim=-1)
    rows = [
        by_hand(z[:, b], u[:, b], positions[b], 4, rule, how.alpha, how.rate, how.decay, how.clamp) for b in range(2)
    ]
    return torch.stack(rows, 1)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def train(argv: list[str]) -> dict[str, Any]:
    return observed(trainer_of(argv))


def flags(prefix: str, *more: str) -> list[str]:
    """Of Oja's rule, and of the correlation objective, which sum over tokens and over features."""
    summed = ("--plastic-rule", "oja", "--plastic-rate", "0.1", "--plastic-correlation", "0.3")
    return arguments(prefix, *MODEL, *SIZES, *SHORT, *PLASTIC, *summed, *more)


@pytest.fixture(scope="module")
def one_rank(prefix: str) -> dict[str, Any]:
    found = train(flags(prefix))
    assert all("correlation_loss" in one for one in found["records"] if one["kind"] == "step")
    return found


@pytest.mark.parametrize(
    ("world", "layout"), LAYOUTS, ids=lambda value: "".join(value) if isinstance(value, tuple) else ""
)
def test_the_layout_changes_nothing(
    ranks: RankPool, prefix: str, one_rank: dict[str, Any], world: int, layout: tuple[str, ...]
) -> None:
    """Loss, every gradient, every update."""
    compare(ranks.run(world, train, flags(prefix, *layout)), one_rank, 1e-10)


def small_model(*more: str) -> HybridModel:
    cfg = make_config(arguments("none", *MODEL, *SIZES, "--vocab-size", str(VOCAB), *more)).model
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(cfg, ctx, dtype=torch.float64))
    initialize_parameters(model, ctx, seed=1)
    perturb(model, ctx, 0.05)
    return model.eval()


@pytest.mark.parametrize("rule", RULES)
def test_generation_is_the_parallel_form(rule: str) -> None:
    """However the tokens come: many, one, none beyond a chunk's end; brought back to an earlier point, bit for bit."""
    model = small_model(*PLASTIC, "--plastic-rule", rule)
    tokens = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.logits(tokens)
        state, parts, start = model.new_state(), [], 0
        for stop in (3, 4, 5, 12, 13, 19):
            if start == 5:
                back = state.mark()
                model.logits(tokens[:, 5:9].flip(1), state=state)
                back()
            parts.append(model.logits(tokens[:, start:stop], state=state))
            start = stop
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)


def test_what_is_trained_and_what_has_none() -> None:
    model = small_model(*PLASTIC)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    paths = {path for path, _ in adapters(model)}
    assert trained and all(".plastic." in name and name.endswith("A") for name in trained)
    assert {"layers.0.mixer.receptance", "layers.1.mixer.qkv", "layers.1.ffn.down", "layers.2.mixer.input"} <= paths
    assert not any(path.startswith("layers.0.ffn") for path in paths), "experts have none"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--peft-targets", "moe"), "--peft-targets moe: plastic adapters stand beside dense matrices, not experts'"),
        (("--peft-targets", "q_prj"), "--peft-targets q_prj: no matrix of this model"),
        (("--plastic-rank", "640"), r"--plastic-rank 640: the matrix \S+ is \d+ x \d+; use at most"),
        (("--plastic-rule", "heb"), "did you mean hebb"),
    ],
)
def test_bad_input_is_named(more: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        small_model("--peft", "plastic", *more)


def test_pairs_are_recalled_from_what_was_written() -> None:
    """As the example does, with fewer steps: as many pairs as B has columns; nothing without what was written."""
    recall = load("reasoning/recall")
    model = recall.Recall(8, "hebb")
    before = recall.recalled(model, 8)
    recall.train(model, 8, 60)
    assert recall.recalled(model, 8) >= 0.95 > 0.8 > before
    assert recall.recalled_from_zero(model, 8) <= 0.1


def load(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    kept = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = kept
    return module


def test_hebb_is_a_step_down_the_correlation_objective() -> None:
    """With decay: of -<z, B u> + (1 - decay) / (2 rate) ||B||^2, by the gradient."""
    fast, z, u, decay, rate = (
        random(2, 6, 3).requires_grad_(),
        random(2, 1, 6, seed=1),
        random(2, 1, 3, seed=2),
        0.9,
        0.5,
    )
    counts, shrink = torch.ones(2, 1, 1, 1, dtype=torch.float64), (1 - decay) / (2 * rate)
    objective = correlation(fast[:, None], z[:, None], u[:, None], counts, shrink)
    torch.testing.assert_close(objective, -(z * (u @ fast.mT)).sum() + shrink * fast.square().sum())
    (gradient,) = torch.autograd.grad(objective, fast)
    zu = z.mT @ u
    step = Step(fast, 9.0, 1.0, zu, lambda: u.mT @ u, z, torch.clone, torch.clone)
    torch.testing.assert_close(decay * fast + rate * hebb(step), fast - rate * gradient)


@pytest.mark.parametrize("rule", RULES)
def test_the_correlation_objective_token_by_token(rule: str) -> None:
    """Its value and gradients, with padding, and documents of one token and of several chunks; nothing of it where
    nobody trains."""
    layer, adapter = small_layer(rule, correlated=True)
    how, x = adapter.plasticity, random(17, 2, 8).mul_(2)
    positions = [list(range(17)), [0, *range(12), *range(4)]]
    starts, used = torch.zeros(2, 17, dtype=torch.bool), torch.ones(2, 17, dtype=torch.bool)
    starts[1, [1, 13]], used[1, 13:] = True, False
    info = PackedSequence(2, 17, torch.device("cpu"), starts)
    info.used_BS = used
    adapter.segments = segments_of(info, 4)

    def ours(x: Tensor) -> Tensor:
        adapter.losses = []
        layer(x)
        return CorrelationLoss(adapter.losses).sums[0]

    def theirs(x: Tensor) -> Tensor:
        z, u = F.linear(x, layer.weight, layer.bias), F.normalize(F.linear(x, adapter.A), dim=-1)
        total, shrink = z.new_zeros(()), (1 - how.decay) / (2 * how.rate)
        for b in range(2):
            fasts: list[Tensor] = []
            given = (z[:, b], u[:, b], positions[b], 4, rule, how.alpha, how.rate, how.decay, how.clamp)
            by_hand(*given, seen=fasts)
            for t in range(17):
                if used[b, t]:
                    total = total - z[t, b].detach() @ fasts[t] @ u[t, b] + shrink * fasts[t].square().sum()
        return total

    results = []
    for of in (ours, theirs):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        value = of(own)
        value.backward()
        results.append([value.detach(), own.grad, adapter.A.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    adapter.eval()
    adapter.losses = []
    layer(x)
    assert not adapter.losses


def test_branches_are_runs_of_their_own() -> None:
    """Three branches of one text, each with its own tokens, side by side and one after the other."""
    model = small_model(*PLASTIC)
    tokens = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, :6] = tokens[0, :6]
    with torch.no_grad():
        state = model.new_state()
        model.logits(tokens[:1, :6], state=state)
        plastic = [layer for layer in state.layers if isinstance(layer, PlasticState)]
        assert plastic and all(isinstance(one, FastWeights) and one.fast is not None for p in plastic for one in p.fast)
        branches = chosen(state, torch.tensor([0, 0, 0]))
        together = model.logits(tokens[:, 6:], state=branches)
        for number in range(3):
            alone = model.logits(tokens[number : number + 1, 6:], state=chosen(state, torch.tensor([0])))
            torch.testing.assert_close(alone[0], together[number], rtol=1e-10, atol=1e-12)
        again = side_by_side([chosen(branches, torch.tensor([row])) for row in (2, 0)])
        one = model.logits(tokens[:2, :1], state=again)
        other = model.logits(tokens[:2, :1], state=chosen(branches, torch.tensor([2, 0])))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="--cuda-graph: fast weights"):
        plastic[0].slots(1, 1)


def test_numbers_out_of_bounds_are_named() -> None:
    bounds = {"plastic_decay": "1.5", "plastic_rank": "0", "plastic_alpha": "0", "plastic_clamp": "-1"}
    assert bounds.keys() <= {field.name for field in fields(PlasticConfig)}
    for name, value in bounds.items():
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(UserError, match=f"{flag} {value}"):
            make_config(arguments("none", "--peft", "plastic", f"{flag}={value}"))
