// Causal attention for CPUs with AVX-512.
#include "common/intrinsics.h"

#include <cstddef>
#include <cstdint>

#include "attention.h"

#include "common/begin_avx512.h"
#include "common/transpose16.h"

#define MF_ISA avx512
#define MF_WIDTH 16
#include "types.h"
#include "narrow.h"
#include "lanes_avx512.h"
#include "vec.h"

#include "pack.h"

#include "backward.h"
#include "forward.h"

namespace megaforge::attention {

const Kernels avx512_kernels = {avx512::forward_bytes<avx512::F32>, avx512::forward_unit<avx512::F32>,
    avx512::backward_bytes<avx512::F32>, avx512::backward_unit<avx512::F32>};

}  // namespace megaforge::attention

#include "common/end_isa.h"
