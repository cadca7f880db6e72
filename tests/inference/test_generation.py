"""Drawing tokens, and continuing texts at any layout."""

from __future__ import annotations

import math

import pytest
import torch

from megaforge.config.model_config import ModelConfig
from megaforge.config.run_config import ParallelConfig
from megaforge.errors import UserError
from megaforge.inference.generation import Continuations, Sampling, penalized, sample_token, token_probabilities
from megaforge.inference.staged import StagedModel
from megaforge.kernels.attention import native
from megaforge.models.hybrid import HybridModel
from megaforge.models.stages import build_model, plan_pipeline
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from tests.inference.continue_one import generate
from tests.inference.live_bytes import LiveBytes
from tests.nn.support import perturb

PROMPT = [5, 17, 3, 3, 40]


def build(ctx: ParallelContext, dtype: torch.dtype = torch.float64) -> StagedModel:
    cfg = ModelConfig(
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        rwkv_head_size=8,
        mamba_head_dim=8,
        mamba_num_groups=4,
        num_experts=4,
        rom_num_experts=6,
        vocab_size=61,
        make_vocab_size_divisible_by=8,
        hybrid_layer_pattern="RE*EO-R--M",
    )
    plan = plan_pipeline(cfg, ParallelConfig(pipeline_model_parallel_size=ctx.pp.size), 1, 64)
    model = build_model(make_layer_context(cfg, ctx, dtype=dtype), plan)
    initialize_parameters(model, ctx, seed=5)
    for chunk in model.chunks:
        perturb(chunk, ctx)
    return StagedModel(model.eval(), plan)


def whole(model: StagedModel) -> HybridModel:
    return model._chunk


def continuation(tp: int, sampling: Sampling, stop: int | None = None, pp: int = 1) -> list[int]:
    return list(generate(build(ParallelContext.create(tp=tp, pp=pp)), PROMPT, 24, sampling, stop))


@torch.no_grad()
def test_greedy_continuation_is_the_argmax_of_the_parallel_form() -> None:
    model, tokens = build(ParallelContext.single()), list(PROMPT)
    for _ in range(24):
        tokens.append(int(whole(model).logits(torch.tensor([tokens]))[0, -1].argmax()))
    assert continuation(1, Sampling(temperature=0)) == tokens[len(PROMPT) :]


@pytest.mark.parametrize("world,tp,pp", [(2, 2, 1), (4, 4, 1), (4, 2, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (4, 1, 2)])
def test_every_layout_continues_alike(ranks, world: int, tp: int, pp: int) -> None:
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
    expected = continuation(1, sampling)
    assert len(set(expected)) > 3
    assert ranks.run(world, continuation, tp, sampling, None, pp) == [expected] * world


def in_bf16(pp: int) -> list[int]:
    model = build(ParallelContext.create(pp=pp), torch.bfloat16)
    return list(generate(model, PROMPT, 12, Sampling(temperature=0)))


def test_stages_hand_on_16_bit_tensors(ranks) -> None:
    """A stage's first parameter may be a norm, in fp32; between stages travels what the model computes in."""
    assert ranks.run(3, in_bf16, 3) == [in_bf16(1)] * 3


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


def test_min_p_and_the_penalty_on_repetitions() -> None:
    logits = torch.tensor([[0.5, 0.26, 0.2, 0.04]]).log()
    kept = token_probabilities(logits, Sampling(min_p=0.5))[0].float()
    assert torch.allclose(kept, torch.tensor([0.5, 0.26, 0, 0]) / 0.76)
    assert token_probabilities(logits, Sampling(min_p=1)).tolist() == [[1, 0, 0, 0]]
    both = token_probabilities(logits, Sampling(top_p=0.7, min_p=0.53))[0]
    assert both.tolist() == [1, 0, 0, 0], "after top-p"
    seen = torch.tensor([[True, True, False, False]])
    assert penalized(torch.tensor([[2.0, -2.0, 2.0, -2.0]]), seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0]]


def test_a_penalty_on_repetitions_knows_prompt_and_continuation() -> None:
    """With one that outweighs every score no token comes twice, in any text of a batch."""
    model, sampling = build(ParallelContext.single()), Sampling(temperature=0, repetition_penalty=1e9)
    texts = [list(prompt) for prompt in ([1, 2], [5, 17, 3])]
    batch = Continuations(model, texts, sampling)
    for step in range(12):
        for number, token in batch.draw().items():
            texts[number].append(token)
        batch.drop([0] if step == 5 else [])
    assert [len(text) for text in texts] == [8, 15]
    positive = whole(model).logits(torch.tensor([texts[1]]))[0, 2:-1].amax(-1) > 0
    assert positive.all() and all(len(set(text)) == len(text) for text in texts)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(20000, 3)
    drawn = sample_token(logits, Sampling(), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 20000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015)


@pytest.mark.parametrize(
    "sampling,message",
    [
        (Sampling(temperature=-1), "--temperature -1"),
        (Sampling(temperature=math.nan), "--temperature nan"),
        (Sampling(temperature=math.inf), "--temperature inf"),
        (Sampling(top_p=math.nan), "--top-p nan"),
        (Sampling(seed=-1), "--seed -1"),
        (Sampling(seed=2**63), "--seed 9223372036854775808"),
        (Sampling(top_k=-1), "--top-k -1"),
        (Sampling(top_p=0), "--top-p 0"),
        (Sampling(min_p=-1), "--min-p -1"),
        (Sampling(repetition_penalty=math.nan), "--repetition-penalty nan"),
    ],
)
def test_bad_settings_are_named(sampling: Sampling, message: str) -> None:
    with pytest.raises(UserError, match=message):
        continuation(1, sampling)


@pytest.mark.parametrize("prompt,message", [([], "at least one token"), ([3, 61], "token 61")])
def test_bad_prompts_are_named(prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(generate(build(ParallelContext.single()), prompt, 1, Sampling()))


PROMPTS = [[5, 17, 3, 3, 40], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [60, 60], [9, 8]]


def together(
    tp: int, sampling: Sampling, samples: int = 1, prompts: list[list[int]] = PROMPTS, pp: int = 1
) -> list[list[int]]:
    """20 tokens of each text; the texts end one after the other, as texts do."""
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    seeds = [sampling.seed + number % samples for number in range(len(prompts))]
    batch = Continuations(build(ParallelContext.create(tp=tp, pp=pp)), prompts, sampling, seeds=seeds, prefill_chunk=4)
    texts: list[list[int]] = [[] for _ in prompts]
    for step in range(20):
        for number, token in batch.draw().items():
            texts[number].append(token)
        batch.drop([number for number in batch.going_on if step == 10 + number])
    return texts


def alone(sampling: Sampling, prompt: list[int], number: int = 99) -> list[int]:
    return list(generate(build(ParallelContext.single()), prompt, min(20, 11 + number), sampling))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.9, top_k=20, seed=3)])
def test_a_batch_of_any_lengths_equals_one_by_one(sampling: Sampling) -> None:
    texts = together(1, sampling)
    assert texts == [alone(sampling, prompt, number) for number, prompt in enumerate(PROMPTS)]
    assert [len(text) for text in texts] == [11, 12, 13, 14, 15]


@torch.no_grad()
def test_scores_of_a_batch_are_those_of_each_text_alone() -> None:
    model = build(ParallelContext.single())
    batch = Continuations(model, PROMPTS, Sampling(temperature=0))
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(3):
        for number, token in batch.draw().items():
            alone = whole(model).logits(torch.tensor([texts[number]]))[:, -1]
            torch.testing.assert_close(batch._logits[number : number + 1], alone, rtol=1e-11, atol=1e-12)
            texts[number].append(token)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 5, 64])
def test_prompts_in_pieces_are_those_in_one(chunk: int) -> None:
    """Pieces end anywhere, in the middle of a prompt that others outlast; caches grow beyond what was expected."""
    model = build(ParallelContext.single())
    batch = Continuations(model, PROMPTS, Sampling(temperature=0), prefill_chunk=chunk, max_new_tokens=1)
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(4):
        for number, token in batch.draw().items():
            alone = whole(model).logits(torch.tensor([texts[number]]))[:, -1]
            torch.testing.assert_close(batch._logits[number : number + 1], alone, rtol=1e-11, atol=1e-12)
            texts[number].append(token)


@pytest.mark.skipif("cpu" not in native.COMPILED, reason="without compiled attention a piece has a mask of all keys")
def test_memory_of_a_prompt_is_that_of_its_pieces_and_caches() -> None:
    """Bytes alive while a prompt of 8 pieces is read are those of one of 4 but for its caches, which have no place too
    many."""
    model, new = build(ParallelContext.single(), torch.float32), 16

    def beside_caches(length: int) -> int:
        prompt = [3 + place % 50 for place in range(length)]
        with LiveBytes() as live:
            text = Continuations(model, [prompt], Sampling(), prefill_chunk=256, max_new_tokens=new)
        cache = text._state.layers[2]
        assert cache.keys.shape[2] == cache.values.shape[2] == length + new
        return live.peak - cache.keys.nbytes - cache.values.nbytes

    four, eight = beside_caches(1024), beside_caches(2048)
    assert eight - four < 0.05 * four, (four, eight)
    with LiveBytes() as live:
        Continuations(model, [[3] * 2048], Sampling(), prefill_chunk=2048)
    assert live.peak > 4 * four, "what is measured here grows with a piece"


@pytest.mark.parametrize("world,tp,pp", [(2, 2, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2)])
def test_a_batch_is_the_same_at_every_layout(ranks, world: int, tp: int, pp: int) -> None:
    sampling = Sampling(temperature=0.9, seed=3)
    expected = together(1, sampling, 2)
    assert ranks.run(world, together, tp, sampling, 2, PROMPTS, pp) == [expected] * world


def test_samples_are_those_of_the_following_seeds() -> None:
    texts = together(1, Sampling(seed=7), 3, PROMPTS[:2])
    for number, text in enumerate(texts):
        assert text == alone(Sampling(seed=7 + number % 3), PROMPTS[number // 3], number)
    assert texts[0] != texts[1][: len(texts[0])]


def test_what_the_tokenizer_does_not_have_is_never_drawn() -> None:
    model, hot = build(ParallelContext.single()), Sampling(temperature=1e300)
    assert max(generate(model, PROMPT, 60, hot)) >= 40
    batch = Continuations(model, [PROMPT], hot, unusable=range(3, 61))
    drawn = {batch.draw()[0] for _ in range(60)}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-310, 1e300])
def test_extreme_temperatures_are_the_limits(temperature: float) -> None:
    scores = token_probabilities(torch.tensor([[3.0, 1.0, 2.0]]), Sampling(temperature=temperature))
    expected = [[1.0, 0.0, 0.0]] if temperature < 1 else [[1 / 3] * 3]
    assert torch.allclose(scores, torch.tensor(expected, dtype=torch.float64))


def test_scores_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(UserError, match="not finite"):
        sample_token(torch.tensor([[0.0, math.nan]]), Sampling(temperature=0), torch.Generator())
