"""Words, spans and counts of a whole batch against plain Python on one text at a time."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from megaforge.data.corpus import native
from megaforge.data.corpus.columns import flat_bytes, one_array, rewritten
from megaforge.data.corpus.features import features_of
from megaforge.data.corpus.records import CODE, make_records, replaced
from megaforge.data.corpus.runs import BINS, count_runs, repeated, signatures
from megaforge.data.corpus.stop_words import STOP_WORDS, stop_word_masks
from megaforge.data.corpus.words import HashSet, hash_spans, lines_of, plain_words, words_of
from tests.data.corpus_files import documents

TEXTS = ["", *documents(60, seed=2), "a", " ", "\n\n", "the cat the cat the cat", "Ünïcode—dash “quote”", "x" * 999, ""]


@pytest.fixture(autouse=True, scope="module", params=["native", "numpy"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test counts with the C++ extension, and again with NumPy."""
    if request.param == "native":
        assert native.corpus_text() is not None, "the extension megaforge.data._corpus_text is not built"
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_module", None)
        yield


def plain(text: str) -> list[str]:
    return re.findall(r"[0-9a-z_]+|[^\x00-\x7f\u00ab\u00bb\u00b7\u2000-\u206f\u3000-\u303f]+", text)


def split(text: str) -> list[bytes]:
    return re.findall(rb"[0-9A-Za-z_\x80-\xff]+", text.encode())


def test_words_are_those_of_a_plain_split() -> None:
    column = pa.chunked_array([pa.array(TEXTS[:5], pa.large_string()), pa.array(TEXTS[5:], pa.large_string())])
    data, offsets = flat_bytes(column)
    words = words_of(data, offsets)
    flat = data.tobytes()
    for row, text in enumerate(TEXTS):
        mine = slice(words.first[row], words.first[row + 1])
        spans = zip(words.start[mine].tolist(), words.end[mine].tolist(), strict=True)
        assert [flat[start:end] for start, end in spans] == split(text)
        assert set(words.row[mine].tolist()) <= {row}
    by_hash: dict[int, bytes] = {}
    for start, end, key in zip(words.start.tolist(), words.end.tolist(), words.hash.tolist(), strict=True):
        assert by_hash.setdefault(key, flat[start:end]) == flat[start:end]
    assert len(set(by_hash.values())) == len(by_hash)


def test_a_slice_of_a_column_and_no_rows() -> None:
    column = pa.array(TEXTS, pa.large_string()).slice(7, 9)
    data, offsets = flat_bytes(column)
    assert data.tobytes() == "".join(TEXTS[7:16]).encode() and len(offsets) == 10
    for empty in (pa.array([], pa.large_string()), pa.chunked_array([], pa.large_string())):
        assert len(flat_bytes(empty)[0]) == 0 and len(plain_words(empty).hash) == 0
    assert rewritten(pa.array(["ab", ""]), "b", "c")[0].to_pylist() == ["ac", ""]
    assert one_array(pa.chunked_array([["a"], ["b"]])).to_pylist() == ["a", "b"]


def test_runs_of_words_are_equal_where_their_words_are_and_stay_in_their_row() -> None:
    texts = ["one two three four", "ZERO: one, two “three”", "two three", "", "one"]
    words = plain_words(pa.array(texts, pa.large_string()))
    for n in (1, 2, 3, 4, 5):
        row, grams = words.ngrams(n)
        expected = [
            (number, tuple(plain(text.lower())[begin : begin + n]))
            for number, text in enumerate(texts)
            for begin in range(len(plain(text.lower())) - n + 1)
        ]
        assert row.tolist() == [number for number, _ in expected]
        assert len(set(grams.tolist())) == len({run for _, run in expected})
        assert len(set(zip(grams.tolist(), [run for _, run in expected], strict=True))) == len(set(grams.tolist()))


def test_hashes_of_spans_do_not_depend_on_their_place() -> None:
    source = random.Random(1)
    data = np.frombuffer(bytes(source.choices(b"\0ab", k=9000)), np.uint8)
    starts = np.array([source.randint(0, 8300) for _ in range(4000)])
    ends = starts + np.array([source.choice((0, 1, 2, 3, 7, 8, 9, 16, 17, 256, 257, 600)) for _ in range(4000)])
    known: dict[int, bytes] = {}
    for start, end, key in zip(starts.tolist(), ends.tolist(), hash_spans(data, starts, ends).tolist(), strict=True):
        assert known.setdefault(key, data[start:end].tobytes()) == data[start:end].tobytes()
    assert len(set(known.values())) == len(known)


def test_lines_and_paragraphs() -> None:
    texts = ["a\nbb\n\nccc\n", "\n", "", "\n", "one", "p q\n\n\nr\n\ns", "\nt\n", "\n\nu"]
    data, offsets = flat_bytes(pa.array(texts, pa.large_string()))
    flat = data.tobytes()

    def found(feeds: int) -> list[list[bytes]]:
        first, starts, ends = lines_of(data, offsets, feeds)
        spans = [flat[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return [spans[begin:end] for begin, end in zip(first.tolist(), first.tolist()[1:], strict=False)]

    assert found(1) == [[line.encode() for line in text.split("\n") if line] for text in texts]
    assert found(2) == [
        [b"a\nbb", b"ccc\n"],
        [b"\n"],
        [],
        [b"\n"],
        [b"one"],
        [b"p q", b"r", b"s"],
        [b"\nt\n"],
        [b"u"],
    ]
    assert [part.tolist() for part in lines_of(np.zeros(0, np.uint8), np.zeros(1, np.int64))] == [[0], [], []]


def test_both_implementations_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(4)
    alphabet = ["a", "b", "the", "é", " ", " ", "\n", "\n\n", ". ", "漢字", "x" * 300, "_9", "\0"]
    texts = ["".join(source.choices(alphabet, k=source.choice((0, 1, 3, 40, 900)))) for _ in range(120)]
    column = pa.array(texts, pa.large_string())
    records = make_records(texts, language=[source.choice(["en", None, "ja"]) for _ in texts])
    results = []
    for module in (native.corpus_text(), None):
        monkeypatch.setattr(native, "_module", module)
        monkeypatch.setattr("megaforge.data.corpus.features._last", None)
        data, offsets = flat_bytes(column)
        words = plain_words(column)
        first, starts, ends = lines_of(data, offsets, 2)
        counts = [array for n in (1, 2, 5) for array in count_runs(words, n)]
        signed = [signatures(words, n) for n in (1, 5)]
        lines = [first, starts, ends, repeated(hash_spans(data, starts, ends), first, ends - starts)]
        arrays = [words.first, words.row, words.start, words.end, words.hash, *counts, *signed, *lines]
        results.append([*arrays, *vars(features_of(records)).values()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    assert results[0][11].shape == ((plain_words(column).counts > 0).sum(), BINS)


def test_features_of_some_of_a_batch_are_those_of_these_records_alone() -> None:
    stop_word_masks()
    texts = [f"the cat number {row} sat on the mat.\n" * (row % 4 + 1) for row in range(40)]
    records = make_records(texts, language="en")
    features_of(records)
    some = records.filter(pa.array([row % 3 == 0 for row in range(40)]))
    changed = replaced(some, text=[text.upper() + " 1" for text in some["text"].to_pylist()])
    others = make_records(texts[:5], language="de", id=range(5))
    for batch in (some, changed, others, records.slice(0, 0)):
        kept = features_of(batch)
        features_of(make_records(["something else"], id=[99]))
        alone = features_of(batch)
        for name, values in vars(kept).items():
            np.testing.assert_array_equal(values, getattr(alone, name), err_msg=name)
        features_of(records)


def test_features_are_those_of_one_text_at_a_time() -> None:
    texts = [*TEXTS, "Same line here.\nother one\nSame line here.\nSame line here.\n", "the cat sat on the mat. " * 9]
    found = features_of(make_records(texts, language="en"))
    stop = set(STOP_WORDS["en"].split())
    for row, text in enumerate(texts):
        words = [one.decode() for one in split(re.sub("[\u2000-\u206f\u3000-\u303f]+", " ", text.lower()))]
        visible = max(len(re.sub(r"[ \t\n\r\f\v]", "", text)), 1)
        assert found.words[row] == len(words)
        assert found.digits[row] == pytest.approx(len(re.findall("[0-9]", text)) / visible)
        assert found.symbols[row] == pytest.approx(len(re.findall(r"[#$%&*+/<=>@\[\\\]^_`{|}~]", text)) / visible)
        assert found.stop_words[row] == pytest.approx(sum(w in stop for w in words) / max(len(words), 1))
        lines = [line for line in text.split("\n") if line]
        again = sum(len(line.encode()) for at, line in enumerate(lines) if line in lines[:at])
        size = max(sum(len(line.encode()) for line in lines), 1)
        assert found.repeated_lines[row] == pytest.approx(again / size)
        pairs = Counter(zip(words, words[1:], strict=False))
        most = max(pairs.values(), default=0)
        assert found.top_pair[row] == pytest.approx((2 * most if most > 1 else 0) / max(len(words), 1))
        runs = [tuple(words[at : at + 5]) for at in range(len(words) - 4)]
        assert found.repeated_runs[row] == pytest.approx((len(runs) - len(set(runs))) / max(len(runs), 1))
        assert found.vocabulary[row] == pytest.approx(len(set(words)) / max(len(words) ** 0.5, 1))


def test_what_is_told_by_words() -> None:
    found = features_of(
        make_records(
            ["日本語の文章です" * 9] * 3 + ["x = 1"], language=["ja", None, "de", None], kind=["text"] * 3 + [CODE]
        )
    )
    assert found.prose.tolist() == [False, False, True, False]
    assert found.has_stop_words.tolist() == [False, False, True, False]


def test_members_of_a_set_are_found() -> None:
    source = np.random.default_rng(1)
    for size in (0, 1, 5, 5000):
        members = np.unique(source.integers(0, 1 << 64, size, np.uint64))
        asked = np.concatenate([source.integers(0, 1 << 64, 300, np.uint64), members[::3], members[:1]])
        known = set(members.tolist())
        found, member = HashSet(members).find(asked)
        assert found.tolist() == [at for at, one in enumerate(asked.tolist()) if one in known]
        assert (members[member] == asked[found]).all()
