// Newton-Schulz iterations for CPUs with AVX2.
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the intrinsics of GCC 12
#endif
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>

#include "newton_schulz.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define MEGAFORGE_AVX2
#define MF_ISA avx2
#include "vec.h"

#include "iterate.h"

namespace megaforge::newton_schulz {

const Kernels avx2_kernels = {avx2::scratch_bytes, avx2::orthogonalize, avx2::polynomial};

}  // namespace megaforge::newton_schulz

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
