"""Examples are what their tasks say, fill their room, and are the same everywhere."""

from __future__ import annotations

import re
from random import Random

import pytest

from megaforge.errors import UserError
from megaforge.registry import TASKS, TEXT_METRICS
from megaforge.tasks.example import Example, Room, make_example
from megaforge.tasks.words import Growing, distinct_words, scattered


def words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("name", TASKS.builtin)
@pytest.mark.parametrize("length", [100, 400, 1111])
def test_an_example_fills_its_room_and_its_answer_is_right(name: str, length: int) -> None:
    metric = TEXT_METRICS.get(TASKS.get(name).metric)
    one = make_example(name, seed=3, index=5, room=Room(length, words))
    assert length - 40 <= words(one.text) <= length
    assert one == make_example(name, seed=3, index=5, room=Room(length, words))
    others = [make_example(name, 3, 6, Room(length, words)), make_example(name, 4, 5, Room(length, words))]
    assert all(other.prompt != one.prompt for other in others)
    assert metric.value(metric.sums(one.answer, one.answers), 1) == 1.0
    assert metric.value(metric.sums(one.answer[:-2], one.answers), 1) < 1.0
    assert not one.prompt.endswith((" ", one.answers[-1])) and not any(
        stop in one.answer for stop in TASKS.get(name).stops
    )


def test_the_smallest_examples_that_there_are() -> None:
    for name in TASKS.builtin:
        with pytest.raises(UserError, match=rf"task {name} at length 3: an example has at least (\d+) tokens") as told:
            make_example(name, 0, 0, Room(3, words))
        need = int(re.findall(r"at least (\d+)", str(told.value))[0])
        assert words(make_example(name, 0, 0, Room(need, words)).text) == need
        with pytest.raises(UserError, match="give a larger length"):
            make_example(name, 0, 0, Room(need - 1, words))


def examples(name: str, count: int = 30, length: int = 300) -> list[Example]:
    return [make_example(name, 1, index, Room(length, words)) for index in range(count)]


def test_pass_keys_and_needles_stand_in_their_texts() -> None:
    places = []
    for one in examples("passkey"):
        assert one.prompt.count(one.answers[0]) == 2
        places.append(one.prompt.index(one.answers[0]) / len(one.prompt))
    assert min(places) < 0.3 and max(places) > 0.7, "at every depth"
    for one in examples("needle"):
        told = dict(re.findall(r"The magic number of (\w+) is (\d+)\.", one.prompt))
        asked = re.findall(r"What is the magic number of (\w+)\?", one.prompt)[0]
        assert len(told) == 4 and one.answers == (told[asked],)


def test_recall_asks_for_values_of_its_keys() -> None:
    for one in examples("recall"):
        pairs = re.findall(r"(\w+) (\d+)[,.]", one.prompt)
        asked = one.prompt.split("The numbers of ")[1].split(", in this")[0].split(", ")
        assert len(dict(pairs)) == len(pairs) > 20 and one.answers == tuple(dict(pairs)[key] for key in asked)
        assert len(set(asked)) == 4
    assert len(make_example("recall", 0, 0, Room(20, words)).answers) < 4, "fewer pairs than questions"


def test_variables_are_followed_by_a_reader_of_their_lines() -> None:
    for one in examples("variable_tracking"):
        values: dict[str, str] = {}
        for name, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", one.prompt):
            values[name] = number or values[source]  # each stands behind what it is made of
        wanted = re.findall(r"that have the value (\d+)", one.prompt)[0]
        assert [name for name, value in values.items() if value == wanted] == list(one.answers)
        assert len(values) == 10 and len(one.answers) == 5


def test_sums_are_what_a_calculator_says() -> None:
    seen = set()
    for one in examples("modular_arithmetic", 40, 60):
        first, *terms = one.prompt.split(": ")[1].removesuffix(" =").split()
        value = int(first)
        for sign, number in zip(terms[::2], terms[1::2], strict=True):
            value = eval(f"{value} {sign} {number}") % 7  # noqa: S307
        assert one.answers == (str(value),)
        seen.add(value)
    assert len(seen) == 7


def test_copies_are_copies() -> None:
    for one in examples("copying", 5):
        assert one.prompt.split("\n")[0] == f"Text: {one.answers[0]}"


def test_words_never_repeat_even_where_two_syllables_do_not_suffice() -> None:
    many = Growing(distinct_words(Random(0))).first(5000)
    assert len(set(many)) == 5000 and {len(word) for word in many} == {4, 6}
    assert scattered(Random(1), ["a", "b"], []) == ["a", "b"] and scattered(Random(1), [], ["x", "y"]) == ["x", "y"]


def test_an_unknown_task_is_told_those_that_there_are() -> None:
    with pytest.raises(UserError, match="'passkye' is not a known task .*did you mean passkey"):
        make_example("passkye", 0, 0, Room(100, words))


def test_examples_that_do_not_grow_are_refused() -> None:
    with pytest.raises(ValueError, match="no more than 9 tokens: sizes must grow"):
        Room(9, words).fill(lambda size: Example("always the same", ("yes",)))
