"""A tokenizer of tasks in chunks: a word is a token."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from megaforge.data.outputs import atomic_output
from megaforge.data.train_tokenizer import END_OF_TEXT
from megaforge.errors import UserError
from megaforge.registry import CHUNKED_TASKS
from megaforge.tasks.chunked import words_of

_UNKNOWN = "<unk>"


def make_task_tokenizer(tasks: Sequence[str], output: str, force: bool = False) -> int:
    """Writes a ``tokenizer.json`` of all words of the tasks; the same file for the same tasks in any order.

    Args:
        tasks: names; none: all that there are.

    Returns:
        How many tokens it has.

    Raises:
        UserError: no task has such a name, ``output`` cannot be a tokenizer's name, or something else stands
            there and ``force`` is False.
    """
    if not output.endswith(".json"):
        raise UserError(f"--output {output}: a tokenizer of words is kept in a file that ends in .json")
    found = [word for name in sorted(tasks or CHUNKED_TASKS.names()) for word in words_of(name)]
    vocabulary = [END_OF_TEXT, _UNKNOWN, *dict.fromkeys(found)]
    added = [
        {"id": number, "content": name, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
        | {"single_word": False}
        for number, name in enumerate((END_OF_TEXT, _UNKNOWN))
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(vocabulary)},
            "unk_token": _UNKNOWN,
        },
    }
    with atomic_output(output, force) as file:
        file.write(json.dumps(definition, indent=1).encode() + b"\n")
    print(f"{output}: {len(vocabulary):,} tokens, each a word", file=sys.stderr)
    return len(vocabulary)
