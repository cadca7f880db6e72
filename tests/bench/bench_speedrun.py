"""CPU-seconds to a given number of bits per byte on held-out documents of the quickstart's text: ours and others.

Arms, each with about 3.5M parameters, the tokenizer of 2,048 entries, 8 x 256 tokens a step, one thread:
    ours      cdrmix-tiny as the preset is (NorMuon), but for the rates; ``--flags "--optimizer adam"`` makes it AdamW's
    dense     our attention model with AdamW: 6 blocks, squared ReLU of 960; in plain torch, from our initial weights
    llama     transformers' Llama with AdamW
    speedrun  a transformer as public speedruns train it: torch.optim.Muon, QK norm, squared ReLU, token smear

The peers are compiled (not counted) and use the faster of fp32 and bf16, as ours does. First every arm trains at each
learning rate of ``--lrs``, and each factor of ``--embedding-mults`` on the embedding's, for ``--sweep-seconds``; the
best one is taken. Then it trains for its ``--seconds`` with every seed, the schedule (warm-up over a fifteenth, cosine
to a fiftieth) fitted to them. CPU time under load is inflated for everyone, so arms run turn about. Everything is kept
in ``--output``: run again, it goes on where it was.

    python tests/bench/bench_speedrun.py [--data runs/quickstart] [--seconds ours=170 llama=850] [--target 2.18]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.harness import print_json, print_table
from tests.bench.speedrun_session import ARMS, Run, Text, crossing, open_session, train_in_turns

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"ours": [170.0], "dense": [400.0], "llama": [850.0], "speedrun": [400.0]}
GOALS = {"dense": 0.5, "speedrun": 0.5, "llama": 0.2}


def make_text(folder: Path) -> None:
    """The quickstart's corpus, tokenizer and datasets."""
    tools = [
        f"directory_to_jsonl.py --python-stdlib --output {folder}/train.jsonl --holdout-fraction 0.03 "
        f"--holdout-output {folder}/heldout.jsonl",
        f"train_tokenizer.py --input {folder}/train.jsonl --vocab-size 2048 --output {folder}/tok.json",
        *(
            f"preprocess_data.py --input {folder}/{part}.jsonl --output-prefix {folder}/{part} "
            f"--tokenizer-model {folder}/tok.json --append-eod"
            for part in ("train", "heldout")
        ),
    ]
    for line in tools:
        name, *arguments = line.split()
        subprocess.run([sys.executable, str(ROOT / "tools" / name), *arguments], check=True)


def measure_steps(arms: list[str], text: Text, flags: tuple[str, ...], file: Path) -> dict[str, tuple[bool, float]]:
    """Of each arm: whether bf16 is its faster precision, and the CPU-seconds of a step; kept in ``file``."""
    known = json.loads(file.read_text()) if file.exists() else {}
    for arm in arms:
        key = " ".join([arm, *(flags if arm == "ours" else ())])
        if key not in known:
            with tempfile.TemporaryDirectory() as place:
                pair = [open_session(_run(arm, 1e-3, 0, 100, bf16, flags), text, Path(place)) for bf16 in (False, True)]
                times: list[list[float]] = [[], []]
                for _ in range(7):
                    for session, own in zip(pair, times, strict=True):
                        torch.set_float32_matmul_precision(session.precision)
                        start = time.process_time()
                        session.step()
                        own.append(time.process_time() - start)
            fp32, bf16 = (statistics.median(own[2:]) for own in times)
            known[key] = [bf16 < fp32, min(fp32, bf16)]
            print(f"  {key}: {fp32:.3f} CPU-s a step in fp32, {bf16:.3f} in bf16", flush=True)
            file.write_text(json.dumps(known))
    return {arm: tuple(known[" ".join([arm, *(flags if arm == "ours" else ())])]) for arm in arms}


def _run(arm: str, lr: float, seed: int, steps: int, bf16: bool, flags: tuple[str, ...], mult: float = 1.0) -> Run:
    return Run(arm, lr, seed, steps, bf16, flags if arm == "ours" else (), mult)


def draw(curves: dict[Run, list[list[float]]], target: float | None, image: Path) -> None:
    """Bits per byte over CPU-seconds, a colour an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    colours = dict(zip(ARMS, ("tab:red", "tab:blue", "tab:gray", "tab:green"), strict=True))
    seen = set()
    for run, curve in curves.items():
        mult = f", embedding's x{run.embedding_mult:g}" if run.embedding_mult != 1 else ""
        label = None if run.arm in seen else f"{run.arm}, lr {run.lr:g}{mult}"
        seen.add(run.arm)
        axes.plot([p[1] for p in curve[1:]], [p[2] for p in curve[1:]], ".-", color=colours[run.arm], label=label)
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("CPU-seconds of training, one thread")
    axes.set_ylabel("bits per byte, held-out documents")
    axes.set_title(f"{datetime.date.today()}, {machine()}, torch {torch.__version__}", fontsize=9)
    axes.legend()
    figure.savefig(image, dpi=120, bbox_inches="tight")


def machine() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(curves: dict[Run, list[list[float]]], target: float) -> None:
    """CPU-seconds of each arm to ``target``: the median of the seeds, each at the best of its lengths."""
    reached: dict[str, list[float]] = {}
    rows: list[list[object]] = []
    for arm in dict.fromkeys(run.arm for run in curves):
        times: dict[int, list[float | None]] = {}
        for run, curve in curves.items():
            if run.arm == arm:
                times.setdefault(run.seed, []).append(crossing(curve, target))
        best = [min((t for t in of_seed if t is not None), default=None) for of_seed in times.values()]
        final = [curve[-1][2] for run, curve in curves.items() if run.arm == arm]
        if all(t is not None for t in best):
            reached[arm] = [t for t in best if t is not None]
        shown = " ".join("not reached" if t is None else f"{t:.0f}" for t in best)
        rows.append([arm, shown, " ".join(f"{bits:.4f}" for bits in final)])
    print_table(f"CPU-seconds to {target:.4f} bits per byte", ["arm", "each seed", "bits per byte at the end"], rows)
    cases = {}
    for arm, goal in GOALS.items():
        if "ours" in reached and arm in reached:
            ours, peer = statistics.median(reached["ours"]), statistics.median(reached[arm])
            low, high = min(reached["ours"]) / max(reached[arm]), max(reached["ours"]) / min(reached[arm])
            print(f"ours / {arm}: {ours / peer:.3f} ({low:.3f} to {high:.3f}), goal {goal}")
            cases[arm] = {"ratio": round(ours / peer, 4), "min": round(low, 4), "max": round(high, 4), "peer": arm}
    print_json("speedrun", cases)


def budgets(given: list[str]) -> dict[str, list[float]]:
    """``ARM=S[,S..]`` over the defaults."""
    found = dict(SECONDS)
    for text in given:
        arm, _, seconds = text.partition("=")
        if arm not in ARMS or not seconds:
            raise SystemExit(f"--seconds {text}: write ARM=SECONDS, with an arm of {', '.join(ARMS)}")
        found[arm] = [float(part) for part in seconds.split(",")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "runs/quickstart", help="the quickstart's folder")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/speedrun", help="curves and states of all runs")
    parser.add_argument("--image", type=Path, help="where the curves are drawn (default: OUTPUT/speedrun.png)")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--lrs", nargs="+", type=float, default=[2.5e-3, 4e-3, 8e-3, 1.6e-2], help="swept for all arms")
    parser.add_argument("--embedding-mults", nargs="+", type=float, default=[1.0, 2.5], help="swept with each rate")
    parser.add_argument("--sweep-seconds", type=float, default=40.0, help="CPU-seconds of each run of the sweep")
    parser.add_argument("--seconds", nargs="+", default=[], metavar="ARM=S[,S..]", help=f"defaults: {SECONDS}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3], help="none: the sweep only")
    parser.add_argument("--target", type=float, help="bits per byte (default: where llama's seeds end, the median)")
    parser.add_argument("--flags", default="", help="further flags of our own arm, in one argument")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths, flags = budgets(options.seconds), tuple(options.flags.split())
    options.output.mkdir(parents=True, exist_ok=True)
    if not (options.data / "heldout_text_document.idx").exists():
        options.data.mkdir(parents=True, exist_ok=True)
        make_text(options.data)
    text = Text.open(options.data)
    costs = measure_steps(options.arms, text, flags, options.output / "steps.json")

    def run(arm: str, rate: tuple[float, float], seed: int, seconds: float) -> Run:
        bf16, cost = costs[arm]
        return _run(arm, rate[0], seed, max(20, round(seconds / cost)), bf16, flags, rate[1])

    rates = list(itertools.product(options.lrs, options.embedding_mults))
    sweep = [run(arm, rate, 0, options.sweep_seconds) for arm in options.arms for rate in rates]
    swept = train_in_turns(sweep, text, options.output, evaluations=2)
    found = {(run.arm, (run.lr, run.embedding_mult)): curve[-1][2] for run, curve in swept.items()}
    rows: list[list[object]] = [[arm, *(found[arm, rate] for rate in rates)] for arm in options.arms]
    title = (
        f"bits per byte after {options.sweep_seconds:g} CPU-seconds, by learning rate (and factor of the embedding's)"
    )
    print_table(title, ["arm", *(f"{lr:g}" + (f" x{mult:g}" if mult != 1 else "") for lr, mult in rates)], rows)
    best = {arm: min(rates, key=lambda rate, arm=arm: found[arm, rate]) for arm in options.arms}
    runs = [
        run(arm, best[arm], seed, seconds) for seed in options.seeds for arm in options.arms for seconds in lengths[arm]
    ]
    if not runs:
        return
    curves = train_in_turns(runs, text, options.output, evaluations=10)
    ends = [curve[-1][2] for run, curve in curves.items() if run.arm == "llama"]
    target = options.target or (statistics.median(ends) if ends else None)
    draw(curves, target, options.image or options.output / "speedrun.png")
    if target is not None:
        report(curves, target)


if __name__ == "__main__":
    main()
