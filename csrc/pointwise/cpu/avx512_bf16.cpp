// Pointwise operators for CPUs with AVX-512 and its bf16 conversions.
#include "common/intrinsics.h"

#include <cstdint>

#include "pointwise.h"

#include "common/begin_avx512_bf16.h"

#define MF_ISA avx512_bf16
#define MF_WIDTH 16
#include "types.h"
#include "narrow_bf16.h"
#include "lanes_avx512.h"
#include "vec.h"

#include "activation.h"
#include "labels.h"
#include "norm.h"
#include "table.h"

namespace megaforge::pointwise {

const AllKernels avx512_bf16_kernels = {avx512_bf16::kernels_of<float>(), avx512_bf16::kernels_of<Bf16>()};

}  // namespace megaforge::pointwise

#include "common/end_isa.h"
