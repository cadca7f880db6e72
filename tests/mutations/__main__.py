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
from tests.mutations.table import MUTATIONS, ROOT, Mutation

_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", "runs", "*.egg-info")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = sorted({row.file for row in MUTATIONS})
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"default: all: {', '.join(files)}")
    asked = parser.parse_args().files
    if unknown := set(asked) - set(files):
        parser.error(f"no rows of {', '.join(sorted(unknown))}; there are those of {', '.join(files)}")
    rows = [row for row in MUTATIONS if not asked or row.file in asked]
    with tempfile.TemporaryDirectory() as folder:
        tree = shutil.copytree(ROOT, Path(folder) / "tree", ignore=_LEFT_OUT)
        unseen = sum(not _seen(row, tree) for row in rows)
    print(f"{len(rows)} pieces of code taken out, {unseen} of them unseen")
    return int(unseen > 0)


def _seen(row: Mutation, tree: Path) -> bool:
    """Whether the row's test fails without the code, and says so."""
    path, started = tree / "megaforge" / row.file, time.monotonic()
    whole = path.read_text(encoding="utf-8")
    if whole.count(row.code) != 1:
        raise SystemExit(f"{row}: it stands there {whole.count(row.code)} times; mend the table")
    path.write_text(whole.replace(row.code, row.instead), encoding="utf-8")
    try:
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", row.test]
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(whole, encoding="utf-8")
    red = next((line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    what = red if run.returncode == 1 and red else f"UNSEEN by {row.test} (status {run.returncode})"
    print(f"{row.file}: {' '.join(row.code.split())}\n    {what} [{time.monotonic() - started:.0f} s]", flush=True)
    return run.returncode == 1 and red.startswith("FAILED")


if __name__ == "__main__":
    raise SystemExit(main())
