"""The token stream of one source against a list of lists."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaforge.data import sample_order
from megaforge.data.sample_order import TokenStream, key_of, shuffled, splitmix64


@pytest.fixture(autouse=True, scope="module", params=["native", "numpy"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test reads through the C++ helper, and again through NumPy."""
    if request.param == "native":
        assert sample_order.has_native_copy(), "the extension megaforge.data._data_helpers is not built"
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_order, "_native", None)
        yield


def test_splitmix64_gives_its_published_sequence() -> None:
    """The first outputs for seed 1234567, as published with the reference implementation's ports."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, np.arange(5, dtype=np.uint64)).tolist() == expected


def test_orders_never_change_between_versions() -> None:
    """Golden values: a run resumed after an upgrade must find its past where it was."""
    assert key_of(1, 7, "a" * 64, 1, 0) == 10507428377583045566
    assert shuffled(42, np.arange(12)).tolist() == [4, 1, 10, 6, 2, 8, 3, 11, 9, 0, 7, 5]


def test_shuffle_is_uniform_enough() -> None:
    """Each of 8 documents comes first in about 1/8 of 4,000 epochs (standard deviation 21)."""
    firsts = [int(shuffled(key_of("seed", epoch), np.arange(8))[0]) for epoch in range(4000)]
    assert all(400 < firsts.count(document) < 600 for document in range(8))


def make_stream(documents: list[list[int]], first: int = 0, seed: int = 1) -> TokenStream:
    tokens = np.array([token for document in documents for token in document], np.uint16)
    lengths = np.array([len(document) for document in documents], np.int64)
    starts = np.cumsum(lengths) - lengths
    return TokenStream(tokens, starts, lengths, first + np.arange(len(lengths)), [seed, "content", 1])


def oracle(documents: list[list[int]], seed: int, stop: int, first: int = 0) -> tuple[list[int], list[bool]]:
    """The stream's first tokens and document starts, document by document in plain Python."""
    tokens: list[int] = []
    marks: list[bool] = []
    epoch = 0
    while len(tokens) < stop:
        key = key_of(sample_order.ORDER_VERSION, seed, "content", 1, epoch)
        hashes = {i: int(splitmix64(key, np.array([first + i], np.uint64))[0]) for i in range(len(documents))}
        for number in sorted(hashes, key=hashes.__getitem__):
            tokens += documents[number]
            marks += [True, *[False] * (len(documents[number]) - 1)] if documents[number] else []
        epoch += 1
    return tokens[:stop], marks[:stop]


def window(stream: TokenStream, cursor: int, length: int) -> tuple[list[int], list[bool]]:
    out, marks = np.full(length, -1, np.int64), np.zeros(length, np.bool_)
    stream.copy(cursor, out, marks)
    return out.tolist(), marks.tolist()


documents_strategy = st.lists(st.lists(st.integers(0, 65535), max_size=7), min_size=1, max_size=70).filter(any)


@settings(max_examples=120, deadline=None)
@given(
    documents_strategy,
    st.integers(0, 5),
    st.integers(1, 150),
    st.lists(st.integers(0, 300), max_size=6),
    st.integers(0, 9),
)
def test_windows_are_cut_from_the_shuffled_documents(
    documents: list[list[int]], seed: int, length: int, cursors: list[int], first: int
) -> None:
    """Empty documents, one-token corpora, windows over many documents and several epochs, in any order of access."""
    stream = make_stream(documents, first, seed=seed)
    tokens, marks = oracle(documents, seed, 460, first)
    for cursor in [*cursors, 0]:
        assert window(stream, cursor, length) == (tokens[cursor : cursor + length], marks[cursor : cursor + length])


def test_loop_and_gather_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[i] * (1 + i % 3) for i in range(400)]
    by_gather = [window(make_stream(documents), cursor, 500) for cursor in range(0, 900, 37)]
    monkeypatch.setattr(sample_order, "_LOOP_DOCUMENTS", 10**6)
    assert [window(make_stream(documents), cursor, 500) for cursor in range(0, 900, 37)] == by_gather


def test_an_epoch_reads_every_token_once_and_orders_differ() -> None:
    documents = [[i] for i in range(50)]
    stream = make_stream(documents)
    epochs = [window(stream, 50 * epoch, 50)[0] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert window(make_stream(documents, seed=2), 0, 50)[0] != epochs[0]


def test_few_epochs_are_held() -> None:
    stream = make_stream([[1], [2]])
    window(stream, 0, 40)
    assert len(stream._orders) == sample_order._EPOCHS_HELD
