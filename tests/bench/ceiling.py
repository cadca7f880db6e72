"""What the machine can do at most: multiply-adds a second on one core, and bytes copied a second.

Measured in the process and the run of a benchmark, turn about with what is compared with it, since a shared machine's
clock and memory change by the minute.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

_SOURCE = r"""
#include <cstdint>
#ifdef __AVX512F__
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
// Twelve independent chains: more than latency times units of any CPU we know. Returns the multiply-adds done.
extern "C" std::int64_t multiply_adds(std::int64_t rounds, float* out) {
  Vec x[12], scale = Vec{} + 0.999f, shift = Vec{} + 1e-3f;
  for (int i = 0; i < 12; ++i) x[i] = Vec{} + static_cast<float>(i);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) x[i] = x[i] * scale + shift;
  }
  Vec sum{};
  for (int i = 0; i < 12; ++i) sum += x[i];
  *out = sum[0];
  return rounds * 12 * kLanes;
}
"""
# With glibc's defaults every large tensor is mapped, cleared by the kernel and unmapped again at each use, which costs
# more than many an operator: memory once had is kept.
_BYTES = {"MALLOC_MMAP_THRESHOLD_": 1 << 32, "MALLOC_TRIM_THRESHOLD_": 1 << 32, "MALLOC_TOP_PAD_": 1 << 26}
_MALLOC = {name: str(count) for name, count in _BYTES.items()}


def keep_freed_memory() -> None:
    """Starts the running script anew under malloc settings that keep freed memory, unless it already is."""
    if any(os.environ.get(name) != value for name, value in _MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_MALLOC})


@functools.cache
def _loop() -> ctypes.CDLL:
    """The loop, compiled for this very CPU."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(_SOURCE)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-shared", "-fPIC"]
        if os.uname().machine != "x86_64":
            flags.remove("-mprefer-vector-width=512")
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.multiply_adds.restype = ctypes.c_int64
    loaded.multiply_adds.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_float)]
    return loaded


def multiply_adds_per_second(seconds: float = 0.05) -> float:
    """fp32 multiply-adds a CPU-second on this thread, the best of short pieces that together take ``seconds``."""
    out, best, end = ctypes.c_float(), 0.0, time.thread_time() + seconds
    while time.thread_time() < end:
        start = time.thread_time()
        done = _loop().multiply_adds(400_000, ctypes.byref(out))
        best = max(best, done / (time.thread_time() - start))
    return best


def copied_bytes_per_second(megabytes: int = 64, repeat: int = 5) -> float:
    """Bytes a CPU-second that one thread copies from one tensor of ``megabytes`` to another, the best of ``repeat``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, target = (torch.zeros(megabytes << 18) for _ in range(2))
    best = 0.0
    for _ in range(repeat):
        start = time.thread_time()
        target.copy_(source)
        best = max(best, source.nbytes / (time.thread_time() - start))
    torch.set_num_threads(threads)
    return best


def describe() -> str:
    """One line for the head of a table."""
    peak, copied = multiply_adds_per_second(), copied_bytes_per_second()
    return f"ceiling of one core: {2 * peak / 1e9:.0f} GFLOP/s in fp32, copies {copied / 1e9:.1f} GB/s"
