// WKV-7 for CPUs with AVX-512.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#include <utility>

#include "wkv7.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif

#include "convert.h"

namespace megaforge::wkv7 {
namespace {
#include "lanes.h"
#include "forward.h"
#include "backward.h"
}  // namespace

const Kernels avx512_f32 = {forward_scratch<16>, forward_rows<16, 4>, backward_scratch<16>, backward_rows<16>};

}  // namespace megaforge::wkv7

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
