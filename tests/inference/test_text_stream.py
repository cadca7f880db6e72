"""Text while it is drawn: whole characters, stop strings wherever tokens cut them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megaforge.inference.text_stream import TextStream


class Bytes:
    """A tokenizer of UTF-8 bytes; 256 is a control token."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def shown(text: str | bytes, stops: Sequence[str] = (), prompt: bytes = b"go") -> tuple[list[str], TextStream]:
    stream = TextStream(Bytes(), list(prompt), stops)  # type: ignore[arg-type]
    pieces = []
    for byte in text.encode() if isinstance(text, str) else text:
        pieces.append(stream.add(byte))
        if stream.stopped is not None:
            break
    return [*pieces, stream.close()], stream


def test_characters_appear_whole() -> None:
    pieces, stream = shown("aé→b")
    assert pieces == ["a", "", "é", "", "", "→", "b", ""]
    assert stream.text == "aé→b"


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    pieces, _ = shown(b"a\xe2\x86")
    assert pieces[:3] == ["a", "", ""] and "\ufffd" in pieces[3]
    assert "".join(shown(b"\xe2a\xffb")[0]) == "\ufffda\ufffdb"


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("one END two", ["END"], "one ", "END"),
        ("one EN", ["END"], "one EN", None),
        ("EEND", ["END"], "E", "END"),
        ("END", ["END"], "", "END"),
        ("aXbY", ["Y", "X"], "a", "X"),
        ("abc", ["bc", "abc"], "", "abc"),
        ("é→", ["→"], "é", "→"),
        ("plain", [], "plain", None),
    ],
)
def test_stop_strings(text: str, stops: list[str], expected: str, stopped: str | None) -> None:
    pieces, stream = shown(text, stops)
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == stopped


def test_what_may_become_a_stop_string_waits() -> None:
    assert shown("aENxEND", ["END"])[0] == ["a", "", "", "ENx", "", "", "", ""]


def test_the_prompt_is_not_searched() -> None:
    pieces, stream = shown("Dx", ["END"], prompt=b"the EN")
    assert "".join(pieces) == "Dx" and stream.stopped is None


def test_tokens_without_text_show_nothing() -> None:
    stream = TextStream(Bytes(), [256], [])  # type: ignore[arg-type]
    assert [stream.add(256), stream.add(97), stream.close()] == ["", "a", ""]
