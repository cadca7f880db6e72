"""The command: ``python -m tests.chaos --faults 60 --seed 1``; status 1 when anything is wrong."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megaforge.errors import UserError
from megaforge.resilience.faults import KINDS, draw, kinds_named
from tests.chaos import __doc__ as description
from tests.chaos.chaos import Outcome, chaos
from tests.chaos.job import LAYOUTS
from tests.chaos.network import Network
from tests.chaos.report import report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="run_scripts/chaos.sh", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=60, help="how many (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (default: 1)")
    parser.add_argument("--ranks", type=int, default=8, choices=LAYOUTS, help="8 (the default): tp 2, pp 2, dp 2")
    parser.add_argument("--minutes", type=float, default=None, help="no launch after these; what is missing is told")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds of --distributed-timeout-minutes")
    parser.add_argument("--restarts", type=int, default=3, help="of each launch, by torchrun (default: 3)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help=f"of these alone: {', '.join(map(repr, KINDS))}")
    parser.add_argument("--output", type=Path, help="folder that keeps everything (default: a temporary one)")
    parser.add_argument("--report", type=Path, help="write the report there, as Markdown")
    flags = parser.parse_args()
    if flags.faults < 1:
        parser.error(f"--faults {flags.faults}: give at least 1")
    try:
        kinds = kinds_named(flags.kinds or list(KINDS))
        draw(flags.seed, flags.faults, ranks=flags.ranks, first=1, stride=1, kinds=kinds)
    except (UserError, ValueError) as error:
        parser.error(str(error))
    with contextlib.ExitStack() as stack:
        network, left_out = None, [kind for kind in kinds if flags.ranks == 1 and KINDS[kind].in_memory]
        if "network cut" in kinds:
            try:
                if flags.ranks == 1:
                    raise OSError("one rank has no network")
                network = Network()
                stack.callback(network.remove)
            except OSError as error:
                left_out.append("network cut")
                print(f"network cut: left out, as {error}", flush=True)
        kinds = [kind for kind in kinds if kind not in left_out]
        home = flags.output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos_")))
        own_disk = stack.enter_context(small_disk(home / "disturbed" / "checkpoints", flags.faults))
        outcome = chaos(
            home,
            count=flags.faults,
            seed=flags.seed,
            ranks=flags.ranks,
            kinds=kinds,
            timeout=flags.timeout,
            restarts=flags.restarts,
            minutes=flags.minutes,
            own_disk=own_disk,
            network=network,
        )
        return told(outcome, flags.report)


def told(outcome: Outcome, path: Path | None) -> int:
    text = report(outcome)
    print(text)
    if path is not None:
        path.write_text(text, encoding="utf-8")
    return int(bool(outcome.findings))


DAMAGED = 6  # MB of a checkpoint


@contextlib.contextmanager
def small_disk(folder: Path, faults: int) -> Iterator[bool]:
    """A file system of its own at ``folder``, of 64 MB and what that many faults may leave there, each a damaged
    checkpoint that is set aside; False where this user may not make one."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"error: {folder} is not empty; name another --output")
    made = os.geteuid() == 0 and _mount("-t", "tmpfs", "-o", f"size={64 + DAMAGED * faults}m", "tmpfs", str(folder))
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def _mount(*words: str) -> bool:
    try:
        return subprocess.run(["mount", *words], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
