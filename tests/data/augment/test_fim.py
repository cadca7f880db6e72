"""Fill-in-the-middle against the paper's own words: a document comes back whole when it is put together again."""

from __future__ import annotations

import numpy as np
import pytest

from megaforge.config.cli import parse_config
from megaforge.data.augment.fim import FillInTheMiddle
from megaforge.data.augment.source import AugmentedSource, augmentations_of
from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from tests.toys.counting_source import Counting

PRE, MID, SUF, EOD = 900, 901, 902, 0


def fim(rate: float = 1.0, spm: float = 0.5, **rates: float) -> FillInTheMiddle:
    return FillInTheMiddle(7, (PRE, MID, SUF), EOD, rate, spm, rates)


def window(*lengths: int, ends: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Documents of these lengths, of counted ids and EOD, and their marks."""
    tokens, marks, count = np.empty(sum(lengths), np.int64), np.zeros(sum(lengths), np.bool_), 0
    tokens[:] = np.arange(1, len(tokens) + 1)
    for length in lengths:
        marks[count] = True
        count += length
        if ends and length:
            tokens[count - 1] = EOD
    return tokens, marks


def put_together(document: list[int]) -> tuple[str, list[int]]:
    """The order that a rearranged document was in, and what it was, by the paper's formats."""
    end = [EOD] if document[-1] == EOD else []
    document = document[: len(document) - len(end)]
    middle, suffix = document.index(MID), document.index(SUF)
    if document[:2] == [PRE, SUF]:
        return "spm", document[middle + 1 :] + document[2:middle] + end
    assert document[0] == PRE and suffix < middle
    return "psm", document[1:suffix] + document[middle + 1 :] + document[suffix + 1 : middle] + end


@pytest.mark.parametrize("ends", [True, False])
def test_documents_lose_their_last_three_tokens_and_nothing_else(ends: bool) -> None:
    orders, middles = set(), []
    for k in range(200):
        tokens, marks = window(40, 9, 1, 3, 4, 5, 30, ends=ends)
        before = tokens.copy()
        fim().rewrite(k, None, tokens, marks)
        starts = [*np.flatnonzero(marks).tolist(), len(tokens)]
        for start, stop in zip(starts, starts[1:], strict=False):
            whole, now = before[start:stop].tolist(), tokens[start:stop].tolist()
            if stop - start - ends < 4:
                assert now == whole
                continue
            order, text = put_together(now)
            orders.add(order)
            kept = whole[: len(whole) - ends - 3] + whole[len(whole) - ends :]
            assert text == kept
            middles.append(len(now) - now.index(MID))
    assert orders == {"psm", "spm"} and len(set(middles)) > 20


def test_orders_and_shares_are_those_asked_for() -> None:
    def share(augmentation: FillInTheMiddle, domain: str | None, token: int) -> float:
        found = 0
        for k in range(400):
            tokens, marks = window(30, 30)
            augmentation.rewrite(k, domain, tokens, marks)
            found += int((tokens == token).sum())
        return found / 800

    assert share(fim(rate=0.3), None, PRE) == pytest.approx(0.3, abs=0.05)
    assert share(fim(rate=0.0), None, PRE) == 0 and share(fim(rate=1.0), None, MID) == 1
    assert share(fim(rate=0.0, code=1.0), "code", SUF) == 1 and share(fim(rate=1.0, web=0.0), "web", PRE) == 0
    for spm, order in ((0.0, "psm"), (1.0, "spm")):
        for k in range(20):
            tokens, marks = window(30)
            fim(spm=spm).rewrite(k, None, tokens, marks)
            alike = tokens[1] == SUF and not spm  # an empty prefix
            assert alike or put_together(tokens.tolist())[0] == order


def test_a_window_that_begins_inside_a_document() -> None:
    tokens, marks = window(20, 20)
    marks[0] = False
    fim().rewrite(3, None, tokens, marks)
    assert (tokens == MID).sum() == 2
    empty = np.empty(0, np.int64)
    fim().rewrite(3, None, empty, np.empty(0, np.bool_))


def test_flags() -> None:
    tokens = ("--fim-prefix-token", "900", "--fim-middle-token", "901", "--fim-suffix-token", "902")
    given = parse_config(["--fim-data", *tokens, "--fim-rate", "1", "--fim-domain-rates", "code:0.25", "web:0"]).config
    (found,) = augmentations_of(given, None)
    assert found.state() == {
        "--fim-rate": 1.0,
        "--fim-spm-rate": 0.5,
        "--fim-domain-rates": {"code": 0.25, "web": 0.0},
        "the tokens of --fim-data": [900, 901, 902],
    }
    assert augmentations_of(parse_config([]).config, None) == []
    null = load_tokenizer("NullTokenizer", "1000")
    for flags, complaint in (
        (("--fim-data",), "--fim-prefix-token: no token is named, and there is no --tokenizer-model of the names"),
        (("--fim-data", *tokens[:4]), "--fim-suffix-token: no token is named"),
        (("--fim-data", *tokens[:5], "x"), "--fim-suffix-token x: no control token of the tokenizer has this name"),
        (("--fim-data", *tokens, "--vocab-size", "901"), "--fim-middle-token 901: the model's vocabulary has"),
    ):
        with pytest.raises(UserError, match=complaint):
            augmentations_of(parse_config(flags).config, null if "there is no" not in complaint else None)
    for word in ("code", "code:2", ":1", "code:x"):
        with pytest.raises(UserError, match=f"--fim-domain-rates {word}: {word} is not DOMAIN:RATE"):
            parse_config(["--fim-data", "--fim-domain-rates", word])
    with pytest.raises(UserError, match="code stands there twice"):
        parse_config(["--fim-data", "--fim-domain-rates", "code:1", "code:0"])


def test_a_checkpoint_goes_on_with_the_same_only() -> None:
    plain, changed = AugmentedSource(Counting(3, 8), []), AugmentedSource(Counting(3, 8), [fim()])
    plain.check_state(plain.state(4) | {"consumed_samples": 4})
    changed.check_state(changed.state(4) | {"consumed_samples": 4})
    assert plain.state(4) == Counting(3, 8).state(4)
    for now, before in ((plain, changed), (changed, plain), (AugmentedSource(Counting(3, 8), [fim(0.5)]), changed)):
        with pytest.raises(UserError, match="changed otherwise .*: --fim-rate was (1.0|None) and is now"):
            now.check_state(before.state(4) | {"consumed_samples": 4})
