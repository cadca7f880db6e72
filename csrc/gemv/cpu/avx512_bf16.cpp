// Products with a few vectors for CPUs with AVX-512 and its bf16 products.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16,prefer-vector-width=512")
#endif

#define MEGAFORGE_AVX512
#define MEGAFORGE_AVX512_BF16
#define MF_ISA avx512_bf16
#include "vec.h"

#include "products.h"

namespace megaforge::gemv {

const Kernels avx512_bf16_kernels = {avx512_bf16::part<float>, avx512_bf16::part<Bf16>};

}  // namespace megaforge::gemv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
