"""The fused step of decoding gives the scores of training's forward pass, whatever the model is made of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.inference import fused_step
from megaforge.inference.few_tokens import multiply_few_tokens_fast
from megaforge.inference.fused_step import FusedStep
from megaforge.inference.staged import StagedModel
from megaforge.kernels.decode import is_compiled
from megaforge.models.generation_state import GenerationState, chosen, side_by_side
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.layers import linears
from megaforge.parallel.linear_op import PlainLinear
from megaforge.quant.packed import pack_model
from tests.nn.support import CTX, filled

pytestmark = pytest.mark.skipif(not is_compiled("cpu"), reason="no compiled code: layers compute one after the other")

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 4,
    "rwkv_head_size": 12,
    "num_experts": 4,
    "moe_router_topk": 2,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "RWKV-7": {"hybrid_layer_pattern": "R-R-R-", "normalization": "layernorm", "activation": "relu2"},
    "Llama": {"hybrid_layer_pattern": "*-*-", "num_query_groups": 2, "activation": "swiglu"},
    "GPT": {
        "hybrid_layer_pattern": "*-*-", "normalization": "layernorm", "activation": "gelu", "add_bias_linear": True,
        "position_embedding_type": "learned_absolute", "max_position_embeddings": 64,
    },
    "heads": {
        "hybrid_layer_pattern": "*-*", "qk_layernorm": True, "rotary_interleaved": True, "rotary_percent": 0.5,
        "num_query_groups": 1, "activation": "gelu_exact", "sub_norm": True, "add_qkv_bias": True,
    },
    "CDRmix": {"hybrid_layer_pattern": "RE*-RER*E", "activation": "relu2"},
    "experts": {
        "hybrid_layer_pattern": "RE*E", "activation": "gated_relu2", "moe_shared_expert_intermediate_size": 24,
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "sub_norm": True,
        "untie_embeddings_and_output_weights": True,
    },
}  # fmt: skip


def model_of(name: str, dtype: torch.dtype = torch.float32) -> HybridModel:
    layer = make_layer_context(ModelConfig(**{**SHAPE, **MODELS[name]}), CTX, dtype=dtype)
    return filled(HybridModel(layer)).eval()


def packed_model_of(name: str, scheme: str) -> HybridModel:
    """Of widths that make whole panels, its matrices packed codes."""
    wide = {"hidden_size": 64, "ffn_hidden_size": 128, "rwkv_head_size": 16, "quantize_weights": scheme}
    layer = make_layer_context(ModelConfig(**{**SHAPE, **MODELS[name], **wide}), CTX)
    model = filled(HybridModel(layer)).eval()
    assert pack_model(model, kernels=True)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def stepped(model: HybridModel, texts: Tensor, prompt: int, state: GenerationState | None = None) -> Tensor:
    """Scores after each token from ``prompt`` on, by the step: [b, s - prompt, V]."""
    step, state = FusedStep(model), model.new_state() if state is None else state
    with torch.no_grad():
        if state.length == 0:
            model.logits(texts[:, :prompt], state=state)
        scores = []
        for token in texts[:, prompt:].split(1, dim=1):
            assert step.takes(token, state)
            scores.append(step.logits(token, state))
    return torch.stack(scores, 1)


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_states_are_those_of_the_parallel_form(name: str) -> None:
    """Of 1, 3 and 8 sequences; and what is remembered after many tokens."""
    model = model_of(name)
    for batch in (1, 3, 8):
        texts = tokens(batch, 24 if batch == 3 else 9, seed=batch)
        state, whole = model.new_state(), model.new_state()
        got = stepped(model, texts, 4, state := GenerationState(model.new_state().layers))
        with torch.no_grad():
            want = model.logits(texts, state=whole)[:, 4:]
        assert error(got, want) <= 1e-5, (name, batch)
        assert state.length == whole.length
        for own, other in zip(state.layers, whole.layers, strict=True):
            for key, value in ({} if other is None else vars(other)).items():
                mine = getattr(own, key)
                if key in ("keys", "values"):
                    mine, value = mine[:, :, : state.length], value[:, :, : whole.length]
                if isinstance(value, Tensor):
                    assert error(mine, value) <= 1e-5, (name, key)
                else:
                    assert mine == value, (name, key)


@pytest.mark.parametrize("name", ["RWKV-7", "Llama", "CDRmix", "experts"])
def test_bf16_is_as_near_as_the_layers_in_bf16(name: str) -> None:
    model, texts = model_of(name, torch.bfloat16), tokens(3, 12)
    wide = model_of(name)
    wide.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    with torch.no_grad():
        want, plain = wide.logits(texts)[:, 4:], model.logits(texts)[:, 4:]
    got = stepped(model, texts, 4)
    assert got.dtype == torch.bfloat16
    assert error(got, want) <= 1.2 * error(plain, want)


def test_sequences_of_different_lengths() -> None:
    """Each sequence has positions of its own, and sees none of the places that it has not used."""
    model, texts = model_of("CDRmix"), [tokens(1, length, seed=length) for length in (9, 4, 6)]
    states = []
    for text in texts:
        states.append(model.new_state())
        with torch.no_grad():
            model.logits(text, state=states[-1])
    more = tokens(3, 5)
    together = stepped(model, more, 0, side_by_side(copy.deepcopy(states)))
    alone = [stepped(model, more[i : i + 1], 0, copy.deepcopy(state)) for i, state in enumerate(states)]
    assert error(together, torch.cat(alone)) <= 1e-5
    picked = chosen(side_by_side(states), torch.tensor([2, 2, 0]))
    some = stepped(model, more[[2, 2, 0]], 0, picked)
    assert error(some, torch.cat([alone[2], alone[2], alone[0]])) <= 1e-5


def test_a_long_chain_of_tokens() -> None:
    model, texts = model_of("CDRmix"), tokens(1, 100)
    with torch.no_grad():
        assert error(stepped(model, texts, 1), model.logits(texts)[:, 1:]) <= 1e-5


def test_nan_stays_in_its_sequence() -> None:
    model = model_of("experts")  # its head is not the embedding
    with torch.no_grad():
        model.embedding.weight[7] = float("nan")
    scores = stepped(model, torch.tensor([[1, 2, 3], [1, 2, 7]]), 2)
    assert scores[0].isfinite().all() and scores[1].isnan().all()


class Other(PlainLinear):
    """A product of another kind."""


def test_other_models_compute_layer_by_layer(capfd: pytest.CaptureFixture[str]) -> None:
    """Said once each: a hook, another product, a module of another class, another type of numbers, training."""
    fused_step.say_fallback.cache_clear()
    state = GenerationState(length=3)

    def takes(model: HybridModel) -> bool:
        return FusedStep(model).takes(tokens(1, 1), state)

    hooked = model_of("RWKV-7")
    hooked.layers["1"].mixer.key.register_forward_hook(lambda *given: None)
    assert not takes(hooked) and not takes(hooked)
    other = model_of("RWKV-7")
    dict(linears(other))["layers.2.ffn.up"].op = Other()
    assert not takes(other)
    wrapped = model_of("Llama")
    wrapped.layers["0"].mixer.output = torch.nn.Sequential(wrapped.layers["0"].mixer.output)
    assert not takes(wrapped)
    assert not takes(model_of("Llama", torch.float64))
    assert not takes(model_of("Llama").train())
    said = capfd.readouterr().err
    for reason in ("layers.1.mixer.key has a hook", "those of Other", "of Sequential", "in float64", "in training"):
        assert said.count(reason) == 1, said
    fine = FusedStep(model_of("Llama"))
    assert fine.takes(tokens(8, 1), state)
    assert not fine.takes(tokens(9, 1), state) and not fine.takes(tokens(1, 2), state)
    assert not fine.takes(tokens(1, 1), GenerationState())


def test_a_changed_model_is_looked_at_again_after_a_prompt() -> None:
    model = model_of("RWKV-7")
    step, state = FusedStep(model), GenerationState(length=3)
    assert step.takes(tokens(1, 1), state)
    dict(linears(model))["layers.0.ffn.up"].op = Other()
    assert not step.takes(tokens(1, 4), GenerationState()) and not step.takes(tokens(1, 1), state)
    with pytest.raises(ValueError, match=r"one token of each sequence .* \[1, 4\]"):
        step.logits(tokens(1, 4), state)


def test_generation_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("CDRmix")
    multiply_few_tokens_fast(model, "cpu")
    calls: list[int] = []
    own = FusedStep.logits
    monkeypatch.setattr(FusedStep, "logits", lambda self, *given: calls.append(1) or own(self, *given))
    staged, texts = StagedModel(model), tokens(2, 7)
    state = staged.new_state()
    staged.logits(texts[:, :5], state)
    for place in (5, 6):
        last = staged.logits(texts[:, place : place + 1], state)
    assert last is not None and len(calls) == 2
    with torch.no_grad():
        assert error(last, model.logits(texts, last_only=True)[:, 0]) <= 1e-5


@pytest.mark.parametrize(("name", "scheme"), [("RWKV-7", "ternary"), ("Llama", "binary"), ("Llama", "int4")])
def test_packed_codes_are_multiplied_as_by_the_layers(name: str, scheme: str) -> None:
    """A token whose input lies at the edge of two codes may get the other one: the scores differ by that."""
    model, texts = packed_model_of(name, scheme), tokens(3, 16)
    got = stepped(model, texts, 4)
    with torch.no_grad():
        want = model.logits(texts, state=model.new_state())[:, 4:]
    assert error(got, want) <= 1e-2 and bool((got.argmax(-1) == want.argmax(-1)).all())
    assert float(((got - want).abs() <= 1e-5 * want.abs().max()).float().mean()) > 0.5


def test_codes_of_parts_of_panels_are_left_to_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    layer = make_layer_context(ModelConfig(**{**SHAPE, **MODELS["Llama"], "quantize_weights": "ternary"}), CTX)
    model = filled(HybridModel(layer)).eval()
    pack_model(model, kernels=True)
    state = model.new_state()
    with torch.no_grad():
        model.logits(tokens(1, 4), state=state)
    assert not FusedStep(model).takes(tokens(1, 1), state)
