"""Drawing tokens, and continuing a text at any tensor-parallel size."""

from __future__ import annotations

import pytest
import torch

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.training.generation import Sampling, generate, sample_token, token_probabilities
from tests.nn.support import perturb

PROMPT = [5, 17, 3, 3, 40]


def build(ctx: ParallelContext) -> HybridModel:
    cfg = ModelConfig(
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        rwkv_head_size=8,
        num_experts=4,
        vocab_size=61,
        make_vocab_size_divisible_by=8,
        hybrid_layer_pattern="RE*ER-",
    )
    model = HybridModel(cfg, ctx, dtype=torch.float64)
    initialize_parameters(model, ctx, seed=5)
    perturb(model, ctx)
    return model.eval()


def continuation(tp: int, sampling: Sampling, stop: int | None = None) -> list[int]:
    return list(generate(build(ParallelContext.create(tp=tp)), PROMPT, 24, sampling, stop))


@torch.no_grad()
def test_greedy_continuation_is_the_argmax_of_the_parallel_form() -> None:
    model, tokens = build(ParallelContext.single()), list(PROMPT)
    for _ in range(24):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    assert continuation(1, Sampling(temperature=0)) == tokens[len(PROMPT) :]


@pytest.mark.parametrize("world,tp", [(2, 2), (4, 4), (4, 2)])
def test_every_layout_continues_alike(ranks, world: int, tp: int) -> None:
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
    expected = continuation(1, sampling)
    assert len(set(expected)) > 3
    assert ranks.run(world, continuation, tp, sampling) == [expected] * world


def test_the_stop_token_ends_the_text() -> None:
    free = continuation(1, Sampling(temperature=0))
    stopped = continuation(1, Sampling(temperature=0), stop=free[3])
    assert stopped == free[: free.index(free[3])]


def test_seed_decides() -> None:
    assert continuation(1, Sampling(seed=1)) == continuation(1, Sampling(seed=1)) != continuation(1, Sampling(seed=2))


def test_temperature_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    assert torch.allclose(token_probabilities(logits, Sampling())[0].float(), logits[0].exp())
    hot = token_probabilities(logits, Sampling(temperature=0.5))[0].float()
    assert torch.allclose(hot, logits[0].exp() ** 2 / (logits[0].exp() ** 2).sum())
    assert token_probabilities(logits, Sampling(top_k=1)).tolist() == [[1, 0, 0, 0]]
    # 0.5 alone reaches 0.5; 0.69 needs one of the equal two, the first
    assert token_probabilities(logits, Sampling(top_p=0.49)).tolist() == [[1, 0, 0, 0]]
    nucleus = token_probabilities(logits, Sampling(top_p=0.69))[0].float()
    assert torch.allclose(nucleus, torch.tensor([5 / 7, 2 / 7, 0, 0]))
    assert int(sample_token(logits, Sampling(temperature=0), torch.Generator())) == 0


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(20000, 3)
    drawn = sample_token(logits, Sampling(), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 20000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015)


@pytest.mark.parametrize(
    "sampling,message",
    [
        (Sampling(temperature=-1), "--temperature -1"),
        (Sampling(top_k=-1), "--top-k -1"),
        (Sampling(top_p=0), "--top-p 0"),
    ],
)
def test_bad_settings_are_named(sampling: Sampling, message: str) -> None:
    with pytest.raises(UserError, match=message):
        continuation(1, sampling)


@pytest.mark.parametrize("prompt,message", [([], "at least one token"), ([3, 61], "token 61")])
def test_bad_prompts_are_named(prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(generate(build(ParallelContext.single()), prompt, 1, Sampling()))
