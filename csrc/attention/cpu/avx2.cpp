// Causal attention for CPUs with AVX2.
#include "common/intrinsics.h"

#include <cstddef>
#include <cstdint>

#include "attention.h"

#include "common/begin_avx2.h"

#define MF_ISA avx2
#define MF_WIDTH 8
#include "types.h"
#include "narrow.h"
#include "lanes.h"
#include "vec.h"

#include "pack.h"

#include "backward.h"
#include "forward.h"

namespace megaforge::attention {

const Kernels avx2_kernels = {avx2::forward_bytes<avx2::F32>, avx2::forward_unit<avx2::F32>,
    avx2::backward_bytes<avx2::F32>, avx2::backward_unit<avx2::F32>};

}  // namespace megaforge::attention

#include "common/end_isa.h"
