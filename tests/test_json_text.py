from __future__ import annotations

import pytest

from megaforge.json_text import parse_json


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, b"\xff{}", '{"a": ' * 100_000])
def test_what_is_not_json_is_a_value_error(content: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(content)


def test_text_and_bytes_are_read_alike() -> None:
    assert parse_json('{"a": "\u00e9"}') == parse_json('{"a": "\u00e9"}'.encode()) == {"a": "\u00e9"}
