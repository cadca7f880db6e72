"""Multi-token prediction against a dense model written out from the model's own layers, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.config.mtp_config import MultiTokenConfig
from megaforge.models.ahead import embedding_is_shared, make_multi_token
from megaforge.models.hybrid import HybridModel
from megaforge.models.multi_token import Blocks, SequentialDepth
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import named_specs
from tests.nn.support import CTX, assert_close, filled

SHAPE = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "rwkv_head_size": 8,
    "mamba_head_dim": 8,
    "mamba_state_dim": 6,
    "mamba_num_groups": 2,
    "num_experts": 4,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 8,
}
MODES = ["sequential", "parallel"]


def model_of(mode: str, pattern: str, depths: int | None = None, **changes: object) -> HybridModel:
    asked = {"hybrid_layer_pattern": pattern, "mtp_mode": mode, "mtp_num_layers": depths}
    cfg = ModelConfig(**{**SHAPE, **asked, **changes})  # type: ignore[arg-type]
    return filled(HybridModel(make_layer_context(cfg, CTX, dtype=torch.float64)))


def window(batch: int, length: int, ahead: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 61, (batch, length + 1 + ahead), generator=generator)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def written_out(model: HybridModel, tokens: Tensor, masks: list[Tensor], info: PackedSequence) -> list[Tensor]:
    """The loss sums of further predictions, from whole matrices and whole logits, one place after another."""
    weights = {spec.name: parameter for spec, parameter in named_specs(model)}
    head = weights["head.weight" if "head.weight" in weights else "embedding.weight"][:61]
    length, cfg = info.length, model.cfg
    x = model.embedded(tokens[:, :length], info)
    carried: dict[str, Tensor] = {}
    for block in model.blocks:
        before = x
        x, carried, _ = block(x, info, carried)
    hidden, sums = rms(x, weights["final_norm.weight"]), []
    assert model.mtp is not None
    for number, (depth, mask) in enumerate(zip(model.mtp.depths, masks, strict=True), start=1):
        if cfg.mtp_mode == "sequential":
            own = f"mtp.depths.{number - 1}."
            looked_up = weights["embedding.weight"][tokens[:, number : number + length].t()]
            first, second = weights[own + "project.weight"].chunk(2, dim=1)
            y = rms(looked_up, weights[own + "embedding_norm.weight"]) @ first.t()
            y = y + rms(hidden, weights[own + "hidden_norm.weight"]) @ second.t()
            assert isinstance(depth, SequentialDepth)
            hidden = rms(depth.layers(y, info)[0], weights[own + "final_norm.weight"])
            seen = hidden
        else:
            assert isinstance(depth, Blocks)
            seen = rms(depth(before, info)[0], weights["final_norm.weight"])
        logits = (seen @ head.t()).transpose(0, 1).flatten(0, 1)
        labels = tokens[:, number + 1 : number + 1 + length].flatten()
        sums.append((F.cross_entropy(logits, labels, reduction="none") * mask.flatten()).sum())
    return sums


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "pattern,depths,length,untied",
    [("*-*E", 2, 12, False), ("R-*-/R-*E/R-*E", None, 12, True), ("M-*-", 3, 1, False), ("*-/M-", None, 7, False)],
)
def test_it_is_what_the_papers_write(mode: str, pattern: str, depths: int | None, length: int, untied: bool) -> None:
    """Losses and every gradient, of packed documents, a mask with zeros, and sequences of one token."""
    model = model_of(mode, pattern, depths, untie_embeddings_and_output_weights=untied)
    assert model.mtp is not None
    count = len(model.mtp.depths)
    tokens = window(2, length, count)
    start = torch.zeros(2, length, dtype=torch.bool)
    start[0, length // 2], start[:, 0] = True, True
    generator = torch.Generator().manual_seed(5)
    masks = [torch.randint(0, 2, (2, length), generator=generator).double() for _ in range(count)]
    masks[-1][:] = 1.0
    inputs = tokens[:, :length], tokens[:, 1 : 1 + length], torch.ones(2, length)
    later = [(tokens[:, n + 1 : n + 1 + length], mask) for n, mask in enumerate(masks, start=1)]
    output, _ = model.run_stage(*inputs, model.pack(inputs[0], start), later)
    found = [output.terms[f"mtp_loss/{n}"].sum for n in range(1, count + 1)]
    expected = written_out(model, tokens, masks, model.pack(inputs[0], start))
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    gradients = []
    for losses in (found, expected):
        model.zero_grad()
        sum(n * loss for n, loss in enumerate(losses, start=1)).backward()  # type: ignore[union-attr]
        gradients.append({spec.name: p.grad for spec, p in named_specs(model) if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        if bool(gradient.abs().max() > 1e-12):
            assert_close(gradients[0][name], gradient, 1e-10, name)


def test_without_later_labels_nothing_is_predicted_and_experts_count_nothing() -> None:
    model = model_of("sequential", "*E/*E/*E")
    tokens = window(2, 6, 2)
    assert model.num_moe_layers == 3
    output = model(tokens[:, :6], tokens[:, 1:7], torch.ones(2, 6))
    assert not [name for name in output.terms if name.startswith("mtp")]
    assert output.experts.shape == (3, 3, 4)
    assert int(output.experts[0, 0].sum()) == 24 and not bool(output.experts[:, 1:].any())


@pytest.mark.parametrize("mode", MODES)
def test_losses_have_the_weight_that_flags_give(mode: str) -> None:
    assert MultiTokenConfig().mtp_weight(4) == 0.025
    tokens = window(1, 4, 2)
    later = [(tokens[:, n : n + 4], torch.ones(1, 4)) for n in (2, 3)]
    for flags, weight in (({}, {"sequential": 0.05, "parallel": 1.0}[mode]), ({"mtp_loss_scaling_factor": 0.6}, 0.3)):
        model = model_of(mode, "*-", 2, **flags)
        output, _ = model.run_stage(tokens[:, :4], tokens[:, 1:5], torch.ones(1, 4), None, later)
        assert [output.terms[f"mtp_loss/{n}"].weight for n in (1, 2)] == pytest.approx([weight] * 2)


def test_a_model_without_it_is_the_same_model() -> None:
    """Further predictions neither move the model's own initial weights nor are they there unasked."""
    plain, more = (model_of("sequential", "R-*-", depths) for depths in (None, 2))
    assert plain.mtp is None and make_multi_token(make_layer_context(plain.cfg, CTX), None) is None
    own = {spec.name: p for spec, p in named_specs(more)}
    for spec, parameter in named_specs(plain):
        assert torch.equal(parameter, own.pop(spec.name)), spec.name
    assert own and all(name.startswith("mtp.") for name in own)
    assert embedding_is_shared(plain.cfg)
    untied = {"untie_embeddings_and_output_weights": True}
    assert [embedding_is_shared(model_of(mode, "*-", 1, **untied).cfg) for mode in MODES] == [True, False]
    assert not embedding_is_shared(model_of("sequential", "*-", **untied).cfg)
