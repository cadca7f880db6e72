// WKV-7 for CPUs with AVX2 and FMA.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#include <utility>

#include "wkv7.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "convert.h"

namespace megaforge::wkv7 {
namespace {
#include "lanes.h"
#include "forward.h"
#include "backward.h"
}  // namespace

const Kernels avx2_f32 = {forward_scratch<8>, forward_rows<8, 2>, backward_scratch<8>, backward_rows<8>};

}  // namespace megaforge::wkv7

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
