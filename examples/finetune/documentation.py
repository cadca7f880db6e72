"""Questions and answers from Python's own documentation strings: what does this function do?"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SHORTEST, _LONGEST = 20, 160
_HELD_OUT = 10  # one answer of so many


def questions(root: Path | None = None) -> Iterator[dict[str, str]]:
    """``{"prompt", "response"}`` of every function with a documentation string below ``root`` (Python's library): the
    signature, and the first sentence of the string. No answer comes twice."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    known: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts or "tests" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            answer = _first_sentence(ast.get_docstring(node))
            if answer is not None and answer not in known:
                known.add(answer)
                name = ".".join(file.relative_to(root).with_suffix("").parts)
                given = f"def {node.name}({ast.unparse(node.args)}):  # {name}\n"
                yield {"prompt": f'{given}    """', "response": f'{answer}"""'}


def _first_sentence(text: str | None) -> str | None:
    if text is None:
        return None
    sentence = " ".join(text.split("\n\n")[0].split())
    end = sentence.find(". ")
    sentence = sentence if end < 0 else sentence[: end + 1]
    return sentence if _SHORTEST <= len(sentence) <= _LONGEST and sentence.isascii() else None


def held_out(answer: str) -> bool:
    """Whether an answer is for judging: the same ones on every machine."""
    return int(hashlib.sha256(answer.encode()).hexdigest(), 16) % _HELD_OUT == 0


def write(folder: Path, most: int | None = None) -> tuple[int, int]:
    """Writes ``train.jsonl`` and ``valid.jsonl``; how many each has. ``most``: of both together."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[bool, list[str]] = {False: [], True: []}
    for number, row in enumerate(questions()):
        if most is not None and number == most:
            break
        rows[held_out(row["response"])].append(json.dumps(row) + "\n")
    for judged, name in ((False, "train.jsonl"), (True, "valid.jsonl")):
        (folder / name).write_text("".join(rows[judged]), encoding="utf-8")
    return len(rows[False]), len(rows[True])
