// Pointwise operators for CPUs with AVX2.
#include "common/intrinsics.h"

#include <cstdint>

#include "pointwise.h"

#include "common/begin_avx2.h"

#define MF_ISA avx2
#define MF_WIDTH 8
#include "types.h"
#include "narrow.h"
#include "lanes.h"
#include "vec.h"

#include "activation.h"
#include "labels.h"
#include "norm.h"
#include "table.h"

namespace megaforge::pointwise {

const AllKernels avx2_kernels = {avx2::kernels_of<float>(), avx2::kernels_of<Bf16>()};

}  // namespace megaforge::pointwise

#include "common/end_isa.h"
