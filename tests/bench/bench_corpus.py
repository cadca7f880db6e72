"""tools/prepare_corpus.py, the whole chain from JSON Lines to datasets: text per CPU-second, memory, and signatures
against ``datasketch``.

The text is that of bench_preprocess. The command is charged everything: start-up, reading, every stage, tokenising, the
report. Memory is the largest process at one size of the input and at ten times as much. The peer computes MinHash
signatures of 128 values of the same runs of five words, given to it as bytes.

    python tests/bench/bench_corpus.py [--megabytes 16] [--rounds 3]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_preprocess import MEASURE, REPOSITORY, build_corpus, texts_of

from megaforge.data.corpus.records import make_records
from megaforge.data.corpus.stage import Scope
from megaforge.data.corpus.stages.minhash import MinhashSettings
from megaforge.data.train_tokenizer import TokenizerSettings, train_tokenizer
from tests.bench.harness import Ratio, interleaved_ratio, print_json, print_table

CHAIN = """
sources: [{name: text, files: [%s]}]
stages: [normalise, length, pii, quality, exact, minhash]
shard: {tokenizer_model: tok.json}
"""
PEER_MEGABYTES = 2


def run_chain(folder: Path, corpus: Path) -> tuple[float, float]:
    """(CPU-seconds of the whole process tree, MiB of its largest process)."""
    recipe, output = folder / "corpus.yaml", folder / "corpus"
    recipe.write_text(CHAIN % corpus.name)
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


def signature_ratio(corpus: Path, rounds: int) -> Ratio | None:
    """Signatures a CPU-second against datasketch's; None where that is not installed."""
    try:
        from datasketch import MinHash
    except ImportError:
        return None
    texts, size = [], 0
    for text in texts_of(corpus):
        texts.append(text)
        size += len(text.encode())
        if size > PEER_MEGABYTES * 10**6:
            break
    records, stage = make_records(texts), MinhashSettings().open(Scope(Path(".")))

    def ours() -> float:
        start = time.process_time()
        stage.sketch(records)
        return size / 1e6 / (time.process_time() - start)

    def theirs() -> float:
        start = time.process_time()
        for text in texts:
            words = text.lower().split()
            runs = {" ".join(words[at : at + 5]).encode() for at in range(max(1, len(words) - 4))}
            MinHash(num_perm=128).update_batch(runs)
        return size / 1e6 / (time.process_time() - start)

    return interleaved_ratio(ours, theirs, rounds)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, _ = build_corpus(folder, flags.megabytes)
        large, _ = build_corpus(folder, 10 * flags.megabytes)
        train_tokenizer(TokenizerSettings((str(small),), str(folder / "tok.json"), 8192))
        size = megabytes_of(small)
        runs = sorted(run_chain(folder, small) for _ in range(flags.rounds))
        cpu, peak = run_chain(folder, large)
        rates = [size / seconds for seconds, _ in runs]
        memory = max(mib for _, mib in runs)
        large_rate = megabytes_of(large) / cpu
        rows: list[list[object]] = [
            ["whole chain, MB a CPU-second", sorted(rates)[len(rates) // 2], f"{min(rates):.3g} to {max(rates):.3g}"],
            ["the same on ten times as much", large_rate, ""],
            ["largest process, MiB", memory, ""],
            ["the same on ten times as much", peak, ""],
        ]
        cases: dict[str, dict[str, object]] = {
            "chain": {"mb_per_cpu_second": sorted(rates)[len(rates) // 2], "at_ten_times": large_rate},
            "memory": {"mib": memory, "at_ten_times": peak},
        }
        found = signature_ratio(small, flags.rounds)
        if found is None:
            print("left out: datasketch is not installed (pip install datasketch)")
        else:
            rows.append(["signatures over datasketch's", found.median, f"{found.min:.3g} to {found.max:.3g}"])
            cases["signatures"] = found.case("datasketch MinHash.update_batch, 128 values")
        print_table("prepare_corpus", ["", "", "spread"], rows)
        print_json("corpus", cases)


if __name__ == "__main__":
    main()
