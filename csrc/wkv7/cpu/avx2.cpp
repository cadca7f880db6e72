// WKV-7 for CPUs with AVX2 and FMA.
#include <cstddef>
#include <cstdint>
#include <utility>

#include "wkv7.h"

#include "common/begin_avx2.h"

#include "convert.h"

namespace megaforge::wkv7 {
namespace {
#include "lanes.h"
#include "forward.h"
#include "backward.h"
}  // namespace

const Kernels avx2_f32 = {forward_scratch<8>, forward_rows<8, 2>, backward_scratch<8>, backward_rows<8>};

}  // namespace megaforge::wkv7

#include "common/end_isa.h"
