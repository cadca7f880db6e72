"""tools/preprocess_data.py, the whole command, against ``tokenizers.encode_batch`` alone: text per CPU-second.

The text is this machine's own: Python's library with its tests, and the documentation and manual pages under
/usr/share. The command is charged everything (start-up, JSON, hashing, writing, joining); the peer only its encoding
calls, on text already in memory, one thread each. The peer and the fallback take a fixed share of the documents, spread
over the corpus, because the whole would take them minutes; rates are per MB of text, so nothing is scaled further.

    python tests/bench/bench_preprocess.py [--megabytes 256] [--rounds 3]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megaforge.data.train_tokenizer import TokenizerSettings, train_tokenizer  # noqa: E402
from tests.bench.harness import interleaved_ratio, print_json, print_table  # noqa: E402

SUFFIXES = (".py", ".txt", ".md", ".rst", ".html", ".h", "copyright", *(f".{n}" for n in range(1, 9)))
SUBSET_MEGABYTES = 16
CHUNK_CHARACTERS = 1 << 20
VOCABULARY = 32000
MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(status)
"""


def local_texts() -> Iterator[str]:
    """Texts of this machine in an order that mixes their kinds: by the hash of their path."""
    roots = [sysconfig.get_path("stdlib"), "/usr/share/doc", "/usr/share/man", "/usr/lib/python3", "/usr/share/perl"]
    paths = []
    for root in [*roots, sysconfig.get_path("purelib")]:
        for directory, _, names in os.walk(root):
            paths += [os.path.join(directory, n) for n in names if n.removesuffix(".gz").endswith(SUFFIXES)]
    for path in sorted(set(paths), key=lambda path: hashlib.sha256(path.encode()).digest()):
        try:
            data = Path(path).read_bytes() if not os.path.islink(path) else b""
            text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        if text.strip():
            yield text


def build_corpus(directory: Path, megabytes: int) -> tuple[Path, Path]:
    """The corpus and its subset as JSONL. Where the machine has too little text, it follows again by lines reversed."""
    whole, subset = directory / f"corpus-{megabytes}.jsonl", directory / f"subset-{megabytes}.jsonl"
    if whole.exists() and subset.exists():
        return whole, subset
    limit, size, taken = megabytes * 10**6, 0, 0
    with whole.open("wb") as file, subset.open("wb") as part:
        for reverse in (False, True):
            for text in local_texts():
                if size >= limit:
                    break
                text = "\n".join(reversed(text.split("\n"))) if reverse else text
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                size += len(text.encode())
                if taken * megabytes < size * SUBSET_MEGABYTES:
                    part.write(line)
                    taken += len(text.encode())
    return whole, subset


def texts_of(path: Path) -> list[str]:
    """The texts of a JSONL file."""
    with path.open("rb") as file:
        return [json.loads(line)["text"] for line in file]


class Tool:
    """Runs the command on a corpus; remembers its peak memory."""

    def __init__(self, corpus: Path, tokenizer: Path, output: Path, *flags: str) -> None:
        self.megabytes = sum(len(text.encode()) for text in texts_of(corpus)) / 1e6
        self.output, self.resident_mb = output, 0.0
        self._command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input", str(corpus)]
        self._command += ["--output-prefix", str(output), "--tokenizer-model", str(tokenizer), "--append-eod"]
        self._command += ["--force", *flags]

    def __call__(self) -> float:
        """MB of text per CPU-second of the whole process tree."""
        # A child inherits its parent's peak memory, so a small process stands between: it waits, and reports.
        between = [sys.executable, "-S", "-c", MEASURE, *self._command]
        result = subprocess.run(between, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        cpu, peak_kib = map(float, result.stdout.split())
        self.resident_mb = max(self.resident_mb, peak_kib / 1024)
        return self.megabytes / cpu

    def digest(self) -> str:
        """SHA-256 over the files it wrote."""
        digest = hashlib.sha256()
        for kind in ("bin", "idx"):
            digest.update(Path(f"{self.output}_text_document.{kind}").read_bytes())
        return digest.hexdigest()


class EncodeBatch:
    """The peer: ``tokenizers.encode_batch`` on the subset's texts."""

    def __init__(self, subset: Path, tokenizer: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer))
        self._batches: list[list[str]] = [[]]
        for text in texts_of(subset):
            if sum(map(len, self._batches[-1])) > CHUNK_CHARACTERS:
                self._batches.append([])
            self._batches[-1].append(text)
        self._megabytes = sum(len(text.encode()) for batch in self._batches for text in batch) / 1e6

    def __call__(self) -> float:
        """MB of text per CPU-second of the encoding calls."""
        start = time.process_time()
        for batch in self._batches:
            self._tokenizer.encode_batch(batch, add_special_tokens=False)
        return self._megabytes / (time.process_time() - start)


def main() -> None:
    """Measures both cases and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the corpus (256)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (3)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "megaforge-bench-preprocess")
    flags = parser.parse_args()
    flags.cache.mkdir(exist_ok=True)
    whole, subset = build_corpus(flags.cache, flags.megabytes)
    tokenizer = flags.cache / f"bpe-{flags.megabytes}.json"
    if not tokenizer.exists():
        train_tokenizer(TokenizerSettings((str(subset),), str(tokenizer), VOCABULARY))
    fast = Tool(whole, tokenizer, flags.cache / "fast")
    fast_subset = Tool(subset, tokenizer, flags.cache / "fast-subset")
    fallback = Tool(subset, tokenizer, flags.cache / "fallback", "--no-fast")
    peer = EncodeBatch(subset, tokenizer)
    cases = {}
    rows: list[list[object]] = []
    fast_subset()
    for name, tool in (("fast", fast), ("fallback", fallback)):
        ratio = interleaved_ratio(tool, peer, flags.rounds)
        identical = fallback.digest() == fast_subset.digest() if name == "fallback" else None
        extra = {"resident_mb": round(tool.resident_mb, 1), "megabytes": round(tool.megabytes, 1)}
        cases[name] = ratio.case("tokenizers.encode_batch alone, one thread", **extra)
        rows.append([name, ratio.candidate, ratio.peer, ratio.median, ratio.min, ratio.max, tool.resident_mb])
        if identical is not None:
            cases[name]["identical_to_fast"] = identical
    header = ["case", "MB/CPU-s", "encode_batch MB/CPU-s", "ratio", "min", "max", "resident MB"]
    print_table(
        f"preprocess_data.py, {fast.megabytes:.0f} MB of text (fallback: {fallback.megabytes:.0f})", header, rows
    )
    if not cases["fallback"]["identical_to_fast"]:
        raise SystemExit("the fast path and the fallback wrote different files")
    print_json("preprocess", cases)


if __name__ == "__main__":
    main()
