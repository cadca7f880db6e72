// Products with packed weights for CPUs with AVX-512 and its products of bytes.
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
#include <limits>

#include "bitgemm.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512vnni,prefer-vector-width=512")
#endif

#define MEGAFORGE_VNNI
#define MF_ISA avx512_vnni
#include "finish.h"
#include "wide.h"

namespace megaforge::bitgemm {

const Kernels avx512_vnni_kernels = avx512_vnni::kKernels;

}  // namespace megaforge::bitgemm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
