"""Experts at every layout against one rank: loss, every gradient, grad norm, router statistics, updated weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.models.hybrid import HybridModel, ModelOutput
from megaforge.nn.moe import expert_counts
from megaforge.optim import Optimizer, clip_gradients
from megaforge.parallel.after_update import Update, after_update
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import Box, named_specs
from tests.nn.support import perturb
from tests.parallel.pool import RankPool

SEQUENCES, VOCAB, STEPS = 4, 23, 2
SHAPE = {
    "hidden_size": 16,
    "ffn_hidden_size": 12,
    "num_attention_heads": 4,
    "rwkv_head_size": 4,
    "num_experts": 8,
    "moe_router_topk": 2,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 8,
    "hybrid_layer_pattern": "RE*E",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {"moe_shared_expert_intermediate_size": 8},
    "bias, groups, global loss": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 1.7,
        "moe_router_load_balancing_type": "global_aux_loss",
    },
    "capacity": {"moe_expert_capacity_factor": 0.7, "activation": "swiglu"},
    "capacity by weight": {
        "moe_expert_capacity_factor": 0.9,
        "moe_token_drop_policy": "probs",
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": 8,
        "hybrid_layer_pattern": "*E*E",
    },
    "before the softmax, groups": {
        "moe_router_pre_softmax": True,
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
    "every expert": {"moe_router_topk": 8},
}
LAYOUTS: dict[str, tuple[int, dict[str, int], bool]] = {
    # name: ranks, sizes, sequence parallelism
    "ep2": (2, {"ep": 2}, False),
    "tp2 ep2 etp1": (2, {"tp": 2, "ep": 2, "etp": 1}, False),
    "tp2 ep2 sp": (4, {"tp": 2, "ep": 2}, True),
    "tp2 ep4 etp1 sp": (4, {"tp": 2, "ep": 4, "etp": 1}, True),
    "tp4 ep2 etp2": (4, {"tp": 4, "ep": 2, "etp": 2}, False),
}
Pieces = dict[str, list[tuple[Box, Tensor]]]


def global_batch(step: int, length: int) -> tuple[Tensor, ...]:
    """Tokens, labels, uneven loss mask and document starts, [SEQUENCES, length] each."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (SEQUENCES, length + 1), generator=generator)
    mask = (torch.rand(SEQUENCES, length, generator=generator) < 0.7).double()
    return ids[:, :-1], ids[:, 1:], mask, torch.rand(SEQUENCES, length, generator=generator) < 0.2


def pieces_of(model: nn.Module, ctx: ParallelContext, *, gradients: bool) -> Pieces:
    """What this rank holds of every (trained) tensor, by global name."""
    held: Pieces = {}
    for spec, parameter in named_specs(model):
        if parameter.requires_grad or not gradients:
            local = parameter.main_grad if gradients else parameter.detach()  # type: ignore[attr-defined]
            held[spec.name] = [(piece.global_box, piece.local_view(local).clone()) for piece in spec.pieces(ctx)]
    return held


def total_over_dp(values: Tensor, ctx: ParallelContext) -> Tensor:
    if ctx.dp.group is not None:
        dist.all_reduce(values, group=ctx.dp.group)
    return values


def loss_of(out: ModelOutput, tokens: float, length: int) -> Tensor:
    """Coefficients are large so that nothing of the auxiliary losses is hidden."""
    balance, z = out.terms["load_balance_loss"].sum, out.terms["z_loss"].sum
    return out.loss_sum / tokens + 0.5 * balance / SEQUENCES + 0.1 * z / (SEQUENCES * length)


def train(
    ctx: ParallelContext, sequence_parallel: bool, variant: str, length: int, micro: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Two optimizer steps. All forward passes of a step come before its backward passes, as in a pipeline."""
    cfg = ModelConfig(**{**SHAPE, **VARIANTS[variant]})
    cfg.validate()
    model = HybridModel(make_layer_context(cfg, ctx, sequence_parallel=sequence_parallel, dtype=dtype))
    initialize_parameters(model, ctx, seed=3)
    perturb(model, ctx)
    optimizer = Optimizer(OptimizerConfig(lr=2e-4), model, ctx)
    reducer = GradientReducer(model, ctx, bucket_size=3000)
    scalars, norms, statistics, gradients = [], [], [], []
    for step in range(STEPS):
        fields = global_batch(step, length)
        tokens = float(fields[2].sum())
        share = SEQUENCES // ctx.dp.size
        own = [field[ctx.dp.rank * share : (ctx.dp.rank + 1) * share].split(min(micro, share)) for field in fields]
        reducer.zero_grad()
        outputs = [model(*batch) for batch in zip(*own, strict=True)]
        for number, out in enumerate(outputs, 1):
            reducer.set_last_microbatch(number == len(outputs))
            loss_of(out, tokens, length).backward()
        reducer.finish_grad_sync()
        gradients.append(pieces_of(model, ctx, gradients=True))
        norms.append(clip_gradients(model, ctx, 0.5))
        optimizer.step(2e-4)
        sums = [
            torch.stack([o.loss_sum, *(term.sum for term in o.terms.values()), o.correct]).detach().double()
            for o in outputs
        ]
        scalars.append(total_over_dp(sum(sums), ctx))
        counts = sum(o.experts for o in outputs)
        statistics.append(total_over_dp(counts, ctx))
        after_update(model, Update(ctx, expert_counts(model, *statistics[-1][:2])))
    return {
        "sums": torch.stack(scalars),
        "norms": torch.tensor(norms, dtype=torch.float64),
        "tokens per expert": torch.stack(statistics),
        "gradients": gradients,
        "weights": pieces_of(model, ctx, gradients=False),
    }


def assert_pieces_agree(held: Pieces, expected: Pieces, tolerance: float, what: str) -> None:
    """Each rank's copy of each piece is the part of the one rank's tensor that it claims to be."""
    for name, pieces in held.items():
        [(_, whole)] = expected[name] if len(expected[name]) == 1 else [(None, joined(expected[name]))]
        scale = float(whole.double().norm())
        for box, piece in pieces:
            reference = whole[tuple(slice(start, stop) for start, stop in box)]
            error = float((piece.double() - reference.double()).norm()) / max(scale, 1e-30)
            assert error <= tolerance, f"{what} of {name} at {box}: relative difference {error:.2e}"


def joined(pieces: list[tuple[Box, Tensor]]) -> Tensor:
    """The one rank's tensor, whose logical parts (gate|up, q|k|v) are separate pieces."""
    shape = [max(box[dim][1] for box, _ in pieces) for dim in range(pieces[0][1].dim())]
    whole = pieces[0][1].new_zeros(shape)
    for box, piece in pieces:
        whole[tuple(slice(start, stop) for start, stop in box)] = piece
    return whole


def assert_results_agree(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for step in range(STEPS):
        assert torch.equal(got["tokens per expert"][step], expected["tokens per expert"][step])
        for name in ("sums", "norms"):
            torch.testing.assert_close(got[name][step], expected[name][step], rtol=tolerance, atol=tolerance)
        assert got["gradients"][step].keys() == expected["gradients"][step].keys()
        assert_pieces_agree(got["gradients"][step], expected["gradients"][step], tolerance, f"step {step}, gradient")
    assert_pieces_agree(got["weights"], expected["weights"], tolerance, "weight")


@functools.cache
def one_rank(variant: str, length: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return train(ParallelContext.single(), False, variant, length, 4, dtype)


def train_variants(sizes: dict[str, int], sequence_parallel: bool, length: int) -> dict[str, dict[str, Any]]:
    """All variants at one layout, for making process groups takes longer than training."""
    ctx = ParallelContext.create(**sizes)
    found = {name: train(ctx, sequence_parallel, name, length, 1, torch.float64) for name in VARIANTS}
    return found | {"fp32": train(ctx, sequence_parallel, "softmax", length, 2, torch.float32)}


def tokens_in(layout: str) -> int:
    """Without sequence parallelism the tp ranks' shares of the tokens need not be equal."""
    return 8 if LAYOUTS[layout][2] else 7


def test_one_rank_shows_what_is_compared() -> None:
    """No gradient is trivially zero, tokens are dropped, experts idle, the state moves."""
    for variant, changes in VARIANTS.items():
        result = one_rank(variant, 7)
        for name, pieces in result["gradients"][0].items():
            for box, piece in pieces:
                assert bool(piece.any()), f"{variant}: the gradient of {name} at {box} is zero"
        assigned, kept = result["tokens per expert"].sum(-1).split([2, 1], dim=1)
        assert assigned.tolist() == [[[SEQUENCES * 7 * changes.get("moe_router_topk", 2)] * 2] * 2] * STEPS
        assert bool((kept < assigned[:, :1]).any()) == ("moe_expert_capacity_factor" in changes)
        assert bool((result["norms"] > 0.5).all()), "clipping acts"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(ranks: RankPool, layout: str) -> None:
    world, sizes, sequence_parallel = LAYOUTS[layout]
    for got in ranks.run(world, train_variants, sizes, sequence_parallel, tokens_in(layout)):
        for variant in VARIANTS:
            assert_results_agree(got[variant], one_rank(variant, tokens_in(layout)), 1e-10)
        assert_results_agree(got["fp32"], one_rank("softmax", tokens_in(layout), torch.float32), 2e-5)


def idle_experts(sizes: dict[str, int]) -> tuple[Pieces, Tensor, Tensor]:
    """Every token goes to expert 0 of four: whoever holds only others joins every exchange, with zero gradients."""
    ctx = ParallelContext.create(**sizes)
    model = HybridModel(
        make_layer_context(
            ModelConfig(**{**SHAPE, "num_experts": 4, "moe_router_topk": 1, "hybrid_layer_pattern": "*E"}),
            ctx,
            dtype=torch.float64,
        )
    )
    initialize_parameters(model, ctx, seed=3)
    perturb(model, ctx)
    with torch.no_grad():
        for spec, parameter in named_specs(model):
            if spec.kind == "router":
                parameter.zero_()
    reducer = GradientReducer(model, ctx)
    reducer.zero_grad()
    share = SEQUENCES // ctx.dp.size
    fields = [field[ctx.dp.rank * share : (ctx.dp.rank + 1) * share] for field in global_batch(0, 3)]
    out = model(*fields)
    (out.loss_sum + out.terms["load_balance_loss"].sum).backward()
    reducer.finish_grad_sync()
    return (
        pieces_of(model, ctx, gradients=True),
        total_over_dp(out.loss_sum.detach(), ctx),
        total_over_dp(out.experts[0].clone(), ctx),
    )


@pytest.mark.parametrize("sizes", [{"ep": 4}, {"tp": 4, "ep": 2, "etp": 2}])
def test_experts_without_tokens(ranks: RankPool, sizes: dict[str, int]) -> None:
    """Three tokens a sequence over four tp ranks: one of them routes nothing either."""
    gradients, loss, counts = idle_experts({})
    assert counts.tolist() == [[3 * SEQUENCES, 0, 0, 0]]
    for got, got_loss, got_counts in ranks.run(4, idle_experts, sizes):
        assert torch.equal(got_counts, counts)
        torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
        assert_pieces_agree(got, gradients, 1e-10, "gradient")
