"""A training sample through ``TrainingData.sample(k)`` against a flat slice of the same number of bytes.

The slice is the floor: the bytes of 4,097 adjacent tokens of the mapped file, widened to an int64 tensor. A sample also
finds its source, epoch and documents, joins the documents' pieces and marks where each begins. Goal: at most 5 times
the slice's time for documents of a web page's length or longer; the case of 60-token documents, some 70 scattered
reads a window, shows what the shortest cost. Both sides read every window of the file once, in one scattered order.

    python tests/bench/bench_sample_read.py [--rounds 15] [--samples 4000]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megaforge.data.samples import SampleSchedule, TrainingData
from tests.bench.harness import interleaved_ratio, print_json, print_table, seconds

LENGTH = 4096


def write_corpus(prefix: str, windows: int, mean_document: int) -> None:
    """About ``windows`` windows of random ids in documents of exponentially distributed lengths, as uint16."""
    rng = np.random.default_rng(0)
    total = windows * LENGTH + 1
    lengths = 1 + rng.exponential(mean_document, 1 + 2 * total // mean_document).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), total)) + 1]
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_documents(rng.integers(0, 32000, int(lengths.sum()), dtype=np.uint16), lengths)


def over_all(read: Callable[[int], object], order: list[int]) -> Callable[[], object]:
    """One pass: ``read`` for every number of ``order``."""

    def run() -> None:
        for number in order:
            read(number)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured pairs of passes a case")
    parser.add_argument("--samples", type=int, default=4000, help="4,096-token windows in the file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    order = np.random.default_rng(1).permutation(arguments.samples).tolist()
    rows: list[list[object]] = []
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mean_document, sources in (
            ("documents of 1,400 tokens", 1400, 1),
            ("two sources of 1,400", 1400, 2),
            ("documents of 100,000", 100_000, 1),
            ("documents of 60", 60, 1),
        ):
            prefix = f"{folder}/{mean_document}"
            if not Path(f"{prefix}.idx").exists():
                write_corpus(prefix, arguments.samples, mean_document)
            data = TrainingData(
                [(1.0, prefix)] * sources, "1", SampleSchedule(seed=1, sequence_length=LENGTH, lanes=32)
            )
            tokens = IndexedDataset(prefix).tokens

            def flat(number: int, tokens: np.ndarray = tokens) -> torch.Tensor:
                start = number * LENGTH
                return torch.from_numpy(tokens[start : start + LENGTH + 1].astype(np.int64))

            ratio = interleaved_ratio(
                seconds(over_all(data.sample, order)), seconds(over_all(flat, order)), arguments.rounds
            )
            cases[name] = ratio.case("flat slice of as many bytes to an int64 tensor")
            scale = 1e6 / len(order)
            rows.append([name, ratio.candidate * scale, ratio.peer * scale, ratio.median, ratio.min, ratio.max])
    print_table(
        f"sample(k) of {LENGTH} tokens against a flat slice; goal: ratio <= 5",
        ["case", "sample us", "slice us", "ratio", "min", "max"],
        rows,
    )
    print_json("sample_read", cases)


if __name__ == "__main__":
    main()
