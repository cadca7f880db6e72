"""A trained agent at work: branches, what is accepted, and the tool, on one rank and on several."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megaforge.errors import UserError
from megaforge.inference.restore import TrainedModel
from megaforge.reasoning.agent.asking import Asker, Asking, Text, mean_numbers
from megaforge.reasoning.agent.texts import example_tokens
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.memory.file import load_memory, save_memory
from tests.inference.text_model import restored
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import train
from tests.reasoning.test_agent_parity import agent_arguments

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(words: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's directory; its policy has learnt nothing much."""
    save = str(tmp_path_factory.mktemp("agent") / "run")
    train(agent_arguments(words, "--save", save, "--save-interval", "2", "--memory-slots", "2"))
    return save


@pytest.fixture(scope="module")
def trained(run: str) -> TrainedModel:
    return restored(run)


def texts_of(trained: TrainedModel, count: int, known: bool = True) -> list[Text]:
    tokenizer = trained.load_tokenizer()
    made = [example_tokens("kv_chunks", tokenizer, 5, number, 4, 9) for number in range(count)]
    return [Text(number, *(one if known else one[:2])) for number, one in enumerate(made)]


def asker_of(trained: TrainedModel, **how: Any) -> Asker:
    return Asker(trained.model, trained.config, Asking(**{"branches": 3, "most_tokens": 3, **how}))


def test_rewards_and_what_is_accepted(trained: TrainedModel) -> None:
    """By hand; an answer that nobody knows, right ones, wrong ones."""
    [unknown] = texts_of(trained, 1, known=False)
    asker = asker_of(trained)
    before = asker.root.digest()
    reading = asker.ask(unknown)
    assert len(reading.ways) == 3 and all(way.right is None for way in reading.ways)
    answers = [way.written for way in reading.ways]
    rewards = [1.1 * answers.count(way.written) / 3 - 0.01 * way.cost for way in reading.ways]
    assert [way.reward for way in reading.ways] == pytest.approx(rewards)
    assert [way.advantage for way in reading.ways] == pytest.approx([one - sum(rewards) / 3 for one in rewards])
    assert reading.accepted == rewards.index(max(rewards)) and reading.best is reading.ways[reading.accepted]
    assert reading.acceptable == sum(way.advantage >= 0 for way in reading.ways)
    for way in reading.ways:
        assert way.cost == sum(action != "summarize" for action in way.actions) and len(way.actions) >= 4
    after = asker.root
    assert after.digest() != before
    assert (after.memory.entries, after.memory.summaries) == (reading.best.entries, reading.best.summaries)
    known = Text(0, unknown.chunks, unknown.question, reading.ways[0].written)
    again = asker_of(trained).ask(known)
    assert [way.actions for way in again.ways] == [way.actions for way in reading.ways]
    right = [answer == answers[0] for answer in answers]
    assert [way.right for way in again.ways] == right
    rewards = [one + 0.1 * right.count(one) / 3 - 0.01 * way.cost for one, way in zip(right, again.ways, strict=True)]
    assert [way.reward for way in again.ways] == pytest.approx(rewards)
    of_users = asker_of(trained, worth=lambda question, answer, written: 7.0 * (written == answer != question))
    worths = [one + 6.0 * ok for one, ok in zip(rewards, right, strict=True)]
    assert [way.reward for way in of_users.ask(known).ways] == pytest.approx(worths)


def test_what_is_not_accepted_leaves_nothing(trained: TrainedModel) -> None:
    [text] = texts_of(trained, 1)
    asker = asker_of(trained, threshold=5.0)
    before = asker.root.digest()
    reading = asker.ask(text)
    assert reading.accepted is None and reading.acceptable == 0 and asker.root.digest() == before
    assert reading.best.advantage == max(way.advantage for way in reading.ways)


def test_branches_are_readings_of_their_own(trained: TrainedModel) -> None:
    """A text is read alike beside others and alone; the second text of a session begins with what the first has left,
    and each of its branches is a reading that begins so."""
    texts = texts_of(trained, 3)
    asker = asker_of(trained)
    each = asker.ask_each(texts)
    assert asker.root.memory.entries == asker.root.memory.summaries == 0
    assert [asker_of(trained).ask(text) for text in texts] == each
    assert len({way.actions for one in each for way in one.ways}) > 3, "draws differ"
    session, copy = asker_of(trained), asker_of(trained)
    first = session.ask(texts[0])
    second = session.ask(texts[1])
    assert second.best.summaries >= first.best.summaries > 0
    copy.root.memory.load_state(_left_by(trained, texts[0]))
    assert copy.ask(texts[1]) == second and copy.root.memory.digest() == session.root.memory.digest()
    numbers = mean_numbers(each)
    assert numbers["accepted"] == sum(one.acceptable for one in each) / 9
    assert numbers["actions"] == pytest.approx(sum(one.best.cost for one in each) / 3)


def _left_by(trained: TrainedModel, text: Text) -> dict[str, torch.Tensor]:
    asker = asker_of(trained)
    asker.ask(text)
    return asker.root.memory.state()


def test_one_branch_takes_the_most_probable_actions_with_any_search(trained: TrainedModel) -> None:
    texts = texts_of(trained, 2)
    found = [asker_of(trained, branches=1, seed=seed).ask_each(texts) for seed in (0, 1)]
    assert found[0] == found[1] == asker_of(trained, branches=1, search="faiss").ask_each(texts)
    assert all(one.accepted == 0 and one.best.advantage == 0 for one in found[0])


def asked(save: str, tp: int, pp: int) -> list[Any]:
    trained = restored(save, tp=tp, pp=pp)
    found = asker_of(trained, branches=2).ask_each(texts_of(trained, 1))
    return [(way.actions, way.written, way.right) for one in found for way in one.ways]


def test_ranks_that_share_a_model_read_alike(ranks: RankPool, run: str) -> None:
    expected = asked(run, 1, 1)
    for layout in ((2, 1), (1, 2)):
        assert ranks.run(2, asked, run, *layout) == [expected] * 2


def test_a_memory_file_goes_on_and_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    shape, path = MemoryShape(4, 3, 5), tmp_path / "deep" / "book.memory"
    memory, again = AgentMemory(shape), AgentMemory(shape)
    assert not load_memory(path, again, "m")
    for number in range(5):
        memory.write(torch.full((4,), float(number)), [number])
        memory.summarize(torch.full((2, 4), float(number)))
    memory.retrieve(torch.ones(4), 2)
    save_memory(path, memory, "m")
    assert load_memory(path, again, "m") and again.digest() == memory.digest()
    with pytest.raises(UserError, match="another model wrote it"):
        load_memory(path, again, "n")
    with pytest.raises(UserError, match="--memory-dim 5"):
        load_memory(path, AgentMemory(MemoryShape(5, 3)), "m")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="is not a memory's file"):
        load_memory(path, again, "m")
    with pytest.raises(UserError, match="it was not written"):
        save_memory(path / "below", memory, "m")


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_tool", REPO / "tools" / "agent.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(trained: TrainedModel, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    module = tool()
    desk = module.AgentDesk(module.parse_arguments(["--load", "run", *arguments]), trained)
    capsys.readouterr()
    desk.ask()
    return capsys.readouterr().out.splitlines()


def test_the_tool_reads_tasks(trained: TrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--task",
        "kv_chunks",
        "--examples",
        "2",
        "--chunks",
        "3",
        "9",
        "--branches",
        "2",
        "--max-new-tokens",
        "2",
    )
    lines = [json.loads(line) for line in printed(trained, capsys, *arguments, "--json")]
    assert [line["chunks"] for line in lines] == [3, 3, 3, 9, 9, 9]
    assert [len(line["branches"]) for line in lines if "example" in line] == [2] * 4
    assert all(len(way["actions"]) >= 9 for way in lines[3]["branches"])
    assert lines[2]["examples"] == 2 and 0 <= lines[2]["accuracy"] <= 1 and lines[5]["memory_bytes"] > 0
    assert "kv_chunks, 9 chunks: " in printed(trained, capsys, *arguments)[1]


def test_the_tool_reads_a_text_and_keeps_its_memory(
    trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, [text] = trained.load_tokenizer(), texts_of(trained, 1)
    book, memory = tmp_path / "book.txt", tmp_path / "book.memory"
    book.write_text(" ".join(tokenizer.decode(list(chunk)) for chunk in text.chunks))
    question = tokenizer.decode(list(text.question))
    arguments = ("--input", str(book), "--question", question, "--branches", "2", "--max-new-tokens", "2")
    arguments += ("--memory", str(memory))
    first = json.loads(printed(trained, capsys, *arguments, "--json")[0])
    expected = asker_of(trained, branches=2, most_tokens=2, end=tokenizer.eod).ask(Text(0, text.chunks, text.question))
    assert [way["actions"] for way in first["branches"]] == [list(way.actions) for way in expected.ways]
    assert first["answer"] == tokenizer.decode(list(expected.best.written))
    lines = printed(trained, capsys, *arguments)
    best = expected.best
    assert load_memory(memory, asker_of(trained).root.memory, asker_of(trained).digest()) and best.summaries
    assert lines[0].startswith(f"{question}: ") and ", accepted)" in "".join(lines)
    for content, said in ((b"\xff\xfe\xff", "it cannot be read as text"), (b"", "it is empty")):
        book.write_bytes(content)
        with pytest.raises(UserError, match=said):
            printed(trained, capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--input", "x"), "nothing is asked; add --question TEXT"),
        (("--input", "x", "--question", "q", "--chunks", "3"), r"--chunks \[3\]: it is read with --task, not"),
        (("--task", "kv_chunks", "--memory", "m"), "--memory m: it is read with --input, not"),
    ],
)
def test_flags_that_nothing_reads_are_named(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tool().parse_arguments(["--load", "run", *arguments])
