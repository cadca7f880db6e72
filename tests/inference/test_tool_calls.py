"""Tools that answer while a model writes: when one is called, what stands in the text, at every layout the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megaforge.data.task_tokenizer import make_task_tokenizer
from megaforge.errors import UserError
from megaforge.inference.generation import Continuations, Sampling
from megaforge.inference.prompts import Prompt
from megaforge.inference.requests import Answerer, Writing
from megaforge.inference.restore import TrainedModel
from megaforge.inference.tool_calls import ToolCalls, ToolSetting, Watch
from megaforge.parallel.context import ParallelContext
from megaforge.reasoning.agent.episode import Context
from megaforge.reasoning.agent.reader import Reader
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.memory.file import save_memory
from megaforge.reasoning.tools.calculator import CALCULATOR
from megaforge.reasoning.tools.retrieval import Retrieval
from tests.inference.continue_one import generate
from tests.inference.test_generation import PROMPTS, build
from tests.inference.text_model import Bytes, restored, saved_model
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import train
from tests.reasoning.test_agent_parity import agent_arguments

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import evaluate as evaluate_tool
import generate as generate_tool


class Echo:
    """Says a request again."""

    opens, closes = "<<say ", ">"

    def __call__(self, request: str) -> str:
        return request + request


def calls() -> ToolCalls:
    return ToolCalls([CALCULATOR, Echo()], Bytes())


def follow(pieces: list[str]) -> tuple[str, ToolCalls]:
    """A text whose tokens are ``pieces``, with what tools put into it."""
    own = calls()
    watch, text = Watch(own), ""
    for piece in pieces:
        text += piece
        if given := watch.answer(text):
            for token in given:
                text += chr(token)
                watch.passed(text)
    return text, own


@pytest.mark.parametrize(
    ("pieces", "text", "answered", "missed"),
    [
        (["a <<", "48/2", "="], "a <<48/2=24>>", 1, 0),
        (list("<<1+1= <<2*3="), "<<1+1=2>> <<2*3=6>>", 2, 0),
        (["x = 3"], "x = 3", 0, 0),
        (["<<1+1=", "2>> so x ="], "<<1+1=2>>2>> so x =", 1, 0),
        (["<<1+1 =2>> so x", "="], "<<1+1 =2>> so x=", 0, 1),
        (["<<1+1=2", ">> and <<3+4", "="], "<<1+1=2>> and <<3+4=7>>", 1, 1),
        (["<<1+", "<<2+3="], "<<1+<<2+3=5>>", 1, 0),
        (["<<say a", ">"], "<<say a>aa", 1, 0),
        (["<<say <<1+1=", ">"], "<<say <<1+1=2>>>", 1, 0),
        (["<<say <<", ">", "1+1="], "<<say <<><<<<1+1=", 1, 0),
        (["<<x="], "<<x=error: not numbers with + - * / ( )>>", 1, 0),
        (["<<="], "<<=error: not numbers with + - * / ( )>>", 1, 0),
    ],
)
def test_when_a_tool_is_called(pieces: list[str], text: str, answered: int, missed: int) -> None:
    found, own = follow(pieces)
    assert (found, own.calls, own.missed) == (text, answered, missed)
    assert own.line().startswith(f"--tools: {answered} requests were answered") and ("were not" in own.line()) == missed


def inserted(tp: int, pp: int) -> list[list[int]]:
    """Texts of which two are given tokens, one of them while it still has some to come."""
    batch = Continuations(build(ParallelContext.create(tp=tp, pp=pp)), PROMPTS, Sampling(temperature=0))
    texts: list[list[int]] = [[] for _ in PROMPTS]
    for step in range(9):
        for number, token in batch.draw().items():
            texts[number].append(token)
        assert batch.inserted == {1: {1}, 3: {1, 3}, 4: {1}, 5: {1}}.get(step, {1} if step == 2 else set())
        if step == 0:
            batch.insert(1, [11, 12, 13])
        if step == 2:
            batch.insert(3, [14])
            batch.insert(1, [15, 16])
        batch.drop([0] if step == 4 else [])
    return texts


@torch.no_grad()
def test_what_is_inserted_is_read_as_if_it_was_drawn(ranks: RankPool) -> None:
    model, texts = build(ParallelContext.single()), inserted(1, 1)
    for number, (given, at) in {1: ([11, 12, 13, 15, 16], 1), 3: ([14], 3)}.items():
        before = list(generate(model, PROMPTS[number], at, Sampling(temperature=0)))
        after = list(generate(model, [*PROMPTS[number], *before, *given], 9 - at - len(given), Sampling(temperature=0)))
        assert texts[number] == [*before, *given, *after]
    assert [len(text) for text in texts] == [5, 9, 9, 9, 9]
    for number in (0, 2, 4):
        assert texts[number] == list(generate(model, PROMPTS[number], len(texts[number]), Sampling(temperature=0)))
    assert ranks.run(4, inserted, 2, 2) == [texts] * 4
    batch = Continuations(model, [[1]], Sampling(temperature=0))
    batch.insert(0, [])
    batch.draw()
    assert not batch.inserted
    with pytest.raises(UserError, match="holds token 61"):
        batch.insert(0, [61])


def scripted(script: str) -> Callable[[Continuations, Tensor], Tensor]:
    """What a model writes that has learnt ``script``: each text goes on with the character behind what it has."""
    written: dict[int, int] = {}

    def sampled(batch: Continuations, logits: Tensor) -> Tensor:
        assert len(logits) == len(batch.going_on)
        found = []
        for number in batch.going_on:
            if not batch._given.get(number):  # what is drawn now counts
                written[number] = written.get(number, -1) + 1
            found.append(script.encode()[min(written.get(number, 0), len(script) - 1)])
        return torch.tensor(found)

    return sampled


def answered(save: str, tp: int, pp: int) -> tuple[list[str], int]:
    trained = restored(save, tp=tp, pp=pp)
    own = ToolCalls([CALCULATOR], Bytes())
    answerer = Answerer(trained, Bytes(), 64, tools=own)
    with mock.patch.object(Continuations, "_sampled", scripted("so <<6*7= and\n")):
        texts = answerer.answer([Writing((65,), 30, ("\n",)), Writing((66, 67), 9), Writing((68,), 30, ("42",))])
    return [str(text) for text in texts], own.calls


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"))


def test_answers_have_what_tools_write_at_every_layout(ranks: RankPool, save: str) -> None:
    expected = ["so <<6*7=42>> and", "so <<6*7=", "so <<6*7="], 2  # the second has no room for more
    assert answered(save, 1, 1) == expected
    assert ranks.run(2, answered, save, 1, 2) == [expected] * 2


def test_the_command_generates_with_tools(save: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "--load",
        save,
        "--prompt",
        "A",
        "--max-new-tokens",
        "20",
        "--stop",
        "\n",
        "--json",
        "--tools",
        "calculator",
    ]
    flags = generate_tool.parse_arguments([*line, "--temperature", "0"])
    writer = generate_tool.Writer(flags, restored(save), Bytes())
    with mock.patch.object(Continuations, "_sampled", scripted("so <<6*7= and\n")):
        writer.write([Prompt("p", "A")], Sampling(temperature=0))
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["end"], found["tokens"]) == ("so <<6*7=42>> and", "stop", 18)
    assert writer.tools.line() == "--tools: 1 requests were answered"


def test_the_command_evaluates_with_tools(save: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "6*7?", "answer": "42"}\n')
    (tmp_path / "q.yaml").write_text("prompts: q.jsonl\nmetrics: [last_number, brief]\nmax_new_tokens: 20\n")
    (tmp_path / "mine.py").write_text(
        "from megaforge.registry import TEXT_METRICS, TOOLS\n"
        "from megaforge.tasks.metrics import Mean\n"
        "class Brief(Mean):\n    def score(self, text, answers):\n        return float(len(text) < 30)\n"
        "TEXT_METRICS.register('brief', Brief())\n"
        "class Shout:\n    opens, closes = '<!', '>'\n"
        "    def __call__(self, request):\n        return request.upper()\n"
        "TOOLS.register('shout', Shout())\n"
    )
    cache = ["--cache", str(tmp_path / "cache")]
    line = ["--load", save, "--tasks", str(tmp_path / "q.yaml"), "--json", "--extensions", str(tmp_path / "mine.py")]
    for more, expected in (([], 0.0), (["--tools", "calculator", "shout"], 1.0)):
        trained = restored(save)
        with (
            mock.patch.object(Continuations, "_sampled", scripted("so <<6*7= ,\n")),
            mock.patch.object(TrainedModel, "load_tokenizer", lambda self, file=None: Bytes()),
        ):
            evaluate_tool.evaluate_tasks(evaluate_tool.parse_arguments([*line, *cache, *more]), trained)
        told = capsys.readouterr()
        results = {one["metric"]: one["value"] for one in json.loads(told.out)["results"]}
        assert results["last_number"] == expected and results["brief"] == 1, "a cache knows which tools there were"
        assert ("--tools: 1 requests were answered" in told.err) == bool(more)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("agent")
    make_task_tokenizer(["kv_chunks"], str(folder / "words.json"))
    train(agent_arguments(folder / "words.json", "--save", str(folder / "run"), "--memory-slots", "8"))
    return str(folder / "run")


def found(save: str, memory: str, tp: int, pp: int) -> list[str]:
    trained = restored(save, tp=tp, pp=pp)
    tool = Retrieval.of(ToolSetting(trained.model, trained.config, trained.load_tokenizer(), memory))
    return [tool("ask k3"), tool("ask k3"), tool(""), tool("ask " * 4096)]


def test_retrieval_finds_what_an_agent_has_kept(ranks: RankPool, agent: str, save: str, tmp_path: Path) -> None:
    trained, file = restored(agent), tmp_path / "m"
    setting = ToolSetting(trained.model, trained.config, trained.load_tokenizer(), str(file))
    with pytest.raises(UserError, match="there is no such file"):
        Retrieval.of(setting)
    memory = AgentMemory(MemoryShape.of(trained.config), torch.float64)
    reader = Reader(trained.model, trained.config.model, trained.config.data.seq_length, 1)
    reader.share_heads()
    tokens = tuple(setting.tokenizer.encode("ask k3"))
    seen = reader.read([Context(tokens, (0, 0), len(tokens) - 1)])
    assert seen is not None
    [one] = seen.values()
    for scale, word in ((1.0, "k3 v5"), (-1.0, "n1 n2"), (2.0, "n3 k4"), (0.1, "n5")):
        memory.write(one.key * scale, setting.tokenizer.encode(word))
    save_memory(file, memory, reader.digest())
    chunks = " ".join(("n3 k4", "k3 v5", "n5", "n1 n2")[: trained.config.rl.memory_top_k])
    expected = [f"<result>{chunks}</result>"] * 2
    told = found(agent, str(file), 1, 1)
    assert told[:2] == expected and "error: a request of 0 tokens" in told[2] and "error: a request of 4096" in told[3]
    assert ranks.run(2, found, agent, str(file), 1, 2) == [told] * 2
    plain = restored(save)
    with pytest.raises(UserError, match="has nothing that makes keys"):
        Retrieval.of(ToolSetting(plain.model, plain.config, Bytes(), str(file)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tools", "calculater"), "did you mean calculator"),
        (("--tools", "calculator", "calculator"), "name each tool once"),
        (("--tools", "retrieval"), "add --memory FILE"),
        (("--memory", "m"), "--memory m: add --tools retrieval"),
        (("--tools", "calculator", "--speculate", "mtp", "--temperature", "0"), "leave one of the two out"),
        (("--extensions", "none.py"), "none.py"),
    ],
)
def test_bad_flags_are_named(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate_tool.parse_arguments(["--load", "x", "--prompt", "x", *flags])


def test_tools_answer_tasks_alone() -> None:
    with pytest.raises(UserError, match="--tools calculator: it goes with --tasks"):
        evaluate_tool.parse_arguments(["--load", "x", "--input", "x", "--tools", "calculator"])
