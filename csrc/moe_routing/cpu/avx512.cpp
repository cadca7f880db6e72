// Routing for CPUs with AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "moe_routing.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif

#define MEGAFORGE_AVX512
#include "route_vec.h"
#include "rows.h"

namespace megaforge::moe {

const RouteKernels<float> avx512_route_f32 = {avx512::scratch_bytes, avx512::route_part, avx512::backward_part};
const RowKernels avx512_rows = {avx512::permute, avx512::unpermute, avx512::unpermute_backward};

}  // namespace megaforge::moe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
