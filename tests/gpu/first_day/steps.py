"""The steps of the first half hour: what is run, for how long, and what is expected of an H100.

Times that memory bandwidth bounds are 1.4 times shorter on an H200. The expectations were worked out by reading the
kernels, before any had run on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.gpu.first_day.runner import Figure, Step, pattern

ITERATIONS = 10
VOCAB = 50_272
EXTENSIONS = (
    "import megaforge.kernels.wkv7.native as n, megaforge.kernels.moe_routing.native as m; "
    "import torch, megaforge.kernels.newton_schulz.cuda as s, megaforge.kernels.bitgemm.cuda as b; "
    "print('wkv7:', *sorted(n.COMPILED - {'meta'})); print('moe:', *sorted(m.COMPILED - {'meta'})); "
    "print('newton-schulz:', *sorted({'cuda'} & s.COMPILED), *['wgmma'] * s.has_wgmma(torch.device('cuda', 0))); "
    "print('bitgemm:', *sorted({'cuda'} & b.COMPILED), *['wgmma'] * b.has_wgmma(torch.device('cuda', 0)))"
)
VERSIONS = (
    "import importlib.metadata as m, torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda);"
    "print('NCCL', '.'.join(map(str, torch.cuda.nccl.version())), 'cuDNN', torch.backends.cudnn.version());"
    "[print(p, m.version(p)) for p in ('triton', 'fla-core') if p in {d.name for d in m.distributions()}]"
)
# (b x s x H, milliseconds forward, forward and backward)
WKV = (
    ("8 x 4096 x 64", 3.5, 12.0),
    ("8 x 4096 x 32", 1.8, 6.0),
    ("1 x 4096 x 32", 0.8, 3.0),
    ("1 x 16384 x 64", 3, 11),
)
# (b x s x H or rows x columns, what, milliseconds forward and backward): what is read and written, at 2.8 TB/s
POINTWISE = (
    ("8 x 4096 x 32", "shift and 6 mixes", 0.8),
    ("8 x 4096 x 32", "shift and 1 mix", 0.25),
    ("8 x 4096 x 32", "inputs of WKV-7", 0.9),
    ("8 x 4096 x 32", "mixed values", 0.55),
    ("8 x 4096 x 32", "norm, bonus, gate", 0.9),
    ("8 x 4096 x 32", "RMS norm", 0.25),
    ("8 x 4096 x 32", "squared ReLU", 1.0),
    ("8 x 4096 x 32", "SwiGLU", 1.5),
    ("8 x 4096 x 32", "weighted SwiGLU", 1.5),
    ("8 x 4096 x 32", "rotation", 0.2),
    ("8192 x 65536", "cross-entropy", 1.2),
)
# (b x m x n, milliseconds of five steps with wgmma), at 450 TFLOP/s
NEWTON_SCHULZ = (("1 x 4096 x 4096", 3.0), ("1 x 8192 x 8192", 24.0), ("8 x 2048 x 2048", 3.0))
# (tokens x rows x columns, what, form, milliseconds of 16 layers): at 2.5 TB/s, at 500 TOP/s
PACKED = (
    ("1 x 4096 x 14336", "16 ternary", "gemv", 0.15),
    ("1 x 4096 x 14336", "16 binary", "gemv", 0.1),
    ("8 x 4096 x 14336", "16 ternary", "stream", 0.2),
    ("128 x 4096 x 4096", "16 ternary", "wgmma", 0.4),
    ("2048 x 4096 x 14336", "16 ternary", "wgmma", 8.0),
)


def steps(python: str, folder: Path) -> list[Step]:
    """The table; ``folder`` takes data and metrics."""
    here = "tests/gpu/first_day"
    return [
        Step("versions", [python, "-c", VERSIONS], 60, [_version("torch"), _version("triton"), _version("NCCL")]),
        Step(
            "compiled operators",
            [python, "-c", EXTENSIONS],
            60,
            [
                Figure("WKV-7", "cpu cuda", pattern(r"^wkv7: (.*)$"), equal="cpu cuda"),
                Figure("expert routing", "cpu cuda", pattern(r"^moe: (.*)$"), equal="cpu cuda"),
                Figure("Newton-Schulz", "cuda wgmma", pattern(r"^newton-schulz: (.*)$"), equal="cuda wgmma"),
                Figure("packed products", "cuda wgmma", pattern(r"^bitgemm: (.*)$"), equal="cuda wgmma"),
            ],
        ),
        _tests(python, "tests on the GPU", 300, "tests/gpu", "-k", "not 4096"),
        *_sanitizers(python),
        _kernels(python),
        _attention(python, f"{here}/attention.py"),
        Step("data", [python, f"{here}/data.py", str(folder / "text")], 60),
        *_training(python, folder),
        Step(
            "waits of the host",
            [python, f"{here}/observe.py", "waits", *_flags(folder)],
            120,
            [
                Figure(
                    "waits in a step of 4 micro-batches and 8 MoE layers",
                    "at most 4 x (2 + 8) + 10",
                    pattern(r"^waits: (\d+)"),
                    high=50,
                )
            ],
            shows=True,
        ),
        Step(
            "where a step's time goes",
            [python, f"{here}/observe.py", "kernels", *_flags(folder)],
            150,
            [
                Figure("elementwise kernels, % of GPU time", "above 40: fuse them next", _figure("elementwise")),
                Figure("matrix products, % of GPU time", "the rest of it, mostly", _figure("products")),
            ],
            shows=True,
        ),
        Step(
            "one RWKV-7 layer, 8 x 4096 x 4096, bf16",
            [python, f"{here}/layer.py"],
            120,
            [
                Figure("matrix products, ms", "65", _figure("products"), high=90),
                Figure("elementwise, ms", "33: inputs 23, norms 10", _figure("elementwise"), high=50),
                Figure("WKV-7, ms", "12", _figure("wkv"), high=16),
                Figure("peak memory, GB", "no expectation", _figure("peak")),
            ],
            shows=True,
        ),
        _tests(python, "tests of long sequences", 420, "tests/gpu", "-k", "4096"),
    ]


def _figure(name: str) -> Callable[[str], str | None]:
    """As the scripts of this folder print it."""
    return pattern(rf"^figure {name} = (\S+)$")


def _version(name: str) -> Figure:
    return Figure(name, "see README.md", pattern(rf"^.*\b{name} (\S+)"))


def _tests(python: str, name: str, limit: float, *arguments: str) -> Step:
    return Step(
        name,
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        limit,
        [
            Figure("passed", "all but the skipped", pattern(r"(\d+) passed"), low=1),
            Figure("last line", "no failure", pattern(r"^(\d+ (?:passed|failed|skipped).*)$")),
        ],
    )


def _sanitizers(python: str) -> list[Step]:
    tool = ["compute-sanitizer", "--tool"]
    races = [*tool, "racecheck", python, "-m", "pytest", "-q", "tests/gpu/test_wkv7.py", "-k", "resets and 40"]
    reads = [*tool, "memcheck", python, "-m", "pytest", "-q", "tests/gpu/test_moe_routing.py", "-k", "rows or permut"]
    tiles = [*tool, "racecheck", python, "-m", "pytest", "-q", "tests/gpu/test_newton_schulz.py", "-k", "one_step"]
    bits = [*tool, "racecheck", python, "-m", "pytest", "-q", "tests/gpu/test_bitgemm.py", "-k", "extremes"]
    hazards = pattern(r"RACECHECK SUMMARY: (\d+) hazard")
    errors = pattern(r"ERROR SUMMARY: (\d+) error")
    return [
        Step("races in WKV-7", races, 150, [Figure("hazards", "0", hazards, high=0)], "compute-sanitizer"),
        Step("races in Newton-Schulz", tiles, 150, [Figure("hazards", "0", hazards, high=0)], "compute-sanitizer"),
        Step("races in packed products", bits, 150, [Figure("hazards", "0", hazards, high=0)], "compute-sanitizer"),
        Step("reads and writes of routing", reads, 150, [Figure("errors", "0", errors, high=0)], "compute-sanitizer"),
    ]


def _kernels(python: str) -> Step:
    figures = [
        Figure("copies, GB/s", "2600 to 3000", pattern(r"copies (\d+) GB/s"), low=2500),
        Figure("TF32 products, TFLOP/s", "350 to 420", pattern(r"TF32 (\d+) TFLOP/s"), low=300),
    ]
    for shape, forward, both in WKV:
        for what, expected in (("fwd", forward), ("fwd+bwd", both)):
            row = pattern(rf"^{shape}\s+WKV-7 {what.replace('+', chr(92) + '+')}\s+native\s+([\d.e+-]+)")
            figures.append(Figure(f"WKV-7 {shape} {what}, ms", str(expected), row, high=1.3 * expected))
    for shape, what, expected in POINTWISE:
        row = pattern(rf"^{shape}\s+{what}\s+triton\s+([\d.e+-]+)")
        figures.append(Figure(f"{what}, {shape} fwd+bwd, ms", str(expected), row, high=2 * expected))
    for shape, expected in NEWTON_SCHULZ:
        row = pattern(rf"^{shape}\s+Newton-Schulz\s+wgmma\s+([\d.e+-]+)")
        figures.append(Figure(f"Newton-Schulz {shape}, ms", str(expected), row, high=1.5 * expected))
    for shape, what, form, expected in PACKED:
        row = pattern(rf"^{shape}\s+{what}\s+{form}\s+([\d.e+-]+)")
        figures.append(Figure(f"packed, {shape}, {what}, {form}, ms", str(expected), row, high=1.5 * expected))
    return Step("kernels", [python, "tests/bench/bench_gpu_kernels.py", "--rounds", "5"], 360, figures, shows=True)


def _attention(python: str, script: str) -> Step:
    figures = []
    for deterministic in ("deterministic", "free"):
        for form, expected in (("causal", "0.3"), ("documents", "at most causal"), ("mask", "5 deterministic, else 1")):
            for groups in (16, 4):
                name = f"{form}-{groups}-{deterministic}"
                figures.append(Figure(f"{form}, {groups} groups, {deterministic}, ms", expected, _figure(name)))
    return Step("attention, 1 x 2048, 16 heads of 128, both ways", [python, script], 90, figures, shows=True)


def _flags(folder: Path) -> list[str]:
    return [
        *("--config", "cdrmix-core-1b", "--num-layers", "8", "--micro-batch-size", "4", "--global-batch-size", "16"),
        *("--train-iters", str(ITERATIONS), "--tokenizer-type", "NullTokenizer", "--tokenizer-model", str(VOCAB)),
        *("--data-path", str(folder / "text"), "--bf16", "--device", "cuda", "--log-interval", "1"),
    ]


def _training(python: str, folder: Path) -> list[Step]:
    variants = {
        "base": [],
        "again": [],
        "free": ["--no-deterministic"],
        "recompute": ["--recompute", "full"],
        "offload": ["--cpu-offload-activations"],
    }
    names = {
        "base": "training, 8 blocks of cdrmix-core-1b",
        "again": "the same run again",
        "free": "training without deterministic algorithms",
        "recompute": "training with --recompute full",
        "offload": "training with --cpu-offload-activations",
    }
    steps = []
    for variant, flags in variants.items():
        metrics = folder / f"{variant}.jsonl"
        figures = [
            Figure("loss at first", "10.8", _metric(metrics, "loss", 0), low=10.3, high=11.3),
            Figure("loss at last", "lower", _metric(metrics, "loss", -1), high=10.8),
            Figure("tokens a second", "no expectation", _metric(metrics, "tokens_per_second", -1)),
        ]
        if variant in ("again", "recompute", "offload"):
            same = _same(folder / "base.jsonl", metrics)
            exact = "yes" if variant == "again" else None
            expected = "yes" if exact else "yes, or to rounding"
            figures.append(Figure("losses equal to the first run's bits", expected, same, equal=exact))
        command = [python, "pretrain_cdrmix.py", *_flags(folder), "--metrics-file", str(metrics), *flags]
        steps.append(Step(names[variant], command, 120, figures))
    return steps


def _records(path: Path) -> list[dict[str, float]]:
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [record for record in records if record.get("kind") == "step"]


def _metric(path: Path, key: str, index: int) -> Callable[[str], str | None]:
    def read(output: str) -> str | None:
        values = [record[key] for record in _records(path) if record.get(key) is not None]
        return f"{values[index]:.6g}" if values else None

    return read


def _same(first: Path, second: Path) -> Callable[[str], str | None]:
    def read(output: str) -> str | None:
        ours, theirs = ([(r.get("loss"), r.get("grad_norm")) for r in _records(path)] for path in (first, second))
        if len(ours) != ITERATIONS or len(theirs) != ITERATIONS:
            return None
        apart = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True) if a[0] and b[0])
        return "yes" if ours == theirs else f"no, {apart:.2g} apart"

    return read
