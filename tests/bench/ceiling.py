"""What the machine can do at most: multiply-adds and products of bytes a second on one core, bytes copied and read.

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
#include <immintrin.h>
#endif
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
// Products of unsigned and signed bytes, summed by fours; 0 where the CPU has no instruction for them.
extern "C" std::int64_t byte_products(std::int64_t rounds, std::int32_t* out) {
#ifdef __AVX512VNNI__
  __m512i x[12], codes = _mm512_set1_epi8(1), token = _mm512_set1_epi8(2);
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) x[i] = _mm512_set1_epi32(i);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) x[i] = _mm512_dpbusd_epi32(x[i], codes, token);
  }
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) x[0] = _mm512_add_epi32(x[0], x[i]);
  *out = _mm512_reduce_add_epi32(x[0]);
  return rounds * 12 * 64;
#else
  *out = 0;
  return 0;
#endif
}
extern "C" void read_all(const char* from, std::int64_t bytes, std::int64_t* out) {
  typedef std::int64_t Words __attribute__((vector_size(64), aligned(1)));
  Words sum[4] = {};
  for (std::int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 4; ++j) sum[j] ^= *reinterpret_cast<const Words*>(from + i + 64 * j);
  }
  for (int j = 1; j < 4; ++j) sum[0] ^= sum[j];
  *out = sum[0][0];
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
    loaded.byte_products.restype = ctypes.c_int64
    loaded.byte_products.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int32)]
    loaded.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    loaded.read_all.restype = None
    return loaded


def multiply_adds_per_second(seconds: float = 0.05) -> float:
    """fp32 multiply-adds a CPU-second on this thread, the best of short pieces that together take ``seconds``."""
    out, best, end = ctypes.c_float(), 0.0, time.thread_time() + seconds
    while time.thread_time() < end:
        start = time.thread_time()
        done = _loop().multiply_adds(400_000, ctypes.byref(out))
        best = max(best, done / (time.thread_time() - start))
    return best


def byte_products_per_second(seconds: float = 0.05) -> float:
    """int8 multiply-adds a CPU-second on this thread, likewise; 0 on a CPU without AVX-512 VNNI."""
    out, best, end = ctypes.c_int32(), 0.0, time.thread_time() + seconds
    while time.thread_time() < end:
        start = time.thread_time()
        done = _loop().byte_products(400_000, ctypes.byref(out))
        best = max(best, done / (time.thread_time() - start))
    return best


def read_bytes_per_second(megabytes: int = 256, repeat: int = 5) -> float:
    """Bytes a CPU-second that this thread reads of memory that no cache holds, the best of ``repeat``."""
    source, out, best = torch.zeros(megabytes << 18), ctypes.c_int64(), 0.0
    for _ in range(repeat):
        start = time.thread_time()
        _loop().read_all(source.data_ptr(), source.nbytes, ctypes.byref(out))
        best = max(best, source.nbytes / (time.thread_time() - start))
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
