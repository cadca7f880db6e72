// Pointwise operators for CPUs with AVX-512.
#include "common/intrinsics.h"

#include <cstdint>

#include "pointwise.h"

#include "common/begin_avx512.h"

#define MF_ISA avx512
#define MF_WIDTH 16
#include "types.h"
#include "narrow.h"
#include "lanes_avx512.h"
#include "vec.h"

#include "activation.h"
#include "labels.h"
#include "norm.h"
#include "table.h"

namespace megaforge::pointwise {

const AllKernels avx512_kernels = {avx512::kernels_of<float>(), avx512::kernels_of<Bf16>()};

}  // namespace megaforge::pointwise

#include "common/end_isa.h"
