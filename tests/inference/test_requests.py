"""What a model answers: against its logits, at every layout, with and without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.errors import UserError
from megaforge.inference.answer_cache import AnswerCache, identity
from megaforge.inference.generation import Sampling
from megaforge.inference.leading import led
from megaforge.inference.requests import Answer, Answerer, Likelihood, Request, Scored, Writing
from megaforge.inference.restore import TrainedModel
from tests.inference.continue_one import generate
from tests.inference.text_model import Bytes, restored, saved_model

REQUESTS: list[Request] = [
    Likelihood((1,), (2,)),
    Writing((3, 4, 5), 6),
    Likelihood(tuple(range(40)), (9, 9, 9)),  # longer than a sequence
    Likelihood((7, 8), tuple(range(50))),  # whose continuation is
    Writing(tuple(range(60)), 5),
    Likelihood((1,), (2,)),  # again
    Likelihood((100, 101, 102, 103), (104, 105)),
    Writing((9,), 1),
    Writing((3, 4, 5), 9, temperature=2.0, seed=7),
]
MOST = 24


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(save: str) -> TrainedModel:
    return restored(save)


def scored(trained: TrainedModel, request: Likelihood) -> Scored:
    """One token after the other, from the logits of all of them at once."""
    whole = [*request.context, *request.continuation][-(MOST + 1) :]
    count = min(len(request.continuation), len(whole) - 1)
    logits = trained.model._chunk.logits(torch.tensor([whole[:-1]]))[0].log_softmax(-1)[-count:]
    wanted = torch.tensor(whole[-count:])
    return Scored(float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(1) == wanted).all()))


def expected(trained: TrainedModel, request: Request) -> Answer:
    if isinstance(request, Likelihood):
        return scored(trained, request)
    prompt = list(request.prompt)[-(MOST - request.max_new_tokens) :]
    sampling = Sampling(temperature=request.temperature, seed=request.seed)
    return Bytes().decode(list(generate(trained.model, prompt, request.max_new_tokens, sampling, 256)))


def close(found: list[Answer], wanted: list[Answer]) -> bool:
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, str):
            assert one == other
        else:
            assert one == (pytest.approx(other.log_probability, rel=1e-10), other.greedy)
    return True


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_answers_are_those_of_the_logits(trained: TrainedModel, batch_size: int) -> None:
    answerer = Answerer(trained, Bytes(), MOST, batch_size)
    wanted = [expected(trained, request) for request in REQUESTS]
    assert close(answerer.answer(REQUESTS), wanted)
    assert close(answerer.answer(REQUESTS[::-1]), wanted[::-1])
    assert answerer.answer([]) == []
    # Of one token after another: the greedy continuation is greedy, and others are not.
    text = wanted[1]
    assert isinstance(text, str)
    mine = tuple(generate(trained.model, [3, 4, 5], 4, Sampling(temperature=0)))
    other = (*mine[:3], (mine[3] + 1) % 257)
    found = answerer.answer([Likelihood((3, 4, 5), mine), Likelihood((3, 4, 5), other)])
    assert [one.greedy for one in found] == [True, False]  # type: ignore[union-attr]


def test_what_does_not_fit_is_counted(trained: TrainedModel) -> None:
    answerer = Answerer(trained, Bytes(), MOST)
    answerer.answer(REQUESTS[:5])
    assert (answerer.cut.requests, answerer.cut.tokens) == (3, 43 - 25 + 52 - 25 + 60 - 19)
    assert answerer.cut.line(MOST).startswith("3 prompts are longer than 24 tokens (--max-length): the first of")


def test_stops_end_a_text(trained: TrainedModel) -> None:
    answerer = Answerer(trained, Bytes(), 60)
    [whole] = answerer.answer([Writing((3, 4, 5), 20)])
    assert isinstance(whole, str) and len(whole) > 3
    assert answerer.answer([Writing((3, 4, 5), 20, (whole[2:4],))]) == [whole[: whole.index(whole[2:4])]]


def asked(save: str, how: dict[str, int], batch: int, cache: str | None) -> tuple[list[Answer] | None, int]:
    """What the first rank is told, and how many requests reached the model."""
    trained = restored(save, **how)
    answerer = Answerer(trained, Bytes(), MOST, batch)
    reached = 0
    answer = answerer.answer

    def counted(requests, told=None):  # type: ignore[no-untyped-def]
        nonlocal reached
        reached += len(requests)
        return answer(requests, told)

    answerer.answer = counted  # type: ignore[method-assign]
    kept = AnswerCache(cache, identity(trained.path)) if cache and trained.ctx.is_first_rank else None
    found = led(answerer, lambda ask: ask(REQUESTS[:6]) + ask(REQUESTS[6:]), kept)
    return found, reached


@pytest.mark.parametrize("world, how", [(4, {"tp": 2, "pp": 2}), (4, {"tp": 1, "pp": 2})])
def test_every_layout_gives_the_same_answers(ranks, save: str, world: int, how: dict[str, int]) -> None:
    wanted, reached = asked(save, {}, 2, None)
    assert wanted is not None and reached == 8, "what is asked again is not computed again"
    [(found, _), *others] = ranks.run(world, asked, save, how, 2, None)
    assert close(found, wanted) and [one for one, _ in others] == [None] * (world - 1)


def test_a_cache_is_asked_first_and_survives_a_killed_process(save: str, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "cache.jsonl"
    wanted, reached = asked(save, {}, 2, str(file))
    assert wanted is not None and reached == 8
    assert asked(save, {}, 3, str(file)) == (wanted, 0)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    found, reached = asked(save, {}, 2, str(file))
    assert close(found or [], wanted) and 0 < reached < 8 and file.read_bytes().count(b"\n") == 8
    other = AnswerCache(str(file), "another model")
    assert other.find(REQUESTS[0]) is None, "another model's answers are none"
    for text in ("no json\n", '{"a": 1}\n', "no line end"):
        file.write_text(text)
        with pytest.raises(UserError, match=f"--cache {file}: .*name another file"):
            AnswerCache(str(file), "m")
        assert file.read_text() == text, "left as it was"


def failing(save: str, where: str) -> str:
    """What each rank says of an error while one asks."""
    answerer = Answerer(restored(save, tp=2), Bytes(), MOST)

    def work(ask) -> None:  # type: ignore[no-untyped-def]
        ask(REQUESTS[:1])
        if where == "work":
            raise UserError("a bad task")
        ask([Writing((1, 999), 2)])

    try:
        led(answerer, work)
    except UserError as error:
        return str(error)
    return "fine"


def test_an_error_leaves_no_rank_waiting(ranks, save: str) -> None:
    assert ranks.run(2, failing, save, "work") == ["a bad task", "fine"]
    told = ranks.run(2, failing, save, "model")
    assert len(set(told)) == 1 and "holds token 999" in told[0]


def test_a_length_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    flags = ("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "24")
    trained = restored(saved_model(tmp_path, *flags, pattern="*-"))
    with pytest.raises(UserError, match="--max-length 25: the model has positions for 24 tokens"):
        Answerer(trained, Bytes(), 25)
    assert Answerer(trained, Bytes(), 24).answer([Likelihood(tuple(range(30)), (3,)), Writing((1,) * 30, 4)])
