"""Routing Mamba: against a dense, written-out oracle; generation, documents, capacity, what is counted and refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import parse_config
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.flops import active_matmul_parameters
from megaforge.models.hybrid import HybridModel
from megaforge.models.parameter_count import count_parameters
from megaforge.nn.mamba2 import Mamba2State
from megaforge.nn.routed_mamba2 import RoutedMamba2Mixer
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import named_specs
from megaforge.registry import LAYER_KINDS
from tests.nn.support import CTX, assert_agrees, assert_close, filled, layer_context, random

CFG = ModelConfig(
    hidden_size=16, mamba_state_dim=6, mamba_head_dim=4, mamba_num_groups=2, num_experts=4, moe_router_topk=2
)
VARIANTS: dict[str, dict[str, object]] = {
    "two of four": {},
    "before the softmax, one": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk": 3},
    "every expert": {"moe_router_topk": 4},
    "capacity": {"moe_expert_capacity_factor": 0.6},
    "biases": {"add_bias_linear": True},
}


def layer(cfg: ModelConfig = CFG, **facts: object) -> RoutedMamba2Mixer:
    return filled(LAYER_KINDS.get("O").build(layer_context(cfg, **facts)), "mixer")  # type: ignore[arg-type]


def routed(cfg: ModelConfig, x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """(Which experts each token uses, what it weighs them with), [s, b, E] each."""
    logits = x @ router.t()
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(-1, logits.topk(cfg.moe_router_topk, dim=-1).indices, True)
    if cfg.moe_router_score_function == "sigmoid":
        scores = logits.sigmoid() * chosen
        weights = scores / scores.sum(-1, keepdim=True)
    elif cfg.moe_router_pre_softmax:
        weights = logits.softmax(-1) * chosen
    else:
        weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    if cfg.moe_expert_capacity_factor is not None:
        room = -(-cfg.moe_expert_capacity_factor * cfg.moe_router_topk * len(x) // cfg.num_experts)
        chosen = chosen & (chosen.cumsum(0) <= room)
    return chosen.to(x.dtype), weights * chosen


def oracle(cfg: ModelConfig, x: Tensor, weights: dict[str, Tensor], starts: Tensor | None = None) -> Tensor:
    """Every expert on every token, one token after the other."""
    w = {name.removeprefix("mixer."): weight for name, weight in weights.items()}
    length, batch = x.shape[:2]
    heads, width, state_dim, groups = cfg.mamba_heads, cfg.mamba_head_dim, cfg.mamba_state_dim, cfg.mamba_num_groups
    inner, shared = heads * width, groups * state_dim
    used, weight = routed(cfg, x, w["router.weight"])
    z, given = (torch.einsum("sbh,eoh,sbe->sbo", x, w["expert_input.weight"], used)).split(inner, -1)
    both = x @ w["input.weight"].t() + w.get("input.bias", torch.zeros(1, dtype=x.dtype))
    b_c, step = both.split((2 * shared, heads), -1)
    taken = torch.cat([given, b_c], -1)
    state = x.new_zeros(batch, heads, width, state_dim)
    out = []
    for t in range(length):
        convolved = w["conv_bias"].expand(batch, -1)
        seen = torch.ones(batch, dtype=torch.bool)
        for back in range(4):
            if back > t:
                break
            convolved = convolved + taken[t - back] * w["conv_weight"][:, -1 - back] * seen[:, None]
            if starts is not None:
                seen = seen & ~starts[:, t - back]
        if starts is not None:
            state = state * ~starts[:, t, None, None, None]
        value, b, c = F.silu(convolved).split((inner, shared, shared), -1)
        value = value.view(batch, heads, width)
        b, c = (each.view(batch, groups, state_dim).repeat_interleave(heads // groups, 1) for each in (b, c))
        dt = F.softplus(step[t] + w["dt_bias"])
        state = (
            state * (-w["a_log"].exp() * dt).exp()[..., None, None] + (dt[..., None] * value)[..., None] * b[:, :, None]
        )
        y = (state * c[:, :, None]).sum(-1) + w["skip"][:, None] * value
        gated = (y.flatten(1) * F.silu(z[t])).view(batch, groups, -1)
        normed = gated / (gated.square().mean(-1, keepdim=True) + cfg.norm_epsilon).sqrt()
        out.append(normed.flatten(1) * w["norm_weight"])
    return torch.einsum("sbi,ehi,sbe->sbh", torch.stack(out), w["output.weight"], weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_expert_on_every_token_gives_the_same(variant: str) -> None:
    cfg = dataclasses.replace(CFG, **VARIANTS[variant])  # type: ignore[arg-type]
    mixer = layer(cfg)
    starts = torch.zeros(2, 19, dtype=torch.bool)
    starts[0, [1, 2, 11]] = starts[1, 7] = True
    info = PackedSequence(2, 19, torch.device("cpu"), starts)
    assert_agrees(
        mixer, lambda x: mixer(x, info).update, lambda x, w: oracle(cfg, x, w, starts), random(19, 2, 16), 1e-11
    )


@pytest.mark.parametrize("x", [random(1, 1, 16), random(1, 2, 16).expand(9, 2, 16), 1e4 * random(9, 1, 16)])
def test_one_token_alike_rows_and_large_values(x: Tensor) -> None:
    mixer = layer()
    info = PackedSequence(x.shape[1], len(x), x.device)
    with torch.no_grad():
        weights = {spec.name: p for spec, p in named_specs(mixer)}
        assert_close(mixer(x, info).update, oracle(CFG, x, weights), 1e-11, "update")


def test_a_token_that_every_expert_drops_keeps_its_place_in_the_state() -> None:
    """Alike tokens want the same experts, which take the first of them: later ones give nothing and decay the state."""
    cfg = dataclasses.replace(CFG, moe_expert_capacity_factor=0.5)
    mixer, x = layer(cfg), random(1, 1, 16).expand(8, 1, 16).contiguous()
    update = mixer(x, PackedSequence(1, 8, x.device)).update
    assert bool(update[:2].any(-1).all()) and not update[2:].any()
    assert bool(mixer.eval()(x, PackedSequence(1, 8, x.device)).update.any(-1).all()), "evaluation drops nothing"


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,) * 9, (2, 1, 70, 3)])
def test_pieces_continue_each_other(cuts: tuple[int, ...]) -> None:
    mixer = layer().eval()
    x = random(sum(cuts), 2, 16)
    whole = mixer(x, PackedSequence(2, len(x), x.device)).update
    state, out, offset = Mamba2State(), [], 0
    for piece in x.split(list(cuts)):
        out.append(mixer(piece, PackedSequence(2, len(piece), x.device, offset=offset), {}, state).update)
        offset += len(piece)
    assert_close(torch.cat(out), whole, 1e-12, "update")


def test_the_future_is_not_seen() -> None:
    mixer, x = layer(), random(80, 1, 16)
    changed = x.clone()
    changed[66:] += 1
    before, after = (mixer(each, PackedSequence(1, 80, x.device)).update for each in (x, changed))
    assert_close(before[:66], after[:66], 1e-13, "update")  # other rows an expert, other products
    assert float((before[66] - after[66]).detach().abs().max()) > 1e-3


def model(**settings: object) -> ModelConfig:
    facts: dict[str, object] = {"hybrid_layer_pattern": "OEM-", "vocab_size": 61, "make_vocab_size_divisible_by": 1}
    return dataclasses.replace(CFG, **(facts | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    def run(how: str) -> list[Tensor]:
        whole = filled(HybridModel(make_layer_context(model(), CTX, dtype=torch.float64, recompute=how)))
        tokens = torch.arange(40)[None] % 61
        out = whole(tokens, tokens.roll(-1, 1), torch.ones(1, 40))
        (out.loss_sum + sum(term.sum for term in out.terms.values())).backward()
        return [p.grad for _, p in named_specs(whole) if p.grad is not None]

    for plain, again in zip(run("none"), run(recompute), strict=True):
        assert torch.equal(plain, again)


def test_layers_may_have_other_numbers_of_experts() -> None:
    """Counts are as wide as the largest layer's; each layer's router learns of its own."""
    cfg = model(rom_num_experts=6, rom_router_topk=3)
    whole = filled(HybridModel(make_layer_context(cfg, CTX, dtype=torch.float64)))
    tokens = torch.arange(40)[None] % 61
    out = whole(tokens, tokens.roll(-1, 1), torch.ones(1, 40))
    assert whole.experts.experts == (6, 4) and out.experts.shape == (3, 2, 6)
    assert out.experts[0].sum(1).tolist() == [120, 80] and not out.experts[:, 1, 4:].any()


def test_parameters_and_flops_are_counted() -> None:
    cfg = model(rom_num_experts=8, rom_router_topk=2)
    [mamba] = [count for count in count_parameters(cfg) if count.component == "Mamba-2 mixers"]
    small = 56 * 4 + 56 + 3 * 8 + 32
    shared, expert = 16 * (12 + 12 + 8), 16 * 64 + 32 * 16
    dense = 16 * 96 + 32 * 16 + small
    assert mamba.stored == shared + 8 * expert + small + dense
    assert mamba.active == shared + 2 * expert + small + dense
    plain = active_matmul_parameters(HybridModel(make_layer_context(model(rom_num_experts=8), CTX)))
    fewer = active_matmul_parameters(
        HybridModel(make_layer_context(model(rom_num_experts=8, rom_router_topk=1, moe_router_pre_softmax=True), CTX))
    )
    assert plain - fewer == expert


def test_what_is_declared() -> None:
    specs = {spec.name.removeprefix("mixer."): spec for spec, _ in named_specs(layer())}
    expert_input, output = specs["expert_input.weight"], specs["output.weight"]
    assert (expert_input.shape, expert_input.parts, expert_input.shard_dim) == ((4, 64, 16), (32, 32), 1)
    assert (output.shape, output.shard_dim, output.shard_axis) == ((4, 16, 32), 2, "etp")
    assert {spec.kind for spec in (expert_input, output)} == {"mamba"} and specs["router.weight"].kind == "router"
    assert {n for n, s in specs.items() if s.update == "matrix"} == {
        "expert_input.weight",
        "input.weight",
        "output.weight",
    }


@pytest.mark.parametrize(
    "flags,ranks,message",
    [
        (["--rom-router-topk", "9"], 1, "Routing Mamba layers .*--rom-router-topk 9.* exceeds --num-experts 4"),
        (["--rom-router-topk", "1"], 1, "the softmax of one chosen expert is always 1"),
        (["--rom-num-experts", "6", "--ep", "2"], 2, None),
        (["--rom-num-experts", "3", "--ep", "2"], 2, "--ep 2 does not divide both --rom-num-experts 3 .* use --ep 1"),
        (["--mamba-num-groups", "2", "--tp", "4"], 4, "--tp 4 does not divide --mamba-num-groups 2"),
        (["--mamba-num-heads", "6", "--mamba-num-groups", "2", "--mamba-head-dim", "1", "--etp", "4"], 4,
         "--etp 4 does not divide both the 6 channels of Mamba-2's heads"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(flags: list[str], ranks: int, message: str | None) -> None:
    line = ["--hidden-size", "64", "--num-attention-heads", "4", "--vocab-size", "64", "--hybrid-layer-pattern", "O-*-"]
    line += ["--seq-length", "64", "--mamba-head-dim", "16", "--num-experts", "4", *flags]

    def check() -> None:
        check_layout(parse_config(line).config, ranks)

    if message is None:
        return check()
    with pytest.raises(UserError, match=message):
        check()
