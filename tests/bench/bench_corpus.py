"""tools/prepare_corpus.py, the whole chain from JSON Lines to datasets: text per CPU-second and memory; its stages and
signatures against those of ``datatrove`` and ``datasketch``.

The text is that of bench_preprocess. The command is charged everything: start-up, reading, every stage, tokenising, the
report. Memory is the largest process at one size of the input and at ten times as much. corpus_peers.py says what the
others do.

    python tests/bench/bench_corpus.py [--megabytes 16] [--rounds 3]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench_preprocess import MEASURE, REPOSITORY, build_corpus, texts_of

from megaforge.data.train_tokenizer import TokenizerSettings, train_tokenizer
from tests.bench import corpus_peers
from tests.bench.harness import Ratio, interleaved_ratio, print_json, print_table

CHAIN = """
sources: [{name: text, files: [%s]}]
stages: [%s]
shard: {tokenizer_model: tok.json}
"""
STAGES = ["normalise", "length", "heuristics", "quality", "pii", "exact", "minhash", "paragraphs"]


def run_chain(folder: Path, corpus: Path, stages: list[str]) -> tuple[float, float]:
    """(CPU-seconds of the whole process tree, MiB of its largest process)."""
    recipe, output = folder / "corpus.yaml", folder / "corpus"
    recipe.write_text(CHAIN % (corpus.name, ", ".join(stages)))
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, str(REPOSITORY / "tools" / "prepare_corpus.py"), "--config", str(recipe)]
    between = [sys.executable, "-S", "-c", MEASURE, *command, "--output", str(output)]
    result = subprocess.run(between, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    cpu, peak_kib = map(float, result.stdout.split())
    return cpu, peak_kib / 1024


def megabytes_of(corpus: Path) -> float:
    """Of its texts."""
    return sum(len(text.encode()) for text in texts_of(corpus)) / 1e6


def texts_for_peers(corpus: Path, megabytes: float) -> list[str]:
    """Texts of up to 100,000 bytes: one that is longer would be most of so little."""
    texts, size = [], 0
    for text in texts_of(corpus):
        length = len(text.encode())
        if length <= 100_000:
            texts.append(text)
            size += length
        if size > megabytes * 1e6:
            break
    return texts


def peers(corpus: Path, rounds: int) -> Iterator[tuple[str, Ratio | str]]:
    """What is compared, and the ratio or why there is none."""
    for name, megabytes, ours, theirs in (
        ("stages over datatrove's", 0.5, corpus_peers.our_stages, corpus_peers.datatrove_stages),
        ("signatures over datatrove's", 0.5, corpus_peers.our_signatures, corpus_peers.datatrove_signatures),
        ("signatures over datasketch's", 2, corpus_peers.our_signatures, corpus_peers.datasketch_signatures),
    ):
        texts = texts_for_peers(corpus, megabytes)
        try:
            yield name, interleaved_ratio(ours(texts), theirs(texts), rounds)
        except ImportError as error:
            yield name, f"left out: {error} (pip install -c constraints.txt 'megaforge[bench]')"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    rows: list[list[object]] = []
    cases: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, _ = build_corpus(folder, flags.megabytes)
        large, _ = build_corpus(folder, 10 * flags.megabytes)
        train_tokenizer(TokenizerSettings((str(small),), str(folder / "tok.json"), 8192))
        for what, stages in (("chain", STAGES), ("chain with language", ["language", *STAGES])):
            size, large_size = megabytes_of(small), megabytes_of(large)
            runs = sorted(run_chain(folder, small, stages) for _ in range(flags.rounds))
            cpu, peak = run_chain(folder, large, stages)
            rates, memory = sorted(size / seconds for seconds, _ in runs), max(mib for _, mib in runs)
            middle = rates[len(rates) // 2]
            # What a run of nothing would take is the same in both.
            added = (large_size - size) / (cpu - size / middle)
            rows += [
                [f"{what}, MB a CPU-second", middle, f"{rates[0]:.3g} to {rates[-1]:.3g}"],
                [f"{what}, on ten times as much", large_size / cpu, ""],
                [f"{what}, the nine times that were added", added, ""],
                [f"{what}, largest process, MiB", memory, ""],
                [f"{what}, the same on ten times as much", peak, ""],
            ]
            cases[what] = {"mb_per_cpu_second": middle, "at_ten_times": large_size / cpu, "added": added}
            cases[what] |= {"mib": memory, "mib_at_ten_times": peak}
        for what, found in peers(small, flags.rounds):
            if isinstance(found, str):
                print(f"{what}: {found}")
                continue
            rows.append([what, found.median, f"{found.min:.3g} to {found.max:.3g}"])
            cases[what] = found.case(what)
    print_table("prepare_corpus", ["", "", "spread"], rows)
    print_json("corpus", cases)


if __name__ == "__main__":
    main()
