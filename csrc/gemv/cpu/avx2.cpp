// Products with a few vectors for CPUs with AVX2.
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the intrinsics of GCC 12
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "gemv.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define MEGAFORGE_AVX2
#define MF_ISA avx2
#include "vec.h"

#include "products.h"

namespace megaforge::gemv {

const Kernels avx2_kernels = {avx2::part<float>, avx2::part<Bf16>};

}  // namespace megaforge::gemv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
