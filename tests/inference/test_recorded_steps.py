"""Steps of a token that are recorded: the same tokens as without, whatever texts come and go."""

from __future__ import annotations

import pytest
import torch

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.inference import recorded_steps
from megaforge.inference.generation import Continuations, Sampling
from megaforge.inference.staged import StagedModel
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from tests.inference import tape
from tests.nn.support import perturb

PROMPTS = [[5, 17, 3, 3, 40], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [60, 60]]
MODELS = {
    "hybrid": {"hybrid_layer_pattern": "RE*EO-M--R", "num_query_groups": 2, "qk_layernorm": True},
    "learned": {"hybrid_layer_pattern": "*-*-", "position_embedding_type": "learned_absolute"},
}


def build(device: str = "cpu", dtype: torch.dtype = torch.float32, **settings: object) -> StagedModel:
    cfg = ModelConfig(
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        rwkv_head_size=8 if device == "cpu" else 32,
        mamba_head_dim=8,
        mamba_num_groups=4,
        num_experts=4,
        vocab_size=61,
        max_position_embeddings=64,
        **settings,
    )
    ctx = ParallelContext.create(device=torch.device(device))
    model = HybridModel(make_layer_context(cfg, ctx, dtype=dtype))
    initialize_parameters(model, ctx, seed=5)
    perturb(model, ctx)
    return StagedModel(model.eval())


def texts(model: StagedModel, **given: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens and scores of texts that end one after the other."""
    batch = Continuations(model, PROMPTS, Sampling(temperature=0), **given)
    found: list[list[int]] = [[] for _ in PROMPTS]
    scores = []
    for step in range(20):
        for number, token in batch.draw().items():
            found[number].append(token)
        scores.append(batch._logits)
        batch.drop([number for number in batch.going_on if step == 9 + 3 * number])
    return found, scores


def assert_alike(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for own, other in zip(got, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("room", [0, 32])
def test_recorded_steps_are_those_of_the_model(kind: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where slots have to grow, and when a second batch finds the recordings of the first."""
    monkeypatch.setattr(recorded_steps, "LEAST_PLACES", 8)
    made: list[int] = []

    def record(step: object) -> object:
        made.append(1)
        return tape.record(step)

    model = build(**MODELS[kind])
    tokens, scores = texts(model)
    model.record_steps(record)
    for runs in (1, 2):
        played, found = texts(model, max_new_tokens=room)
        assert played == tokens
        assert_alike(found, scores)
        assert len(made) == (4 if room else 5 * runs), "one a number of texts; one more when the slots have grown"


def test_states_take_turns_in_the_slots() -> None:
    """And a state that reads several tokens at once, as a prompt does, leaves them."""
    model = build(**MODELS["hybrid"])
    expected = [plain_tokens(model, PROMPTS[0], None), plain_tokens(model, PROMPTS[1], 4)]
    model.record_steps(tape.record)
    states = [model.new_state() for _ in range(2)]
    last = [model.logits(torch.tensor([prompt]), state) for prompt, state in zip(PROMPTS, states, strict=False)]
    got: list[list[int]] = [[], []]
    for step in range(8):
        for number, state in enumerate(states):
            token = last[number].argmax(-1, keepdim=True)
            got[number].append(int(token))
            given = token.expand(1, 3) if (number, step) == (1, 4) else token
            last[number] = model.logits(given, state)
    assert got == expected


def plain_tokens(model: StagedModel, prompt: list[int], threefold: int | None) -> list[int]:
    """Eight tokens; the one drawn at step ``threefold`` is read three times."""
    tokens, drawn = list(prompt), []
    for step in range(8):
        drawn.append(int(model.logits(torch.tensor([tokens]), model.new_state()).argmax()))
        tokens += drawn[-1:] * (3 if step == threefold else 1)
    return drawn


def test_what_cannot_be_recorded_is_computed_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = build(**MODELS["learned"])
    tokens, _ = texts(model)

    def record(step: object) -> object:
        return tape.record(lambda: step() * float(torch.ones(1)))

    model.record_steps(record)
    assert texts(model)[0] == tokens == texts(model)[0]
    line = "the step of a token cannot be recorded (the host waits for the device); it is computed without\n"
    assert capsys.readouterr().err.count(f"--cuda-graph: {line}") == 1


def test_too_long_texts_are_refused_as_without() -> None:
    model = build(**MODELS["learned"])
    model.record_steps(tape.record)
    batch = Continuations(model, [[3] * 62], Sampling(temperature=0))
    for _ in range(3):
        batch.draw()
    with pytest.raises(UserError, match="65 tokens in a sequence: the model has positions for 64"):
        batch.draw()


def test_there_are_no_graphs_on_a_cpu() -> None:
    with pytest.raises(UserError, match="--cuda-graph: there are none on --device cpu"):
        build(**MODELS["learned"]).record_steps()
