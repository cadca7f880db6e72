"""The command: ``python -m tests.mutations [FILE ...]``."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations import __doc__ as description
from tests.mutations.checks import sampled
from tests.mutations.table import MUTATIONS, ROOT, Mutation

_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", "runs", "*.egg-info")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = sorted({row.file for row in MUTATIONS})
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"default: all: {', '.join(files)}")
    parser.add_argument("--checks", type=int, metavar="N", help="in place of the table: N checks, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw [0]")
    flags = parser.parse_args()
    if flags.checks is not None and (flags.files or flags.checks < 1):
        parser.error(f"--checks {flags.checks}: give a number of at least 1, and no FILE")
    if unknown := set(flags.files) - set(files):
        parser.error(f"no rows of {', '.join(sorted(unknown))}; there are those of {', '.join(files)}")
    rows: list[tuple[int | None, Mutation]]
    if flags.checks is None:
        rows = [(None, row) for row in MUTATIONS if not flags.files or row.file in flags.files]
    else:
        rows = list(sampled(flags.checks, flags.seed))
    with tempfile.TemporaryDirectory() as folder:
        tree = shutil.copytree(ROOT, Path(folder) / "tree", ignore=_LEFT_OUT)
        unseen = sum(not _seen(row, tree, line) for line, row in rows)
    print(f"{len(rows)} pieces of code taken out, {unseen} of them unseen")
    return int(unseen > (0 if flags.checks is None else len(rows) // 2))


def _seen(row: Mutation, tree: Path, line: int | None = None) -> bool:
    """Whether the row's test fails without the code, and says so; ``line``: of the code, where it may stand often."""
    path, started = tree / "megaforge" / row.file, time.monotonic()
    whole = path.read_text(encoding="utf-8")
    if line is None and whole.count(row.code) != 1:
        raise SystemExit(f"{row}: it stands there {whole.count(row.code)} times; mend the table")
    path.write_text(taken_out(whole, row, line or 1), encoding="utf-8")
    try:
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", row.test]
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(whole, encoding="utf-8")
    red = next((line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    what = red if run.returncode == 1 and red else f"UNSEEN by {row.test} (status {run.returncode})"
    where = row.file if line is None else f"{row.file}:{line}"
    print(f"{where}: {' '.join(row.code.split())}\n    {what} [{time.monotonic() - started:.0f} s]", flush=True)
    return run.returncode == 1 and red.startswith("FAILED")


def taken_out(whole: str, row: Mutation, line: int) -> str:
    """``whole`` with what stands in place of the code, which is at ``line`` or the first one below it."""
    before = sum(map(len, whole.splitlines(keepends=True)[: line - 1]))
    return whole[:before] + whole[before:].replace(row.code, row.instead, 1)


if __name__ == "__main__":
    raise SystemExit(main())
