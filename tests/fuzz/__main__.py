"""The command: ``python -m tests.fuzz [READER ...] [--minutes M] [--seed S]``; status 1 when anything was found."""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads must not fork

from tests.fuzz import __doc__ as description
from tests.fuzz.fuzz import CORPUS, fuzz
from tests.fuzz.readers import READERS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readers", nargs="*", help=f"default: all: {', '.join(READERS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each reader (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument("--keep", action="store_true", help="write what was found to tests/fuzz/corpus")
    flags = parser.parse_args()
    if unknown := set(flags.readers) - READERS.keys():
        parser.error(f"no such reader: {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    bad = 0
    for name in flags.readers or READERS:
        done, findings = fuzz(name, flags.seed, seconds=60 * flags.minutes)
        print(f"{name}: {done:,} inputs, {len(findings)} findings", flush=True)
        for finding in findings:
            print(f"  {finding.name}: {finding.what}", flush=True)
            if flags.keep:
                (CORPUS / finding.name).write_bytes(finding.content)
        bad += len(findings)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
