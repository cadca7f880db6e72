// Causal attention for CPUs with AVX-512 and its bf16 products.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16,prefer-vector-width=512")
#endif

#define MEGAFORGE_AVX512
#define MEGAFORGE_AVX512_BF16
#define MF_ISA avx512_bf16
#include "vec.h"

#include "pack.h"

#include "backward.h"
#include "forward.h"

namespace megaforge::attention {

const Kernels avx512_bf16_kernels = {avx512_bf16::forward_bytes<avx512_bf16::Bf16>, avx512_bf16::forward_unit<avx512_bf16::Bf16>,
    avx512_bf16::backward_bytes<avx512_bf16::Bf16>, avx512_bf16::backward_unit<avx512_bf16::Bf16>};

}  // namespace megaforge::attention

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
