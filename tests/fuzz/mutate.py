"""Mutations: of bytes, of the numbers in a text, of the tree of a JSON document."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from megaforge.json_text import parse_json

_NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**64 - 1)
_TEXTS = (
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"10000000000000000000000",
    b"0.5",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"\x00",
)
_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 0.5, 2**31, 2**63, 2**64, 10**30, 1e308, -1e-308, "", "0", "nan", "..", "/", "a" * 300),
    *([], {}, [[]], [None], [1, 2, 3], {"": None}, {"a": {"b": []}}, "\x00", "\ud800", float("nan"), float("inf")),
)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """``content`` with one to four mutations; one in two of a JSON text is of its tree."""
    if content[:1] in (b"{", b"[") and chance.random() < 0.5:
        return _json_text(content, chance)
    for _ in range(chance.randint(1, 4)):
        content = chance.choice(_OF_BYTES)(content, chance)
    return content


def _json_text(content: bytes, chance: random.Random) -> bytes:
    """Of one document, or of one line of many."""
    lines = content.split(b"\n")
    whole = content
    place = None
    try:
        tree = parse_json(content)
    except ValueError:
        place = chance.randrange(len(lines))
        try:
            tree = parse_json(lines[place])
        except ValueError:
            return chance.choice(_OF_BYTES)(content, chance)
    for _ in range(chance.randint(1, 3)):
        tree = mutated_tree(tree, chance)
    try:
        whole = json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return content
    return whole if place is None else b"\n".join([*lines[:place], whole, *lines[place + 1 :]])


def mutated_tree(tree: Any, chance: random.Random) -> Any:
    """``tree`` with one value replaced, removed, doubled or renamed somewhere."""
    if isinstance(tree, dict) and tree and chance.random() < 0.9:
        name = chance.choice(list(tree))
        action = chance.random()
        if action < 0.15:
            return {key: value for key, value in tree.items() if key != name}
        if action < 0.25:
            return tree | {chance.choice((f"{name}x", "", "..")): tree[name]}
        return tree | {name: mutated_tree(tree[name], chance)}
    if isinstance(tree, list) and tree and chance.random() < 0.9:
        place = chance.randrange(len(tree))
        action = chance.random()
        if action < 0.15:
            return [*tree[:place], *tree[place + 1 :]]
        if action < 0.3:
            return [*tree, tree[place]]
        return [*tree[:place], mutated_tree(tree[place], chance), *tree[place + 1 :]]
    if isinstance(tree, int) and chance.random() < 0.5:
        return chance.choice((tree + 1, tree - 1, -tree, tree * 2, tree * 2**40, float(tree), str(tree)))
    return chance.choice(_VALUES)


def _span(content: bytes, chance: random.Random) -> tuple[int, int]:
    begin = chance.randrange(len(content) + 1)
    return begin, min(len(content), begin + chance.choice((1, 2, 4, 8, 16, 64, 256)))


def _flip(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b"\x01"
    changed = bytearray(content)
    place = _place(content, chance)
    changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _place(content: bytes, chance: random.Random) -> int:
    """Heads are short, and tell more than what follows."""
    return chance.randrange(len(content) if chance.random() < 0.5 else min(len(content), 256))


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _longer(content: bytes, chance: random.Random) -> bytes:
    return content + bytes(chance.choice((1, 7, 8, 64, 4096)))


def _remove(content: bytes, chance: random.Random) -> bytes:
    begin, end = _span(content, chance)
    return content[:begin] + content[end:]


def _double(content: bytes, chance: random.Random) -> bytes:
    begin, end = _span(content, chance)
    return content[:end] + content[begin:end] * chance.choice((1, 2, 50)) + content[end:]


def _number(content: bytes, chance: random.Random) -> bytes:
    form = chance.choice("BHIQ")
    size = struct.calcsize(f"<{form}")
    raw = struct.pack(f"<{form}", chance.choice(_NUMBERS) & (256**size - 1))
    place = _place(content, chance) if content else 0
    return content[:place] + raw + content[place + size :]


def _digits(content: bytes, chance: random.Random) -> bytes:
    """One number or word in a text becomes another."""
    digits = [place for place, byte in enumerate(content[:65536]) if chr(byte).isdigit()]
    if not digits:
        return _flip(content, chance)
    begin = chance.choice(digits)
    end = begin
    while end < len(content) and chr(content[end]).isdigit():
        end += 1
    return content[:begin] + chance.choice(_TEXTS) + content[end:]


def _noise(content: bytes, chance: random.Random) -> bytes:
    begin, end = _span(content, chance)
    return content[:begin] + chance.randbytes(end - begin) + content[end:]


def _deep(content: bytes, chance: random.Random) -> bytes:
    begin, _ = _span(content, chance)
    return content[:begin] + chance.choice((b"[", b'{"a":')) * chance.choice((2000, 100_000)) + content[begin:]


_OF_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _cut, _longer, _remove, _double, _number, _number, _digits, _digits, _noise),
    _deep,
)
