"""Trains the recipes and compares their curves; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from megaforge.durable import replacing
from tests.convergence.recipes import BAND, CURVES, RECIPES, curve, departures, flags_of, write_text
from tests.end_to_end.launch import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--update", action="store_true", help="keep these curves")
    flags = parser.parse_args()
    if unknown := set(flags.recipes) - RECIPES.keys():
        parser.error(f"{min(unknown)}: no such recipe; there are {', '.join(RECIPES)}")
    kept = json.loads(CURVES.read_text("utf-8")) if CURVES.exists() else {}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_text(Path(folder) / "text")
        for name in flags.recipes or RECIPES:
            metrics = Path(folder) / f"{name}.jsonl"
            done = run(1, "pretrain_cdrmix.py", *flags_of(name, prefix, metrics))
            if done.status:
                print(f"{name}: ended with {done.status}\n{done.err}")
                wrong += 1
                continue
            found = curve(metrics.read_text("utf-8").splitlines())
            off = [] if flags.update else departures(found, kept.get(name, []))
            shown = " ".join(f"{value:.3f}" for value in found)
            print(f"{name:<20} {shown}  {'; '.join(off) or 'as kept'}", flush=True)
            wrong += bool(off)
            if flags.update:
                kept[name] = [round(value, 5) for value in found]
    if flags.update and not wrong:
        with replacing(CURVES) as part:
            part.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    print(f"{wrong} recipes are outside of {BAND:.0%} around their curves" if wrong else "all within their bands")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
