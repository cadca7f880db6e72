// Routing for CPUs with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "moe_routing.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define MEGAFORGE_AVX2
#include "route_vec.h"
#include "rows.h"

namespace megaforge::moe {

const RouteKernels<float> avx2_route_f32 = {avx2::scratch_bytes, avx2::route_part, avx2::backward_part};
const RowKernels avx2_rows = {avx2::permute, avx2::unpermute, avx2::unpermute_backward};

}  // namespace megaforge::moe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
