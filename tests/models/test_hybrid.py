"""The whole model on one rank."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.nn.norms import _Norm
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import named_specs
from tests.nn.support import CTX, assert_close, filled

SHAPE = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "rwkv_head_size": 8,
    "num_experts": 4,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 8,
}
PATTERNS = ["*-*-", "*E*E", "R-R-", "RERE", "RE*-R*E"]


def config(**changes: object) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})  # type: ignore[arg-type]


def model_of(dtype: torch.dtype = torch.float64, **changes: object) -> HybridModel:
    return filled(HybridModel(make_layer_context(config(**changes), CTX, dtype=dtype)))


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_equal_separate_documents(pattern: str) -> None:
    """Losses, and the gradients of all weights, of two packed sequences against their documents one by one."""
    model = model_of(hybrid_layer_pattern=pattern)
    tokens = ids(2, 24)
    labels = ids(2, 24, seed=2)
    cuts = [(0, 0, 5), (0, 5, 6), (0, 6, 24), (1, 0, 15), (1, 15, 24)]
    start = torch.zeros(2, 24, dtype=torch.bool)
    for row, begin, _ in cuts:
        start[row, begin] = True
    packed = model(tokens, labels, torch.ones(2, 24), start).loss_sum
    packed.backward()
    gradients = {spec.name: p.grad.clone() for spec, p in named_specs(model) if p.grad is not None}
    model.zero_grad()
    separate = torch.zeros((), dtype=torch.float64)
    for row, begin, end in cuts:
        piece = (slice(row, row + 1), slice(begin, end))
        separate = separate + model(tokens[piece], labels[piece], torch.ones(1, end - begin)).loss_sum
    separate.backward()
    assert_close(packed, separate, 1e-13, "loss")
    for spec, parameter in named_specs(model):
        assert_close(gradients[spec.name], parameter.grad, 1e-11, spec.name)


def test_boundaries_can_be_ignored() -> None:
    start = torch.zeros(1, 12, dtype=torch.bool)
    start[0, 6] = True
    for reset in (True, False):
        model = model_of(hybrid_layer_pattern="R-*-", reset_at_document_boundaries=reset)
        same = torch.equal(model.logits(ids(1, 12), start), model.logits(ids(1, 12)))
        assert same != reset


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("normalization", ["rmsnorm", "layernorm"])
def test_prefill_and_steps_equal_the_parallel_form(pattern: str, normalization: str) -> None:
    """LayerNorm with learned positions, of which all are used."""
    learned = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 20}
    changes = learned if normalization == "layernorm" else {}
    model = model_of(hybrid_layer_pattern=pattern, normalization=normalization, **changes)
    tokens = ids(2, 20)
    whole = model.logits(tokens)
    state = model.new_state()
    pieces = [model.logits(piece, state=state) for piece in tokens.split((9, 1, 1, 4, 1, 1, 3), dim=1)]
    assert state.length == 20
    assert_close(torch.cat(pieces, dim=1), whole, 1e-12, "logits")
    last = model.logits(tokens, last_only=True)
    assert last.shape == (2, 1, 61)
    assert_close(last, whole[:, -1:], 1e-12, "last logits")


@pytest.mark.parametrize("untied", [False, True])
def test_loss_is_the_cross_entropy_of_the_logits(untied: bool) -> None:
    model = model_of(hybrid_layer_pattern="RE*E", untie_embeddings_and_output_weights=untied)
    tokens, labels = ids(2, 10), ids(2, 10, seed=2)
    mask = (torch.arange(20).view(2, 10) % 3 > 0).double()
    out = model(tokens, labels, mask)
    logits = model.logits(tokens)
    assert logits.shape == (2, 10, 61)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 10)
    assert_close(out.loss_sum, (expected * mask).sum(), 1e-13, "loss")
    assert float(out.correct) == float(((logits.argmax(-1) == labels) * mask).sum())
    assert out.experts.shape == (3, 2, 4) and out.experts[0].sum(1).tolist() == [40, 40]


def test_a_dense_model_has_no_router_losses() -> None:
    out = model_of(hybrid_layer_pattern="R-*-")(ids(1, 5), ids(1, 5), torch.ones(1, 5))
    assert out.terms == {} and out.experts.shape == (3, 0, 0)


def test_tied_head_shares_one_parameter() -> None:
    tied, untied = (
        model_of(hybrid_layer_pattern="R-"),
        model_of(hybrid_layer_pattern="R-", untie_embeddings_and_output_weights=True),
    )
    assert tied.head.weight is tied.embedding.weight
    assert {s.name for s, _ in named_specs(untied)} - {s.name for s, _ in named_specs(tied)} == {"head.weight"}


@torch.no_grad()
@pytest.mark.parametrize("hidden", [64, 1024])
@pytest.mark.parametrize("changes", [{}, {"normalization": "layernorm", "untie_embeddings_and_output_weights": True}])
def test_the_loss_starts_near_that_of_a_guess(hidden: int, changes: dict) -> None:
    """A tied head must not begin with telling the input token back, at any width."""
    shape = {"hidden_size": hidden, "vocab_size": 2048, "rwkv_init": "normal", "rwkv_head_size": 32}
    model = HybridModel(make_layer_context(config(hybrid_layer_pattern="R-*-", **shape, **changes), CTX))
    initialize_parameters(model, CTX, seed=3)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 2048, (2, 4, 64), generator=generator)
    loss = float(model(tokens, labels, torch.ones(4, 64)).loss_sum) / tokens.numel()
    assert abs(loss - math.log(2048)) < 0.35


def test_initial_weights_follow_the_published_rules() -> None:
    model = HybridModel(
        make_layer_context(
            config(hybrid_layer_pattern="R-*-", normalization="layernorm", untie_embeddings_and_output_weights=True),
            CTX,
        )
    )
    initialize_parameters(model, CTX, seed=3)
    w = {spec.name: p.detach() for spec, p in named_specs(model)}
    assert not w["layers.0.mixer.output.weight"].any() and not w["layers.0.ffn.down.weight"].any()
    up = w["layers.0.ffn.up.weight"].double()
    assert torch.allclose(up.T @ up, torch.eye(32, dtype=torch.float64), atol=1e-5)
    head = w["head.weight"][:61].double()
    assert torch.allclose(head.T @ head, 0.25 * 61 / 32 * torch.eye(32, dtype=torch.float64), atol=1e-5)
    assert float(w["embedding.weight"].abs().max()) <= 1e-4 and not w["embedding.weight"][61:].any()
    assert abs(float(w["layers.1.mixer.output.weight"].std()) / (0.02 / math.sqrt(4)) - 1) < 0.1
    assert abs(float(w["layers.1.ffn.up.weight"].std()) / 0.02 - 1) < 0.1
    expected = 1 - (torch.arange(32) / 32.0)
    assert torch.allclose(w["layers.0.ffn.x_k"], expected, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_norms_that_add_to_the_stream_change_no_number(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a user's norm that cannot: losses and gradients to the bit, of every kind of block."""
    results = []
    for takes_update in (True, False):
        monkeypatch.setattr(_Norm, "takes_update", takes_update)
        layer = make_layer_context(config(hybrid_layer_pattern="RE*-*"), CTX)
        model = HybridModel(replace(layer, recompute=recompute))
        initialize_parameters(model, CTX, seed=3)
        total = model(ids(2, 16), ids(2, 16, seed=2), torch.ones(2, 16)).loss_sum
        total.backward()
        results.append([total.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("pattern", ["RE*-", "*-"])
def test_bf16_follows_fp32(pattern: str) -> None:
    wide, narrow = (
        model_of(torch.float32, hybrid_layer_pattern=pattern),
        model_of(torch.bfloat16, hybrid_layer_pattern=pattern),
    )
    kept = {spec.name for spec, p in named_specs(narrow) if p.dtype == torch.float32}
    assert "final_norm.weight" in kept and "layers.0.mixer_norm.weight" in kept
    out = narrow(ids(2, 16), ids(2, 16, seed=2), torch.ones(2, 16))
    expected = wide(ids(2, 16), ids(2, 16, seed=2), torch.ones(2, 16))
    assert out.loss_sum.dtype == torch.float32
    assert abs(float(out.loss_sum / expected.loss_sum) - 1) < 0.05
    out.loss_sum.backward()
    for spec, parameter in named_specs(narrow):
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), spec.name
