"""A command line of Megatron-LM's, or ours, flag by flag: the words in our spelling, what is told, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megaforge.config.megatron.rows import ANY, Outcome, Row
from megaforge.config.megatron.rules import RULES, TAKES
from megaforge.config.megatron.table import MEANINGS, own_flags, row_of, takes_one_of, value_outcome


@dataclass
class Given:
    """A flag as it was written, its name with dashes inside, and its values. ``words`` are what it is in our spelling,
    where one may be ``--flag=value``: none where it becomes nothing. Words before the first flag have an empty name."""

    flag: str
    values: list[str]
    words: list[str]

    @property
    def written(self) -> str:
        return " ".join((self.flag, *self.values))


@dataclass
class Line:
    """What stands on a line.

    Attributes:
        given: its flags, in order; rules may drop some.
        as_there: whether Megatron-LM's defaults hold where it is silent.
        needless: flags that were taken and change nothing.
        notes: what is told once.
        refused: why it cannot be followed; empty where it can.
    """

    given: list[Given]
    as_there: bool = False
    needless: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def find(self, *flags: str) -> Given | None:
        """The last one of these flags."""
        return next((one for one in reversed(self.given) if one.flag in flags), None)

    def value(self, *flags: str) -> str | None:
        """The first value of the last one of these flags; None where there is none."""
        found = self.find(*flags)
        return found.values[0] if found is not None and found.values else None

    def drop(self, *flags: str) -> None:
        self.given = [one for one in self.given if one.flag not in flags]

    def add(self, *words: str) -> None:
        """Puts words of ours at the end."""
        self.given.append(Given(words[0], list(words[1:]), list(words)))


def read_line(argv: Sequence[str], as_there: bool = False) -> Line:
    """The flags of a line, in our words; nothing is raised, ``refused`` says what is wrong."""
    line = Line([], as_there)
    line.given = [one for one in _split(argv) if one.flag not in TAKES or _fits(line, one, TAKES[one.flag])]
    for rule in RULES:
        rule(line)
    for one in line.given:
        row = None if one.flag in own_flags() else row_of(one.flag.removeprefix("--"))
        if row is not None:
            _apply(line, one, row)
        elif len(one.values) > 1 and takes_one_of(one.flag):
            line.refused.append(f"{one.written}: lists are not available; write one of them")
            one.words = []
        elif len(one.values) == 1 and (outcome := value_outcome(one.flag, one.values[0])) is not None:
            _follow(line, one, outcome)
    if line.needless:
        line.notes.append(f"as without them, these change nothing: {', '.join(line.needless)}")
    return line


def meaning(flag: str) -> str | None:
    """What says the same as a flag that neither program has; None where we know nothing of it."""
    found = MEANINGS.get(flag.removeprefix("--").lower())
    return f"write {found}" if found else None


def _split(argv: Sequence[str]) -> list[Given]:
    found: list[Given] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag != "--":
            flag = flag.replace("_", "-")
            found.append(Given(flag, [value] if equals else [], [flag + equals + value]))
        elif found:
            found[-1].values.append(word)
            found[-1].words.append(word)
        else:
            found.append(Given("", [word], [word]))
    return found


def _fits(line: Line, one: Given, arity: int) -> bool:
    """Whether a flag has as many values as it takes; what is wrong is refused."""
    if "" in one.values:
        line.refused.append(f"{one.flag} '': the value is empty; give one, or leave the flag out")
    elif arity != ANY and len(one.values) < arity:
        line.refused.append(f"{one.flag}: expected one argument")
    elif arity != ANY and len(one.values) > arity:
        line.refused.append(f"{one.values[arity]}: no flag takes this word; {one.flag} takes {arity or 'none'}")
    else:
        return True
    return False


def _apply(line: Line, one: Given, row: Row) -> None:
    if _fits(line, one, row.arity):
        _follow(line, one, row.values.get(" ".join(one.values).lower(), row.outcome))
    else:
        one.words = []


def _follow(line: Line, one: Given, outcome: Outcome) -> None:
    if outcome.refused:
        line.refused.append(f"{one.written}: {outcome.refused}")
    if outcome.note:
        line.notes.append(f"{one.written}: {outcome.note}")
    if not (outcome.words or outcome.note or outcome.refused):
        line.needless.append(one.written)
    value = " ".join(one.values)
    one.words = [word.replace("{}", value) for word in outcome.words]
