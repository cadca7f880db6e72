"""Steps that an update rule needs to reach AdamW's final validation loss, on the quickstart's data and model.

    python tests/bench/bench_muon_steps.py [--data runs/quickstart] [--rule muon] [--batch 8] [--steps 450]

Both train cdrmix-tiny in bf16 on batches of ``--batch`` x 256 tokens, at each learning rate of ``--lrs`` for
``--sweep-steps``, the schedule (warm-up over a fifteenth, cosine to a fiftieth) fitted to them; the sweep of a rule
goes on by factors of two until its best rate is none of the ends. AdamW then trains for ``--steps`` at its
``--tries`` best rates, the best end counts; the rule trains at its best rate for ``--share`` of the steps. All are
judged by the same windows of held-out documents. Everything is kept in ``--output``: run again, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.harness import print_json, print_table
from tests.bench.speedrun_session import Run, Text, train_in_turns

ROOT = Path(__file__).resolve().parents[2]


def wider(found: dict[float, float]) -> float | None:
    """The rate to try next, beyond the end that is the best so far; None where the best is between others."""
    lrs = sorted(found)
    best = min(lrs, key=lambda lr: found[lr])
    if best in (lrs[0], lrs[-1]):
        return best / 2 if best == lrs[0] else best * 2
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "runs/quickstart", help="the quickstart's folder")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/muon_steps", help="curves and states of all runs")
    parser.add_argument("--rule", default="muon", help="of --optimizer")
    parser.add_argument("--lrs", nargs="+", type=float, default=[2e-3, 4e-3, 8e-3], help="of the sweep, for both")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step, a multiple of 8")
    parser.add_argument("--sweep-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=450, help="of AdamW")
    parser.add_argument("--share", type=float, default=0.75, help="of these steps that the rule trains for")
    parser.add_argument("--tries", type=int, default=2, help="of AdamW's rates, for the whole length")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1], help="none: the sweep only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text, lrs = Text.open(options.data), sorted(options.lrs)
    rules = {"adam": options.steps, options.rule: int(options.share * options.steps)}

    def run(rule: str, lr: float, seed: int, steps: int) -> Run:
        batch = () if options.batch == 8 else ("--global-batch-size", str(options.batch))
        # The rules' own defaults, not the preset's.
        muon = ("--muon-num-ns-steps", "5", "--muon-momentum", "0.95") if "muon" in rule else ()
        return Run("ours", lr, seed, steps, True, (*batch, *muon, "--optimizer", rule))

    found: dict[str, dict[float, float]] = {rule: {} for rule in rules}
    wanted = [(rule, lr) for lr in lrs for rule in rules]
    while wanted:
        sweep = {run(rule, lr, 0, options.sweep_steps): (rule, lr) for rule, lr in wanted}
        for one, curve in train_in_turns(list(sweep), text, options.output, evaluations=1).items():
            rule, lr = sweep[one]
            found[rule][lr] = curve[-1][2]
        wanted = [(rule, lr) for rule, of_rule in found.items() if (lr := wider(of_rule)) is not None]
    lrs = sorted({lr for of_rule in found.values() for lr in of_rule})
    rows: list[list[object]] = [
        [rule, *(f"{of_rule[lr]:.4f}" if lr in of_rule else "" for lr in lrs)] for rule, of_rule in found.items()
    ]
    title = f"held-out bits per byte after {options.sweep_steps} steps, by learning rate"
    print_table(title, ["rule", *(f"{lr:g}" for lr in lrs)], rows)
    best = {rule: sorted(of_rule, key=lambda lr: of_rule[lr]) for rule, of_rule in found.items()}
    tried = {rule: best[rule][: options.tries if rule == "adam" else 1] for rule in rules}
    runs = [run(rule, lr, seed, rules[rule]) for seed in options.seeds for rule in rules for lr in tried[rule]]
    if not runs:
        return
    ends = {run: curve[-1][2] for run, curve in train_in_turns(runs, text, options.output, evaluations=6).items()}
    rows, shares = [], []
    for seed in options.seeds:
        adam = min(ends[run("adam", lr, seed, options.steps)] for lr in tried["adam"])
        own = ends[run(options.rule, best[options.rule][0], seed, rules[options.rule])]
        shares.append(own / adam)
        for one, bits in ends.items():
            if one.seed == seed:
                rows.append([seed, one.flags[-1], f"{one.lr:g}", one.steps, f"{bits:.4f}"])
    print_table("held-out bits per byte at the end", ["seed", "rule", "lr", "steps", "bits per byte"], rows)
    print(f"{options.rule} at {options.share:g} of AdamW's steps: {statistics.median(shares):.4f} of its bits per byte")
    case = {"ratio": round(statistics.median(shares), 4), "min": round(min(shares), 4), "max": round(max(shares), 4)}
    print_json("muon_steps", {options.rule: {**case, "peer": "AdamW's bits per byte"}})


if __name__ == "__main__":
    main()
