#!/usr/bin/env python3
"""Writes JSON Lines of text as JSON Lines of token ids, by the vocabulary of the published RWKV models.

    python examples/cdrmix/world_ids.py --vocabulary rwkv_vocab_v20230424.txt --input text.jsonl --output ids.jsonl

A text becomes the longest tokens from left to right; id 0 ends it.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys


def read_vocabulary(file: str) -> dict[bytes, int]:
    """Ids by token; a line is an id, a Python literal of text or bytes, and its length in bytes."""
    tokens: dict[bytes, int] = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                index, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else bytes(token)
                if len(token) != int(length):
                    raise ValueError(f"{len(token)} bytes, not {length.strip()}")
                tokens[token] = int(index)
            except (ValueError, SyntaxError, TypeError) as error:
                sys.exit(f"error: --vocabulary {file}: line {number} is not an id, a token and its length ({error})")
    return tokens


def encode(text: bytes, tokens: dict[bytes, int], longest: int) -> list[int]:
    """Ids of ``text``, the longest token first."""
    ids, place = [], 0
    while place < len(text):
        size = next((n for n in range(longest, 0, -1) if text[place : place + n] in tokens), 0)
        if not size:
            sys.exit(f"error: the vocabulary has no token for the byte {text[place : place + 1]!r}")
        ids.append(tokens[text[place : place + size]])
        place += size
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", required=True, metavar="FILE", help="beside the published weights")
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON Lines with the text under 'text'")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON Lines for tools/preprocess_data.py")
    flags = parser.parse_args()
    tokens = read_vocabulary(flags.vocabulary)
    longest = max(map(len, tokens))
    with open(flags.input, encoding="utf-8") as lines, open(flags.output, "w", encoding="utf-8") as out:
        for line in lines:
            ids = [*encode(json.loads(line)["text"].encode(), tokens, longest), 0]
            out.write(json.dumps({"text": " ".join(map(str, ids))}) + "\n")


if __name__ == "__main__":
    main()
