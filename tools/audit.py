#!/usr/bin/env python3
"""The audit trail of a run (--audit-trail), in its --save directory.

    python tools/audit.py verify runs/mine [--public-key HEX]
    python tools/audit.py show runs/mine [--kind save] [--json]
    python tools/audit.py set-aside runs/mine --reason "the disk was full"
    python tools/audit.py public-key

verify checks the chain, its signatures, and that the run's checkpoints and the trail fit each other; it names the
first line that is not what was written, and ends with status 1 then. show prints the records. set-aside renames a trail
that is broken or lost and begins another, which says why. public-key prints that of the key in
MEGAFORGE_AUDIT_KEY_FILE (make one with: (umask 077; openssl rand -hex 32 >FILE)).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser
from megaforge.config.entry import run_entry
from megaforge.errors import UserError


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("verify", "show", "set-aside", "public-key"), metavar="COMMAND")
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's --save directory")
    parser.add_argument("--public-key", metavar="HEX", help="verify: whose signatures they must be")
    parser.add_argument("--kind", help="show: records of this kind alone")
    parser.add_argument("--json", action="store_true", help="show: the lines as they stand")
    parser.add_argument("--reason", help="set-aside: why, for the new trail's record")
    return parser


def verify(run: Path, public_key: str | None) -> int:
    """Prints whether the trail holds."""
    from megaforge.monitor.audit import AUDIT_FILE, BrokenTrailError, read_trail

    try:
        trail = read_trail(run / AUDIT_FILE, public_key)
    except BrokenTrailError as error:
        print(f"BROKEN: {error}")
        return 1
    from megaforge.checkpoint.anchors import check_checkpoints, replaced

    problems = check_checkpoints(run, trail)
    for problem in problems:
        print(f"BROKEN: {problem}")
    if problems:
        return 1
    print(f"{len(trail.records)} records of trail {trail.name} hold, the last of {_when(trail.records[-1]['time'])}")
    if not trail.keys:
        print("no record is signed: whoever can write the file and the checkpoints can write both anew")
    for key in trail.keys:
        print(
            f"{trail.signed} of them are signed by {key}" + (" (is it yours? --public-key)" if not public_key else "")
        )
    for name in sorted(replaced(trail)):
        print(f"an earlier trail, {name}, was set aside")
    if trail.torn:
        print(f"the last line is not whole and no record: {len(trail.torn)} bytes that a kill cut short")
    return 0


def show(run: Path, kind: str | None, as_json: bool) -> None:
    """Prints the records."""
    from megaforge.monitor.audit import AUDIT_FILE, read_trail

    for record in read_trail(run / AUDIT_FILE).records:
        if kind not in (None, record["kind"]):
            continue
        if as_json:
            print(json.dumps(record, sort_keys=True))
            continue
        own = ("number", "time", "kind", "previous", "hash", "config", "data")
        fields = ", ".join(f"{name} {value}" for name, value in record.items() if name not in own)
        print(f"{record['number']:6} {_when(record['time'])} {record['kind']}: {fields}")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def set_aside(run: Path, reason: str | None) -> None:
    """Begins another trail."""
    from megaforge.checkpoint.anchors import trails_of
    from megaforge.monitor import audit

    if not reason:
        raise UserError("set-aside: --reason TEXT says why; it goes on record")
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; name what a run was given as --save")
    moved = audit.set_aside(run / audit.AUDIT_FILE, reason, sorted(trails_of(run)))
    print(f"the trail is {moved} now, and another begins" if moved else "there was none; one begins")


def main() -> int:
    flags = make_parser().parse_args()
    if flags.command == "public-key":
        from megaforge.checkpoint.encryption import read_secret
        from megaforge.monitor.audit import Signer
        from megaforge.training.auditing import KEY_FILE_VARIABLE, KEY_VARIABLE

        secret = read_secret(KEY_VARIABLE, KEY_FILE_VARIABLE)
        assert secret is not None
        print(Signer(secret).public)
        return 0
    if flags.run is None:
        raise UserError(f"{flags.command}: RUN is missing: a run's --save directory")
    run = Path(flags.run)
    if flags.command == "verify":
        return verify(run, flags.public_key)
    if flags.command == "show":
        show(run, flags.kind, flags.json)
    else:
        set_aside(run, flags.reason)
    return 0


if __name__ == "__main__":
    run_entry(main)
