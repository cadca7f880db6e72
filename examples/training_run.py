"""A training run of an example, made once."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from megaforge.errors import UserError

REPO = Path(__file__).resolve().parents[1]


def train_once(line: list[str], metrics: Path) -> None:
    """Runs ``python LINE --metrics-file METRICS`` in the repository, unless it has been.

    Prints the command as it starts. What is unfinished is done again from the beginning.

    Args:
        line: a script of the repository and its flags.
        metrics: an absolute path; beside it the line is kept as ``.done`` once the run has ended well.
    Raises:
        UserError: another line was run there, or the run did not end well.
    """
    done, command = metrics.with_suffix(".done"), shlex.join(line)
    if done.exists():
        if done.read_text() != command:
            raise UserError(
                f"--output {metrics.parent}: {metrics.stem} was trained there by another command: {done.read_text()}; "
                f"choose another folder, or delete {done} to train it anew"
            )
        return
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.unlink(missing_ok=True)
    line = [*line, "--metrics-file", str(metrics)]
    print(shlex.join(["python", *line]), flush=True)
    if subprocess.run([sys.executable, *line], cwd=REPO, env=os.environ).returncode:
        raise UserError(f"{metrics.stem} did not end well; its command is printed above")
    done.write_text(command)
