"""The code blocks of the documents, and a copy of the repository to run them in as a new user does."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaforge.errors import UserError
from tests.end_to_end.launch import REPO

# A block that a test runs as it is printed stands below this line; the others are only understood.
MARK = "<!-- a test runs this -->"
LIMIT = 900  # seconds of a block: only one that hangs is to be ended


def bash_blocks(document: str) -> list[tuple[str, bool]]:
    """(code, whether it is run) of every ``bash`` block of a document."""
    text = (REPO / document).read_text(encoding="utf-8")
    pattern = re.compile(rf"({re.escape(MARK)}\n)?```bash\n(.*?)```", re.DOTALL)
    return [(found[2], found[1] is not None) for found in pattern.finditer(text)]


def inline_commands(document: str) -> list[str]:
    """The commands that stand in a document's sentences and tables."""
    return re.findall(r"`(python (?:tools/|pretrain_)[^`]*)`", (REPO / document).read_text(encoding="utf-8"))


def commands(block: str) -> list[str]:
    """The commands of a block, continued lines joined, comments removed."""
    joined = re.sub(r"\\\n\s*", "", block)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def fresh_copy(folder: Path) -> Path:
    """The files of the repository as a clone would have them, with the code compiled and an environment in .venv."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPO, capture_output=True, check=True
    )
    compiled = [str(path.relative_to(REPO)) for path in (REPO / "megaforge").rglob("*.so")]
    for name in [*filter(None, listed.stdout.decode().split("\0")), *compiled]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPO / name).exists():
            shutil.copy2(REPO / name, target)
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n', encoding="utf-8")
    return folder


def bash(code: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Starts ``code`` in ``folder`` as a session of its own, without this process's launcher variables and paths."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(code: str, folder: Path) -> str:
    """What the block prints; it must succeed."""
    process = bash(code, folder)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, f"{code}\n{out}"
    return out


def run_blocks(document: str) -> list[str]:
    """The blocks of a document that are run, in the user's environment."""
    return [f"source .venv/bin/activate\n{code}" for code, runs in bash_blocks(document) if runs]


class _Understood(BaseException):
    """The parser took every word."""


def understand(command: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Lets the script of a Python or torchrun command parse its words and go no further.

    Returns:
        The script, or None for other programs.

    Raises:
        AssertionError: a word that the script does not take.
    """
    words = shlex.split(command)
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None or words[0] not in ("python", "torchrun"):
        return None
    original = argparse.ArgumentParser.parse_known_args
    left: list[str] = []

    def parse(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        try:
            known, rest = original(parser, args, namespace)
        except UserError:
            left.append("")  # it reads flag by flag now, to tell all that is wrong
            raise
        if not rest and (not left or left[-1] in (args or ())):
            raise _Understood
        left.extend(rest[:1])  # for a second parser, or its error
        return known, rest

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", [script, *words[words.index(script) + 1 :]])
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except _Understood:
            return script
        except SystemExit as end:
            raise AssertionError(f"{command} ends with {end.code} over its arguments") from end
    raise AssertionError(f"{command} never reads its arguments")
