// WKV-7 for CPUs with AVX-512.
#include <cstddef>
#include <cstdint>
#include <utility>

#include "wkv7.h"

#include "common/begin_avx512.h"

#include "convert.h"

namespace megaforge::wkv7 {
namespace {
#include "lanes.h"
#include "forward.h"
#include "backward.h"
}  // namespace

const Kernels avx512_f32 = {forward_scratch<16>, forward_rows<16, 4>, backward_scratch<16>, backward_rows<16>};

}  // namespace megaforge::wkv7

#include "common/end_isa.h"
