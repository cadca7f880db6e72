// Causal attention for CPUs with AVX2.
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the intrinsics of GCC 12
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attention.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define MEGAFORGE_AVX2
#define MF_ISA avx2
#include "vec.h"

#include "pack.h"

#include "backward.h"
#include "forward.h"

namespace megaforge::attention {

const Kernels avx2_kernels = {avx2::forward_bytes<avx2::F32>, avx2::forward_unit<avx2::F32>,
    avx2::backward_bytes<avx2::F32>, avx2::backward_unit<avx2::F32>};

}  // namespace megaforge::attention

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
