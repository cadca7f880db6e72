"""Speculative continuation writes what one token after another would, whatever is proposed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from megaforge.config.model_config import ModelConfig
from megaforge.config.run_config import ParallelConfig
from megaforge.errors import UserError
from megaforge.inference import speculation
from megaforge.inference.generation import Continuations, Sampling
from megaforge.inference.speculation import Acceptance, SpeculativeContinuations
from megaforge.inference.staged import StagedModel
from megaforge.models.ahead import Ends
from megaforge.models.stages import build_model, plan_pipeline
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from tests.nn.support import perturb

PROMPT = [5, 17, 3, 3, 40]
PATTERNS = {"recurrent": "R-*EM-R-/R-*E/R-*E/R-*E", "attention": "*-*E/*E/*E", "last": "R-M-*E/M-"}
NEW = 24


def build(ctx: ParallelContext, pattern: str, mode: str = "sequential", **changes: object) -> StagedModel:
    shape = {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "rwkv_head_size": 8,
        "mamba_head_dim": 8,
        "mamba_num_groups": 4,
        "num_experts": 4,
        "vocab_size": 61,
        "make_vocab_size_divisible_by": 8,
        "hybrid_layer_pattern": PATTERNS.get(pattern, pattern),
    }
    cfg = ModelConfig(**{**shape, "mtp_mode": mode, **changes})  # type: ignore[arg-type]
    plan = plan_pipeline(cfg, ParallelConfig(pipeline_model_parallel_size=ctx.pp.size), 1, 64)
    model = build_model(make_layer_context(cfg, ctx, dtype=torch.float64), plan)
    initialize_parameters(model, ctx, seed=5)
    for chunk in model.chunks:
        perturb(chunk, ctx)
    return StagedModel(model.eval(), plan)


def written(model: StagedModel, prompt: Sequence[int] = PROMPT, tokens: int = NEW, **how: int) -> list[int]:
    texts = SpeculativeContinuations(model, [prompt], unusable=[7], **how)
    return [texts.draw()[0] for _ in range(tokens)]


def expected(model: StagedModel, prompt: Sequence[int] = PROMPT, tokens: int = NEW) -> list[int]:
    text = Continuations(model, [prompt], Sampling(temperature=0), unusable=[7])
    return [text.draw()[0] for _ in range(tokens)]


class Oracle:
    """Knows the text, and errs where it is told to."""

    def __init__(self, text: Sequence[int], right: float, count: int) -> None:
        self.text, self.right, self.count = text, right, count
        self.random, self.shown, self.places = random.Random(2), 0, []

    def take(self, ends: Ends, tokens: Sequence[int]) -> None:
        assert list(tokens) == list(self.text[: len(tokens)])
        assert self.shown + len(ends.hidden) == self.shown + len(ends.before) == len(tokens) - 1
        self.shown = len(tokens) - 1
        self.places.append(ends.hidden)

    def propose(self, tokens: Sequence[int]) -> list[int]:
        assert self.shown == len(tokens) - 1
        following = self.text[len(tokens) : len(tokens) + self.count]
        return [token if self.random.random() < self.right else (token + 1) % 61 for token in following]


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("right", [0.0, 0.8, 1.0])
def test_whatever_is_proposed_the_text_is_the_same(monkeypatch: pytest.MonkeyPatch, pattern: str, right: float) -> None:
    """Prompts in pieces too; what drafts are shown of each place is what the parallel form gives."""
    model = build(ParallelContext.single(), pattern)
    text = PROMPT + expected(model, tokens=NEW + 8)
    oracle, accepted = Oracle(text, right, model.predictions), Acceptance()
    monkeypatch.setattr(model, "drafts", lambda: oracle)
    texts = SpeculativeContinuations(model, [PROMPT], unusable=[7], prefill_chunk=2, acceptance=accepted)
    assert [texts.draw()[0] for _ in range(NEW)] == text[len(PROMPT) :][:NEW]
    if right in (0.0, 1.0):
        assert sum(accepted.kept) == right * sum(accepted.proposed) and accepted.passes
    else:
        assert 0 < sum(accepted.kept) < sum(accepted.proposed)
    whole = model._chunk.stage_ends(torch.tensor([text[: oracle.shown]]))[0]
    assert whole is not None
    assert torch.allclose(torch.cat(oracle.places), whole.hidden, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("prompt", [PROMPT, [3], [9, 9, 9]])
def test_drafts_are_those_of_the_parallel_form(mode: str, prompt: list[int]) -> None:
    """Step by step, from memories, each module proposes what it predicts in the form that is trained."""
    model = build(ParallelContext.single(), "recurrent", mode)
    chunk, texts = model._chunk, SpeculativeContinuations(model, [prompt])
    [text] = texts._texts
    assert chunk.mtp is not None and text._drafts is not None
    for _ in range(6):
        tokens = list(text._tokens)
        places, found = len(tokens) - 1, list(tokens)
        ends, _ = chunk.stage_ends(torch.tensor([tokens[:places]]))
        assert ends is not None
        info, hidden = chunk.pack(torch.tensor([tokens[:places]]), None), ends.hidden
        for number, depth in enumerate(chunk.mtp.depths, start=1):
            if mode == "sequential":
                read = torch.tensor([found[number : number + places]])
                hidden, _ = depth(hidden, chunk.mtp.embedding(read), info)
                seen = hidden
            else:
                seen = chunk.final_norm(depth(ends.before, info)[0])
            found.append(int(chunk.head.logits(seen[-1:])[0, -1].argmax()))
        assert text._drafts.propose(tokens) == found[len(tokens) :]
        assert text._drafts.propose(tokens) == found[len(tokens) :], "proposing changes nothing"
        text._step()


def at_a_layout(tp: int, pp: int, mode: str) -> list[int]:
    return written(build(ParallelContext.create(tp=tp, pp=pp), "recurrent", mode))


@pytest.mark.parametrize("world,tp,pp,mode", [(2, 2, 1, "parallel"), (4, 2, 2, "sequential")])
def test_every_layout_writes_the_same(ranks, world: int, tp: int, pp: int, mode: str) -> None:
    text = expected(build(ParallelContext.single(), "recurrent", mode))
    assert len(set(text)) > 3
    assert ranks.run(world, at_a_layout, tp, pp, mode) == [text] * world


@pytest.mark.parametrize("backlog", [1, 100])
def test_texts_go_on_beside_each_other_and_end_alone(monkeypatch: pytest.MonkeyPatch, backlog: int) -> None:
    """However far a recurrent state lies behind."""
    monkeypatch.setattr(speculation, "BACKLOG", backlog)
    learned = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 29}
    model = build(ParallelContext.single(), "last", **learned)
    prompts, found = [PROMPT, [1], [2, 3]], [list[int]() for _ in range(3)]
    texts = SpeculativeContinuations(model, prompts, unusable=[7])
    for step in range(NEW):
        for number, token in texts.draw().items():
            found[number].append(token)
        texts.drop([1] if step == 5 else [])
    assert found == [expected(model, prompt, 6 if prompt == [1] else NEW) for prompt in prompts]


def test_the_acceptance_is_told() -> None:
    accepted = Acceptance()
    assert accepted.line(0, 0.0) == "--speculate mtp: nothing was proposed"
    for proposed, kept in ((3, 3), (3, 1), (2, 0), (3, 2)):
        accepted.count(proposed, kept)
    assert accepted.line(9, 2.0) == (
        "--speculate mtp: 6 of 11 drafts accepted in 4 passes (75%, 50%, 33% of the drafts one, two ... tokens on): "
        "2.50 tokens a pass; 4.5 tokens a second behind the first"
    )


def test_what_cannot_be_is_named() -> None:
    plain = build(ParallelContext.single(), "*-")
    with pytest.raises(UserError, match="--speculate mtp: this model predicts the next token alone"):
        SpeculativeContinuations(plain, [PROMPT])
    with pytest.raises(UserError, match="--prompt is empty"):
        SpeculativeContinuations(build(ParallelContext.single(), "attention"), [[]])
