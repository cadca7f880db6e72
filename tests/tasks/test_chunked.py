"""Tasks in chunks: a reader that knows nothing of how they are made finds the answers; they are the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from megaforge.errors import UserError
from megaforge.registry import CHUNKED_TASKS
from megaforge.tasks.chunked import ABSENT, FILLER, make_chunked, make_window, words_of

NAMES = CHUNKED_TASKS.builtin


def pairs(text: str) -> dict[str, str]:
    return dict(re.findall(r"\b(k\d+) (v\d+)\b", text))


def value_of_key(text: str, question: str) -> list[str]:
    (key,) = re.fullmatch(r"ask (k\d+)", question).groups()  # type: ignore[union-attr]
    return [pairs(text).get(key, ABSENT)]


def values_of_keys(text: str, question: str) -> list[str]:
    return [pairs(text).get(key, ABSENT) for key in question.removeprefix("ask ").split()]


def followed(text: str, question: str) -> list[str]:
    known: dict[str, str] = {}
    for name, source in re.findall(r"\b(x\d+) = ([xv]\d+)\b", text):
        known[name] = source if source.startswith("v") else known.get(source, ABSENT)
    return [known.get(question.removeprefix("ask "), ABSENT)]


def added(text: str, question: str) -> list[str]:
    assert question == "ask sum"
    return [str(sum(int(digit) for digit in re.findall(r"\+ (\d)", text)) % 10)]


def computed(text: str, question: str) -> list[str]:
    assert question == "ask result"
    value = 0
    for sign, digit in re.findall(r"([=+*-]) (\d)", text):
        number = int(digit)
        value = {"=": number, "+": value + number, "-": value - number, "*": value * number}[sign] % 10
    return [str(value)]


READERS: dict[str, Callable[[str, str], list[str]]] = {
    "kv_chunks": value_of_key,
    "needle_chunks": value_of_key,
    "tracking_chunks": followed,
    "recall_chunks": values_of_keys,
    "running_sum": added,
    "arithmetic_chunks": computed,
}


def least(name: str) -> int:
    return int(CHUNKED_TASKS.get(name).least)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_finds_the_answer_in_all_chunks_together(name: str) -> None:
    words = set(words_of(name))
    assert len(words) == len(words_of(name)) and words.issuperset(FILLER)
    answers = set()
    for index in range(60):
        chunks = max(least(name), (1, 16, 64)[index % 3])
        one = make_chunked(name, 3, index, chunks, 16)
        assert len(one.chunks) == chunks and {len(chunk.split(" ")) for chunk in one.chunks} == {16}
        assert words.issuperset(" ".join((*one.chunks, one.question, one.answer)).split(" "))
        assert READERS[name](" ".join(one.chunks), one.question) == list(one.answers), one
        assert ABSENT not in one.answers and one.answer == " ".join(one.answers)
        answers.add(one.answers)
    assert len(answers) >= 9


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_finds_the_answer_of_a_window_or_that_it_is_absent(name: str) -> None:
    absent, lengths = 0, set()
    for index in range(300):
        one = make_window(name, 3, index, 110, 16, questions=1 + index % 8)
        for question, answers in one.asked:
            assert READERS[name](" ".join(one.text), " ".join(question)) == list(answers), one
        assert 0 < len(one.text) <= 110 and 1 <= len(one.asked) <= 1 + index % 8
        assert len({question for question, _ in one.asked}) == len(one.asked)
        absent += one.asked[0][1] == (ABSENT,)
        lengths.add(len(one.text))
    assert 0.2 * 300 < absent < 0.6 * 300 if CHUNKED_TASKS.get(name).can_lack else absent == 0
    assert len(lengths) > (20 if CHUNKED_TASKS.get(name).can_lack else 3)


def test_absence_cannot_be_told_from_how_much_is_told() -> None:
    told: dict[bool, list[int]] = {True: [], False: []}
    for index in range(300):
        one = make_window("kv_chunks", 0, index, 16, 16)
        if len(one.text) == 16:
            told[one.asked[0][1] == (ABSENT,)].append(len(re.findall("k", " ".join(one.text))))
    assert set(told[True]) == set(told[False]) == {3} and min(map(len, told.values())) > 50


def test_further_questions_are_of_what_is_told_once_and_of_as_many_that_are_not() -> None:
    counts = []
    for index in range(100):
        one = make_window("kv_chunks", 2, index, 48, 16, questions=100)
        told = re.findall(r"k\d+", " ".join(one.text))
        more = [(" ".join(question), answers) for question, answers in one.asked[1:]]
        if len(one.text) == 48:  # nothing is cut off
            once = {f"ask {key}" for key in told if told.count(key) == 1} - {" ".join(one.asked[0][0])}
            assert once == {question for question, answers in more if answers != (ABSENT,)}
            assert len(more) == 2 * len(once)
        counts.append(len(more))
        few = make_window("kv_chunks", 2, index, 48, 16, questions=4)
        assert (few.text, few.asked) == (one.text, one.asked[:4])
    assert max(counts) > 14
    assert len(make_window("running_sum", 2, 0, 48, 16, questions=100).asked) == 1


def test_what_is_asked_for_stands_anywhere() -> None:
    places = []
    for index in range(200):
        one = make_chunked("kv_chunks", 1, index, 4, 16)
        key = one.question.removeprefix("ask ")
        (chunk,) = (number for number, text in enumerate(one.chunks) if key in text.split())
        places.append(chunk * 16 + one.chunks[chunk].split().index(key))
    assert min(places) < 4 and max(places) > 58 and all(sum(p // 16 == c for p in places) > 25 for c in range(4))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_example(name: str) -> None:
    for make in make_chunked, make_window:
        one = make(name, 1, 2, 6 if make is make_chunked else 96, 16)
        assert one == make(name, 1, 2, 6 if make is make_chunked else 96, 16)
        assert one != make(name, 1, 3, 6 if make is make_chunked else 96, 16) != make(name, 2, 3, 8 * 16, 16)


def test_examples_that_were_made_before() -> None:
    """On every machine, and by later versions: what runs were trained on."""
    one = make_chunked("kv_chunks", 1234, 0, 2, 8)
    assert (one.question, one.chunks, one.answers) == KEPT
    window = make_window("kv_chunks", 1234, 1, 8, 8, questions=3)
    assert (" ".join(window.text), window.asked) == KEPT_WINDOW


KEPT = ("ask k36", ("k8 v4 n15 n0 k11 v11 k39 v2", "k40 v8 n3 k36 v15 k24 v5 n0"), ("v15",))
KEPT_WINDOW = (
    "k55 v0 k23 v1 k38 v13 n2 n13",
    ((("ask", "k55"), ("v0",)), (("ask", "k38"), ("v13",)), (("ask", "k19"), ("absent",))),
)


@pytest.mark.parametrize(
    ("name", "chunks", "words", "said"),
    [
        ("kv_chunks", 2, 5, "task kv_chunks: a chunk of 5 words is too short; give at least 6"),
        ("tracking_chunks", 5, 16, "task tracking_chunks: 5 chunks are too few; give at least 6"),
        ("running_sum", 0, 16, "0 chunks are too few"),
        ("kv_chunk", 2, 16, "did you mean kv_chunks?"),
    ],
)
def test_too_little_room(name: str, chunks: int, words: int, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        make_chunked(name, 0, 0, chunks, words)


def test_a_window_without_a_question_is_refused() -> None:
    with pytest.raises(ValueError, match="task kv_chunks: 0 questions about chunks of 16 words"):
        make_window("kv_chunks", 0, 0, 64, 16, questions=0)


def test_the_least_room() -> None:
    one = make_chunked("kv_chunks", 0, 0, 1, 6)
    assert len(pairs(one.chunks[0])) == 3 and value_of_key(one.chunks[0], one.question) == list(one.answers)
    with pytest.raises(UserError, match=r"a window of 15 words has no room for 1 chunks of 16; give at least 16"):
        make_window("needle_chunks", 0, 0, 15, 16)
    with pytest.raises(UserError, match=r"a window of 95 words has no room for 6 chunks of 16; give at least 96"):
        make_window("tracking_chunks", 0, 0, 95, 16)
